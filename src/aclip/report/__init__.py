"""The report of a run, and pictures of what a model looks at."""

from aclip.report.looking import take_snapshot
from aclip.report.overlays import heat_map, kept_patches
from aclip.report.page import write_report
from aclip.report.snapshots import Snapshot, read_snapshot, snapshot_path, write_snapshot

__all__ = [
    "Snapshot",
    "heat_map",
    "kept_patches",
    "read_snapshot",
    "snapshot_path",
    "take_snapshot",
    "write_report",
    "write_snapshot",
]
