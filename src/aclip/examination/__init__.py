"""A source looked at before training: `doctor` reads all of it, `look` a few samples."""

from aclip.examination.diagnosis import Examination, Example, check_fix, doctor, examine, load_example, write_fix
from aclip.examination.findings import Finding, Limits
from aclip.examination.glance import Look, look
from aclip.examination.measure import Measurements

__all__ = [
    "Examination",
    "Example",
    "Finding",
    "Limits",
    "Look",
    "Measurements",
    "check_fix",
    "doctor",
    "examine",
    "load_example",
    "look",
    "write_fix",
]
