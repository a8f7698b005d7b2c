"""A part of any source, named as Python slices are: `pairs.csv[:1000]`, `cifar10:train[5000:10000]`."""

import os
import re
from itertools import accumulate

from aclip.data.sources.base import Grouped, RawSample, Source
from aclip.errors import ConfigError, DataError

_SLICE = re.compile(r"(.+)\[(-?\d*):(-?\d*)\]", re.DOTALL)


class Part:
    """Samples `first` to `last` (exclusive) of another source, under numbers of their own.

    Raises:
        DataError: no sample lies in it.
    """

    def __init__(self, source: Source, first: int, last: int | None) -> None:
        self.source = source
        self.first, self.last = first, len(source) if last is None else min(last, len(source))
        self.name = f"{source.name}[{first}:{'' if last is None else last}]"
        if self.first >= self.last:
            raise DataError(f"'{self.name}' is empty: the source has {len(source):,} samples")

    def __len__(self) -> int:
        """Return the number of samples."""
        return self.last - self.first

    def key(self, index: int) -> str:
        """Return the name of sample `index`."""
        return self.source.key(self.first + index)

    def read(self, index: int) -> RawSample:
        """Read sample `index`.

        Raises:
            BadSampleError: as the whole source.
        """
        return self.source.read(self.first + index)


class GroupedPart(Part):
    """A part of a `Grouped` source: the groups that lie in it, those at its ends cut.

    Attributes:
        groups: see `Grouped`.
    """

    def __init__(self, source: Source, first: int, last: int | None) -> None:
        super().__init__(source, first, last)
        assert isinstance(source, Grouped)
        sized = zip(source.groups, accumulate(source.groups), strict=True)
        spans = ((max(end - size, self.first), min(end, self.last)) for size, end in sized)
        self.groups = tuple(end - start for start, end in spans if start < end)


def take_part(source: Source, first: int, last: int | None) -> Part:
    """Return the part of a source, which is read in groups if the source is.

    Raises:
        DataError: no sample lies in it.
    """
    return (GroupedPart if isinstance(source, Grouped) else Part)(source, first, last)


def split_slice(spec: str) -> tuple[str, tuple[int, int | None] | None]:
    """Return a specification without its slice, and the slice, or None where it has none or names a path.

    >>> split_slice("emoji:train[:100]")
    ('emoji:train', (0, 100))

    Raises:
        ConfigError: a negative number.
    """
    match = _SLICE.fullmatch(spec)
    if match is None or os.path.exists(spec):
        return spec, None
    whole, first, last = match.groups()
    if "-" in first + last:
        raise ConfigError(f"'{spec}': a part takes no negative numbers, it is counted from the first sample: "
                          f"'{whole}[:1000]' is the first thousand, '{whole}[1000:]' the rest")
    return whole, (int(first or 0), int(last) if last else None)
