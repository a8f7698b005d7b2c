"""Self-contained pages about a run, a comparison or a source, and what a model looks at.

Imported on first use: the help of the command line needs neither torch nor jinja2.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aclip.report.comparison import summary_table, write_comparison
    from aclip.report.data_page import write_data_page, write_look_page
    from aclip.report.run import report, write_report
    from aclip.report.snapshots import heat_map, kept_patches, read_snapshot, take_snapshot

__all__ = ["heat_map", "kept_patches", "read_snapshot", "report", "summary_table", "take_snapshot",
           "write_comparison", "write_data_page", "write_look_page", "write_report"]

_HOMES = {
    "comparison": ("summary_table", "write_comparison"), "data_page": ("write_data_page", "write_look_page"),
    "run": ("report", "write_report"), "snapshots": ("heat_map", "kept_patches", "read_snapshot", "take_snapshot"),
}


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"aclip.report.{module}"), name)
    raise AttributeError(f"module 'aclip.report' has no attribute '{name}'")
