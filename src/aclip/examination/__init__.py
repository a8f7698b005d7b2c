"""A source looked at before training: `doctor` reads all of it, `look` a few samples."""

from aclip.examination.diagnosis import Examination, Example, doctor, examine
from aclip.examination.findings import Finding, Limits
from aclip.examination.glance import look

__all__ = ["Examination", "Example", "Finding", "Limits", "doctor", "examine", "look"]
