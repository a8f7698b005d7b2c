"""The error tree.

Every error that a user can cause is an `AclipError`. Its message is one sentence that says what is wrong, where, and
what to type instead; the command line prints it without a traceback.
"""

import difflib
from collections.abc import Iterable

RANK_0_REPORTS_FIRST = 10.0
"""Seconds in which rank 0 may report an error raised on every rank, and the launcher end the others."""


class AclipError(Exception):
    """Base of all errors that a user can cause; line breaks in the message become spaces."""

    reported = False
    """Whether other ranks have had their time to report it first."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(line.strip() for line in message.strip().splitlines()))


class ConfigError(AclipError):
    """An invalid setting, recipe or command line."""


class DataError(AclipError):
    """A source that cannot be used (a single bad sample is a `BadSampleError`)."""


class BadSampleError(AclipError):
    """A sample that cannot be used: it is skipped, counted and reported by name.

    Attributes:
        reason: a few words without the sample's name; details of this sample follow a colon.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = str(self)


class CheckpointError(AclipError):
    """A checkpoint that is missing, damaged, or of another model."""


class TrainingError(AclipError):
    """A run that cannot continue."""


class OutOfMemoryError(TrainingError):
    """A training step that does not fit into memory."""


class UnsupportedModelError(AclipError):
    """A model without a required feature, e.g. attention that scores patches."""


class ExportError(AclipError):
    """An export that cannot be written, or whose features differ from the model's."""


class MissingDependencyError(AclipError):
    """A feature whose optional package or program is not installed."""


MOST_NAMES = 40  # that an error lists


def category(reason: str) -> str:
    """Return the reason of a `BadSampleError` without the details of the sample.

    >>> category("image too large: 30000x30000 pixels, the limit is 100 million")
    'image too large'
    """
    return reason.partition(":")[0]


def unknown_name(kind: str, name: str, known: Iterable[str]) -> str:
    """Return the message for a name that does not exist: the closest match, and all that exist if they are few.

    >>> unknown_name("recipe", "aclip", ["clip", "a-clip"])
    "unknown recipe 'aclip': did you mean 'a-clip'? There are: a-clip, clip"
    """
    names = sorted(known, key=str.lower)
    close = difflib.get_close_matches(name, names, n=5, cutoff=0.5)
    some = ", ".join(names) or "none"
    if len(names) > MOST_NAMES:
        some = f"{len(names)}, the closest are {', '.join(close)}" if close else f"{', '.join(names[:5])}, ..."
    hint = f": did you mean '{close[0]}'? There" if close else "; there"
    return f"unknown {kind} '{name}'{hint} are: {some}"
