"""A data set made of packages: what it needs, and the source of each split."""

import csv
import hashlib
import io
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aclip.data.sets.packages import Package
from aclip.data.sources.base import RawSample, Source
from aclip.files import write_atomically

Files = Mapping[str, Path]
"""Downloaded packages: name -> file."""

Licences = tuple[list[tuple[str, str, Mapping[str, Any]]], dict[str, bytes]]
"""Rows of style or family, its package, and `name`, `author`, `license` as Iconify packs say them; files by path."""


@dataclass(frozen=True)
class DataSet:
    """A set of image-text pairs.

    Attributes:
        name: as users write it, and the name of its folder.
        about: one line: content, size, download.
        licence: one line.
        packages: what it is made of.
        open: returns the source of each split, whose samples' names have no dot or slash.
        licences: returns what `write_licences` writes.
        shard_size: samples per shard.
        drawn: whether images are rendered from vector drawings, which needs resvg-py.
    """

    name: str
    about: str
    licence: str
    packages: tuple[Package, ...]
    open: Callable[[Files], dict[str, Source]]
    licences: Callable[[Files], Licences]
    shard_size: int = 1000
    drawn: bool = False


@dataclass(frozen=True)
class Entry:
    """A sample whose image file is made when it is read; the other fields are those of `RawSample`."""

    name: str
    image: Any
    captions: tuple[str, ...]
    tags: tuple[str, ...] = ()
    label: str | None = None
    concept: str | None = None


class Entries(Source):
    """The samples of a split, shuffled by a hash of their names."""

    def __init__(self, spec: str, entries: Iterable[Entry], encode: Callable[[Any], bytes]) -> None:
        """Keep `entries`; `encode` turns what an entry has as its image into a file, or raises BadSampleError."""
        self.spec = spec
        self._entries = sorted(entries, key=lambda entry: shuffle_key(entry.name))
        self._encode = encode

    def __len__(self) -> int:
        return len(self._entries)

    def name(self, index: int) -> str:
        """Return the name of a sample."""
        return self._entries[index].name

    def captions(self, index: int) -> tuple[str, ...]:
        """Return the captions of a sample."""
        return self._entries[index].captions

    def read(self, index: int) -> RawSample:
        """Return a sample.

        Raises:
            BadSampleError: its image cannot be made.
        """
        one = self._entries[index]
        return RawSample(one.name, self._encode(one.image), one.captions, one.tags, one.label, one.concept)


def unit_hash(text: str) -> float:
    """Return h(text) in [0, 1): the first 8 hex digits of its SHA-1 as a fraction of 2^32."""
    return int(hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()[:8], 16) / 2**32


def shuffle_key(name: str) -> tuple[float, str]:
    """Return the sort key that shuffles a split deterministically."""
    return unit_hash(f"order{name}"), name


def write_licences(folder: Path, dataset: DataSet, files: Files) -> None:
    """Write `licences.csv` and what the packages themselves say into `folder`."""
    rows, texts = dataset.licences(files)
    versions = {package.name: package.version for package in dataset.packages}
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(("style", "package", "version", "title", "author", "author_url", "licence", "licence_url"))
    for style, package, info in rows:
        author, licence = info.get("author", {}), info.get("license", {})
        writer.writerow((style, package, versions[package], info.get("name"), author.get("name"), author.get("url"),
                         licence.get("spdx") or licence.get("title"), licence.get("url")))
    for name, data in {**texts, "licences.csv": table.getvalue().encode()}.items():
        write_atomically(folder / name, data)
