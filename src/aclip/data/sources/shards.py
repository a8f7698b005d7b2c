"""WebDataset shards: tar files whose members of one name make one sample."""

import glob
import json
import logging
import os
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np

from aclip import dist
from aclip.data.captions import caption_lines, decode_text
from aclip.data.sources.base import PackedStrings, RawSample, printable
from aclip.data.sources.shard_index import ABSENT, ROLES, ShardIndex, index_shard, is_indexed
from aclip.data.workers import read_ahead, usable_cores
from aclip.errors import BadSampleError, DataError

MAX_LOST = 0.1
"""Share of the shards that may be unreadable, or out of reach, before a source is called unusable."""

MANY = 32
"""New shards from which on processes share in reading headers: starting them takes as long as reading some."""

QUIET, PAUSE = 2.0, 30.0
"""Seconds before the first word on how far the headers are, and between words."""

_log = logging.getLogger(__name__)

_BRACES = re.compile(r"\{([^{}]*)\}")


class ShardSource:
    """Pairs in tar files of the WebDataset layout, read in any order.

    Members with one path up to the first dot of the file name are one sample: a picture by its ending,
    `.txt` (captions, one a line), `.json` (an object with `caption` or `captions`, `tags`, `label`,
    `concept`) and `.cls` (a label). Headers are read once when the source is opened; pictures are read by their offset,
    in memory: a member's name is never used as a path. Only regular files count.

    Attributes:
        name: what the user called it.
    """

    def __init__(self, name: str, paths: list[Path]) -> None:
        """Index the shards `paths`, in this order.

        Shards that are no tar files, or compressed, are left out and named, up to `MAX_LOST` of all.

        Raises:
            DataError: more than `MAX_LOST` of the shards lost, or no sample in any of them.
        """
        self.name = name
        self._paths: list[Path] = []
        self._keys = PackedStrings()
        members: list[np.ndarray] = []
        shards: list[np.ndarray] = []
        lost: list[DataError] = []
        for path, (index, why) in zip(paths, _telling(_indexed(paths), name, len(paths)), strict=True):
            if index is None:
                lost.append(DataError(why))
                check_lost(name, lost, len(paths))
                continue
            for number in range(len(index.keys)):
                self._keys.append(printable(f"{path.name}/{index.keys[number]}"))
            members.append(index.members)
            shards.append(np.full(len(index.keys), len(self._paths), dtype=np.int32))
            self._paths.append(path)
        if not sum(map(len, members)):
            raise DataError(f"no samples in {name}: its {len(paths)} tar files hold no picture")
        self._members = np.concatenate(members)  # (n, roles, (offset, size)) in bytes
        self._shards = np.concatenate(shards)

    def __len__(self) -> int:
        return len(self._keys)

    def key(self, index: int) -> str:
        """Return the shard's file name and the sample's name in it."""
        return self._keys[index]

    def read(self, index: int) -> RawSample:
        """Read one sample's members.

        Raises:
            BadSampleError: no picture, JSON that cannot be read, or a shard that has gone or shrunk.
        """
        key = self.key(index)
        path = self._paths[int(self._shards[index])]
        try:
            # Opened anew for every sample: no handle to share with a fork, or to run out of.
            file = os.open(path, os.O_RDONLY)
            try:
                parts = {
                    role: _read_member(file, offset, size)
                    for role, (offset, size) in zip(ROLES, self._members[index].tolist(), strict=True)
                    if offset != ABSENT
                }
            finally:
                os.close(file)
        except OSError as error:
            raise BadSampleError(f"cannot read {path.name}: {error.strerror}") from error
        if "image" not in parts:
            raise BadSampleError("no picture in the shard")
        fields = _parse_json(parts["json"]) if "json" in parts else {}
        captions = _strings(fields.get("captions")) or _strings(fields.get("caption"))
        if "txt" in parts:
            captions = caption_lines(decode_text(parts["txt"]))
        label, concept = fields.get("label"), fields.get("concept")
        if "cls" in parts:
            label = decode_text(parts["cls"]).strip()
        return RawSample(
            key,
            parts["image"],
            captions,
            tags=_strings(fields.get("tags")),
            label=None if label is None else str(label),
            concept=None if concept is None else str(concept),
        )


def _indexed(paths: Sequence[Path]) -> Iterator[tuple[ShardIndex | None, str]]:
    """Yield the index of every shard, or None and why there is none.

    Those that the cache does not have are read by as many processes as this one has cores, if they are many; handing
    over those that it has would take longer than loading them. Of the processes of a run each first reads its share of
    the new ones, so that it finds the others' in the cache.
    """
    new = [path for path in paths if not is_indexed(path)]
    workers = max(1, usable_cores() // dist.processes_here()) if len(new) >= MANY else 0
    if dist.world_size() > 1:
        for _ in read_ahead(_try, new[dist.rank() :: dist.world_size()], workers=workers):
            pass
        new = [path for path in new if not is_indexed(path)]
    read, unknown = read_ahead(_try, new, workers=workers), set(new)
    for path in paths:
        yield next(read) if path in unknown else _try(path)


def _try(path: Path) -> tuple[ShardIndex | None, str]:
    try:
        return index_shard(path), ""
    except DataError as error:
        return None, str(error)


def _telling(
    indexes: Iterable[tuple[ShardIndex | None, str]], name: str, total: int
) -> Iterator[tuple[ShardIndex | None, str]]:
    """Pass indexes on, and say from time to time how many there are and how long it will take still."""
    begun = told = time.monotonic()
    for number, index in enumerate(indexes):
        now = time.monotonic()
        if now - told > (PAUSE if told > begun else QUIET) and dist.rank() == 0:
            left = timedelta(seconds=round((now - begun) / max(1, number) * (total - number)))
            _log.info("reading where the pictures lie in %s: %d of %d shards, %s left", name, number, total, left)
            told = now
        yield index


def check_lost(name: str, lost: Sequence[DataError], shards: int) -> None:
    """Say that a shard is left out.

    Raises:
        DataError: too many are, see `MAX_LOST`; if there is just one shard, what is wrong with it.
    """
    if len(lost) <= MAX_LOST * shards:
        _log.warning("a shard of %s is left out: %s", name, lost[-1])
        return
    if shards == 1:
        raise lost[0]
    raise DataError(f"{len(lost)} of the {shards} shards of {name} cannot be used, and at most {MAX_LOST:.0%} may be "
                    f"lost; the first: {lost[0]}")


def expand_pattern(spec: str) -> list[Path]:
    """Return the files that a path, glob or brace pattern names, sorted within each pattern.

    `{0000..0012}` counts with leading zeros, `{train,val}` lists.

    Raises:
        DataError: a file of a brace pattern or path that does not exist, or a glob that matches nothing.
    """
    paths: list[Path] = []
    missing: list[str] = []
    for pattern in expand_braces(spec):
        found = [pattern] if os.path.isfile(pattern) else sorted(glob.glob(pattern, recursive=True))
        paths.extend(Path(path) for path in found)
        if not found:
            missing.append(pattern)
    if missing:
        raise DataError(
            f"no such file: {missing[0]} ({len(missing)} missing, {len(paths)} found for {spec})"
        )
    return paths


def expand_braces(spec: str) -> Iterator[str]:
    """Yield what a pattern with braces stands for; a pattern without is itself."""
    match = _BRACES.search(spec)
    if match is None:
        yield spec
        return
    counted = re.fullmatch(r"(\d+)\.\.(\d+)", match[1])
    if counted:
        first, last = counted[1], counted[2]
        choices = [str(n).zfill(len(first)) for n in range(int(first), int(last) + 1)]
    else:
        choices = match[1].split(",")
    for choice in choices:
        yield from expand_braces(spec[: match.start()] + choice + spec[match.end() :])


def _read_member(file: int, offset: int, size: int) -> bytes:
    data = os.pread(file, size, offset)
    if len(data) != size:
        raise BadSampleError("the shard has been cut off since it was opened")
    return data


def _parse_json(data: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BadSampleError(f"JSON that cannot be read: {error}") from error
    if not isinstance(fields, dict):
        raise BadSampleError("JSON that is not an object")
    return fields


def _strings(value: Any) -> tuple[str, ...]:
    """Return the strings of a JSON value that may be one string, a list of strings, or something else."""
    values = value if isinstance(value, list) else [value]
    return tuple(item for item in values if isinstance(item, str))
