"""The error tree.

Every error that a user can cause is an `AclipError`; its message is one sentence that says what was
wrong, where, and what exists instead. The command line prints it without a traceback.
"""

import difflib
from collections.abc import Iterable


class AclipError(Exception):
    """Base of all errors that a user can cause; line breaks in what other libraries say become spaces."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(line.strip() for line in message.strip().splitlines()))


class ConfigError(AclipError):
    """A setting, a recipe or a command line that does not make sense."""


class DataError(AclipError):
    """A source that cannot be used at all (one bad sample is a `BadSampleError`)."""


class BadSampleError(AclipError):
    """One sample that cannot be used; it is skipped, counted and reported by name.

    Attributes:
        reason: why, in a few words, without the sample's name; what is particular to the sample follows a colon.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = str(self)


class CheckpointError(AclipError):
    """A checkpoint that is missing, damaged, or of another model."""


class TrainingError(AclipError):
    """A run that cannot go on."""


class OutOfMemoryError(TrainingError):
    """A training step that does not fit into the memory."""


class UnsupportedModelError(AclipError):
    """A model that cannot do what was asked (say, score patches without attention)."""


class ExportError(AclipError):
    """An export that cannot be written, or whose features are not those of the model."""


class MissingDependencyError(AclipError):
    """A feature whose optional package or program is not installed."""


def category(reason: str) -> str:
    """Return a reason of a `BadSampleError` without what is particular to one sample.

    >>> category("image too large: 30000x30000 pixels, the limit is 100 million")
    'image too large'
    """
    return reason.partition(":")[0]


def unknown_name(kind: str, name: str, known: Iterable[str]) -> str:
    """Return the sentence for a name that does not exist: the closest match, and all there are.

    >>> unknown_name("recipe", "aclip", ["clip", "a-clip"])
    "unknown recipe 'aclip': did you mean 'a-clip'? There are: a-clip, clip"
    """
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"did you mean '{close[0]}'? " if close else ""
    return f"unknown {kind} '{name}': {hint}There are: {', '.join(names) or 'none'}"
