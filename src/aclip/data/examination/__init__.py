"""A source looked at before training: `doctor` reads all of it, `look` a few samples."""

from aclip.data.examination.diagnosis import Examination, Example, check_fix, doctor, examine, load_example, write_fix
from aclip.data.examination.findings import Finding, Limits
from aclip.data.examination.glance import Look, look
from aclip.data.examination.measure import Measurements

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
