"""A data set made of packages: what it needs, and the source of each split."""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aclip.data.sets.packages import Package
from aclip.data.sources.base import RawSample, Source

Files = Mapping[str, Path]
"""Downloaded packages: name -> file."""


@dataclass(frozen=True)
class DataSet:
    """A set of image-text pairs.

    Attributes:
        name: as users write it, and the name of its folder.
        about: one line: content, size, download.
        licence: one line.
        packages: what it is made of.
        open: returns the source of each split, whose samples' names have no dot or slash.
        licences: returns what the packages say of authors and licences: files by path.
        shard_size: samples per shard.
        drawn: whether images are rendered from vector drawings, which needs resvg-py.
    """

    name: str
    about: str
    licence: str
    packages: tuple[Package, ...]
    open: Callable[[Files], dict[str, Source]]
    licences: Callable[[Files], dict[str, bytes]]
    shard_size: int = 1000
    drawn: bool = False


class Entries(Source):
    """The samples of a split, shuffled by a hash of their names.

    Args:
        spec: name of the split.
        entries: samples without their images, each with what its image is made from.
        finish: returns a sample with its image, or raises BadSampleError.
    """

    def __init__(self, spec: str, entries: Iterable[tuple[RawSample, Any]],
                 finish: Callable[[RawSample, Any], RawSample]) -> None:
        self.spec = spec
        self._entries = sorted(entries, key=lambda entry: shuffle_key(entry[0].name))
        self._finish = finish

    def __len__(self) -> int:
        return len(self._entries)

    def name(self, index: int) -> str:
        return self._entries[index][0].name

    def read(self, index: int) -> RawSample:
        return self._finish(*self._entries[index])


def unit_hash(text: str) -> float:
    """Return h(text) in [0, 1): the first 8 hex digits of its SHA-1 as a fraction of 2^32."""
    return int(hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()[:8], 16) / 2**32


def shuffle_key(name: str) -> tuple[float, str]:
    """Return the sort key that shuffles a split deterministically."""
    return unit_hash(f"order{name}"), name
