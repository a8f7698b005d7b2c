"""`aclip data doctor`: what is wrong with a source, before a training run finds out."""

from aclip.data.doctor.clean import Cleaned, check_fix, write_clean
from aclip.data.doctor.examination import Examination, examine
from aclip.data.doctor.examples import Example, load_example
from aclip.data.doctor.findings import Finding, Limits
from aclip.data.doctor.measure import Measurements

__all__ = [
    "Cleaned",
    "Examination",
    "Example",
    "Finding",
    "Limits",
    "Measurements",
    "check_fix",
    "examine",
    "load_example",
    "write_clean",
]
