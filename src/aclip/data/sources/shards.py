"""WebDataset shards: tar files whose members of one name make one sample."""

import glob
import json
import logging
import os
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from aclip.data.captions import caption_lines, decode_text
from aclip.data.decode import IMAGE_EXTENSIONS
from aclip.data.sources.base import PackedStrings, RawSample, printable
from aclip.errors import BadSampleError, DataError

_log = logging.getLogger(__name__)

_ROLES = ("image", "txt", "json", "cls")
_ABSENT = -1
_BLOCK = 512  # bytes; POSIX.1-2017, pax, "ustar Interchange Format"
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

        Raises:
            DataError: a file that is not a tar file or is compressed, or no sample in any of them.
        """
        self.name = name
        self._paths = paths
        self._keys = PackedStrings()
        members: list[np.ndarray] = []
        shards: list[np.ndarray] = []
        for number, path in enumerate(paths):
            groups = _index(path)
            for key in groups:
                self._keys.append(printable(f"{path.name}/{key}"))
            members.append(np.array(list(groups.values()), dtype=np.int64).reshape(-1, len(_ROLES), 2))
            shards.append(np.full(len(groups), number, dtype=np.int32))
        self._members = np.concatenate(members)  # (n, roles, (offset, size)) in bytes
        self._shards = np.concatenate(shards)
        if not len(self):
            raise DataError(f"no samples in {name}: its {len(paths)} tar files hold no picture")

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
            # Opened anew for every sample: no handle to share with a fork, to run out of, or to close.
            with path.open("rb") as file:
                parts = {
                    role: _read_member(file, int(offset), int(size))
                    for role, (offset, size) in zip(_ROLES, self._members[index], strict=True)
                    if offset != _ABSENT
                }
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


def expand_shards(spec: str) -> list[Path]:
    """Return the tar files that a path, glob or brace pattern names, sorted within each pattern.

    `{0000..0012}` counts with leading zeros, `{train,val}` lists.

    Raises:
        DataError: a file of a brace pattern or path that does not exist, or a glob that matches nothing.
    """
    paths: list[Path] = []
    missing: list[str] = []
    for pattern in _expand_braces(spec):
        found = [pattern] if os.path.isfile(pattern) else sorted(glob.glob(pattern, recursive=True))
        paths.extend(Path(path) for path in found)
        if not found:
            missing.append(pattern)
    if missing:
        raise DataError(
            f"no such shard: {missing[0]} ({len(missing)} missing, {len(paths)} found for {spec})"
        )
    return paths


def _expand_braces(spec: str) -> Iterator[str]:
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
        yield from _expand_braces(spec[: match.start()] + choice + spec[match.end() :])


def _index(path: Path) -> dict[str, list[tuple[int, int]]]:
    """Return sample name -> (offset, size) of its members, in the order of `_ROLES`.

    A shard that is cut off keeps its readable part; the rest is reported.
    """
    groups: dict[str, list[tuple[int, int]]] = {}
    size = path.stat().st_size
    damage = ""
    try:
        with tarfile.open(path, mode="r:") as archive:
            try:
                for member in archive:
                    damage = _add_member(groups, member, size) or damage
            except tarfile.TarError as error:
                damage = str(error)
            end = archive.offset
        damage = damage or _damage_at_end(path, end)
    except (tarfile.TarError, OSError) as error:
        raise DataError(f"{path} {_why_unreadable(path)}: {error}") from error
    if damage:
        _log.warning("%s is damaged (%s): its first %d samples are used", path, damage, len(groups))
    return groups


def _add_member(groups: dict[str, list[tuple[int, int]]], member: tarfile.TarInfo, file_size: int) -> str:
    """Add a member to its group; return what is wrong with it, if anything."""
    if not member.isreg() or member.issparse():
        return ""
    folder, _, file_name = member.name.rpartition("/")
    stem, _, extension = file_name.partition(".")
    role = _role(extension)
    if role is None or not stem:
        return ""
    if member.offset_data + member.size > file_size:
        return f"cut off within {member.name}"
    key = f"{folder}/{stem}" if folder else stem
    group = groups.setdefault(key, [(_ABSENT, 0)] * len(_ROLES))
    if group[role][0] == _ABSENT:  # of several pictures the first is used
        group[role] = (member.offset_data, member.size)
    return ""


def _role(extension: str) -> int | None:
    extension = extension.lower()
    if extension in _ROLES[1:]:
        return _ROLES.index(extension)
    return 0 if extension.rpartition(".")[2] in IMAGE_EXTENSIONS else None


def _damage_at_end(path: Path, end: int) -> str:
    """`tarfile` stops without a word at a header that it cannot read; a whole archive ends in zeros."""
    with path.open("rb") as file:
        file.seek(end)
        block = file.read(_BLOCK)
    if not block:
        return "no end-of-archive mark"
    return f"unreadable header at byte {end}" if any(block) else ""


def _why_unreadable(path: Path) -> str:
    with path.open("rb") as file:
        start = file.read(4)
    if start.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zX", b"\x28\xb5\x2f\xfd")):
        return "is compressed, and a compressed tar file cannot be read at random: unpack it to a plain .tar"
    return "is not a tar file"


def _read_member(file: BinaryIO, offset: int, size: int) -> bytes:
    file.seek(offset)
    data = file.read(size)
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
