"""Pages that need nothing else: of a run, of a comparison, of a source; and what a model looks at."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aclip.report.comparison import summary_table, write_comparison
    from aclip.report.data_page import write_data_page, write_look_page
    from aclip.report.journals import outcome, primary
    from aclip.report.run import write_report
    from aclip.report.snapshots import (
        Snapshot,
        heat_map,
        kept_patches,
        read_snapshot,
        snapshot_path,
        take_snapshot,
        write_snapshot,
    )

# imported on first use: the command line's help needs neither torch nor jinja2
_MODULES = {
    "comparison": ("summary_table", "write_comparison"),
    "data_page": ("write_data_page", "write_look_page"),
    "journals": ("outcome", "primary"),
    "run": ("write_report",),
    "snapshots": ("Snapshot", "heat_map", "kept_patches", "read_snapshot", "snapshot_path", "take_snapshot",
                  "write_snapshot"),
}
_PLACE = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "Snapshot",
    "heat_map",
    "kept_patches",
    "outcome",
    "primary",
    "read_snapshot",
    "snapshot_path",
    "summary_table",
    "take_snapshot",
    "write_comparison",
    "write_data_page",
    "write_look_page",
    "write_report",
    "write_snapshot",
]


def __getattr__(name: str) -> Any:
    if name not in _PLACE:
        raise AttributeError(f"module 'aclip.report' has no attribute '{name}'")
    return getattr(import_module(f"aclip.report.{_PLACE[name]}"), name)
