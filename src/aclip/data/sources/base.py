"""What every source is: pairs that can be counted, and read in any order."""

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

WINDOW = 8
"""Groups of a `Grouped` source that training draws from at a time."""


@dataclass(frozen=True)
class RawSample:
    """One pair as it is stored.

    Attributes:
        key: the sample's name, by which it is reported.
        image: the bytes of the picture's file, not yet decoded.
        captions: as written; none where the source has none for this picture.
        tags: further words for the picture.
        label: the picture's class, or None.
        concept: what the captions name, if they are several ways to say it: pictures of one concept are not each
            other's negatives whichever caption each is drawn with. None: every caption stands for itself.
    """

    key: str
    image: bytes
    captions: tuple[str, ...]
    tags: tuple[str, ...] = ()
    label: str | None = None
    concept: str | None = None


@runtime_checkable
class Source(Protocol):
    """A numbered collection of pairs, cheap to hand to worker processes.

    A source is pickled or forked into every worker, so it holds no open file, and all processes see
    the same samples under the same indices.

    Attributes:
        name: what the user called it.
    """

    name: str

    def __len__(self) -> int:
        """Return the number of samples, bad ones included."""
        ...

    def key(self, index: int) -> str:
        """Return the name of sample `index` without reading it."""
        ...

    def read(self, index: int) -> RawSample:
        """Read sample `index`, 0 <= index < len.

        Raises:
            BadSampleError: the sample's files or fields are missing or unreadable.
        """
        ...


@runtime_checkable
class Grouped(Protocol):
    """A source that reads whole groups of samples, so that a random order over all of them would be slow.

    Attributes:
        groups: samples in each group; a group's samples have consecutive numbers, in the order of the groups.
    """

    groups: tuple[int, ...]


def printable(name: str) -> str:
    """Return `name` with the bytes of an undecodable file name as escapes: journals and terminals take UTF-8."""
    return name.encode("utf-8", errors="backslashreplace").decode("utf-8")


class Runs:
    """Numbers 0, 1, 2, ... in runs of some lengths: the samples of several sources, files or row groups."""

    def __init__(self, sizes: Sequence[int]) -> None:
        """Lay runs of these sizes, 0 allowed, one behind the other."""
        self._sizes = tuple(sizes)
        self._ends = np.cumsum(self._sizes, dtype=np.int64)

    def __len__(self) -> int:
        """Return how many numbers there are in all runs."""
        return int(self._ends[-1]) if self._sizes else 0

    def start(self, run: int) -> int:
        """Return the first number of a run."""
        return int(self._ends[run]) - self._sizes[run]

    def place(self, number: int) -> tuple[int, int]:
        """Return the run that has `number`, 0 <= number < len, and its place there."""
        run = int(np.searchsorted(self._ends, number, side="right"))
        return run, number - self.start(run)


class PackedStrings:
    """A list of strings in two flat buffers, to which can be appended.

    A million Python strings cost about 60 MB more than their text, and touching their reference counts
    copies them into every forked worker; a buffer costs 8 bytes a string and stays shared.
    """

    def __init__(self, strings: Iterable[str] = ()) -> None:
        """Pack `strings`; lone surrogates (undecodable file names) survive."""
        self._text = bytearray()
        self._ends = array("q", [0])
        for string in strings:
            self.append(string)

    def append(self, string: str) -> None:
        """Add one string at the end."""
        self._text += string.encode("utf-8", errors="surrogateescape")
        self._ends.append(len(self._text))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} of {len(self)} strings")
        text = self._text[self._ends[index] : self._ends[index + 1]]
        return text.decode("utf-8", errors="surrogateescape")
