"""What about the way in which data is stored slows reading down, and what to do about it."""

from collections.abc import Iterator, Sequence

import numpy as np

from aclip.data.sources import (
    EmbeddedPictures,
    FolderSource,
    Grouped,
    Joined,
    ManifestSource,
    Part,
    RemoteShardSource,
    Source,
)
from aclip.data.sources.base import WINDOW
from aclip.errors import BadSampleError

_MANY_FILES = 50_000
_SMALL_FILE = 16_384  # bytes: below it, opening a file takes longer than reading it on most disks
_LOOKED_AT = 15
_LARGE_GROUP = 20_000  # samples: eight such groups of 30 kB pictures are 5 GB in each worker


def layout_warnings(source: Source, workers: int) -> list[str]:
    """Return sentences about a source that is read slower than it need be, each with what to do.

    Local shards are read at random, so no worker waits for another however few or large they are, and nothing is
    said of them.

    Args:
        source: what is trained on; parts and mixtures are looked into.
        workers: processes that read.
    """
    return [warning for one in _leaves(source) for warning in _of(one, workers)]


def _leaves(source: Source) -> Iterator[Source]:
    if isinstance(source, Joined):
        for one in source.sources:
            yield from _leaves(one)
    elif isinstance(source, Part):
        yield from _leaves(source.source)
    else:
        yield source


def _of(source: Source, workers: int) -> Iterator[str]:
    if isinstance(source, RemoteShardSource):
        yield from _of_groups(source, source.groups, workers, "shard", "a shard is used when all of it has come")
    elif isinstance(source, EmbeddedPictures):
        yield from _of_groups(source, source.groups, workers, "row group", f"each worker keeps {WINDOW} in memory")
    elif isinstance(source, FolderSource | ManifestSource) and len(source) >= _MANY_FILES:
        size = _median_size(source)
        if size is not None and size < _SMALL_FILE:
            yield (f"{source.name} has {len(source):,} files of about {size / 1000:.0f} kB, and on many disks opening "
                   f"one takes longer than reading it: {_PACK.format(source.name)}")


def _of_groups(source: Source, groups: Sequence[int], workers: int, what: str, why: str) -> Iterator[str]:
    """Say that groups are too few to share, or too large to keep."""
    assert isinstance(source, Grouped)
    if max(groups) > _LARGE_GROUP:
        yield (f"{source.name} has a {what} of {max(groups):,} pairs, and {why}: "
               f"{_PACK.format(source.name)}")
    elif len(groups) < workers:
        some = f"{len(groups)} {what}{'s' * (len(groups) > 1)}"
        yield (f"{source.name} has {some} for {workers} workers, which will read the same ones, and {why}: "
               f"fewer workers are as fast, and {_PACK.format(source.name)}")


def _median_size(source: Source) -> float | None:
    """Return the bytes of a typical picture, or None if none of a few can be read."""
    sizes = []
    for index in np.linspace(0, len(source) - 1, _LOOKED_AT).astype(int).tolist():
        try:
            sizes.append(len(source.read(index).image))
        except BadSampleError:
            continue
    return float(np.median(sizes)) if sizes else None


_PACK = "'aclip data pack {} --output shards' makes shards of 1,000 pairs of it"
