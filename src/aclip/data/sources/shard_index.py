"""Where the members of a tar file lie, read from its headers once and kept beside other caches."""

import hashlib
import io
import logging
import os
import tarfile
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np

from aclip.data.decode import IMAGE_EXTENSIONS
from aclip.data.sources.base import PackedStrings
from aclip.errors import DataError
from aclip.files import write_atomically

_log = logging.getLogger(__name__)

SIZES = "sizes.json"
"""A file beside shards with the number of samples in each, by file name, as open_clip takes it, too."""

ROLES = ("image", "txt", "json", "cls")
"""What a member can be of a sample."""

ABSENT = -1
"""Offset of a member that a sample does not have."""

_BLOCK = 512  # bytes; POSIX.1-2017, pax, "ustar Interchange Format"
_FORMAT = 1  # of the files of the cache
_LONGEST_EXTENSION = 2**24  # bytes of one header that extends the next; names and attributes need far less
_EXTENSIONS = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME,
               tarfile.GNUTYPE_LONGLINK)  # fmt: skip
# What tarfile raises for hostile bytes: a chain of extension headers recurses, absurd sizes overflow.
_BROKEN = (tarfile.TarError, ValueError, OverflowError, RecursionError)


@dataclass(frozen=True)
class ShardIndex:
    """The samples of one shard.

    Attributes:
        keys: their names, in the order of their first members.
        members: (n, len(ROLES), 2) int64, offset and size in bytes of each member, `ABSENT` and 0 without one.
    """

    keys: PackedStrings
    members: np.ndarray


class _Header(tarfile.TarInfo):
    """A header whose size can be true; `tarfile` believes any, goes backwards for negative ones and never ends."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        """Parse a header.

        Raises:
            tarfile.HeaderError: it is none, or its size is impossible.
        """
        header = super().frombuf(buf, encoding, errors)
        limit = _LONGEST_EXTENSION if header.type in _EXTENSIONS else 2**62
        if not 0 <= header.size <= limit:
            raise tarfile.InvalidHeaderError(f"a size of {header.size} bytes")  # type: ignore[attr-defined]
        return header


def cache_folder() -> Path:
    """Return where this project keeps what it can make again: `$ACLIP_CACHE`, else `~/.cache/aclip`."""
    chosen = os.environ.get("ACLIP_CACHE")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "aclip"


def cached_path(kind: str, identity: str, ending: str = "") -> Path:
    """Return the file of the cache, among those of a kind, that belongs to what `identity` says in full."""
    name = hashlib.sha256(identity.encode(errors="surrogateescape")).hexdigest()[:32]
    return cache_folder() / kind / f"{name}{ending}"


def index_shard(path: Path) -> ShardIndex:
    """Return the index of a shard, from the cache if the shard has the size and time that it had then.

    A shard that is cut off keeps its readable part; the rest is reported, and the index is not kept.

    Raises:
        DataError: not a tar file, a compressed one, or one that cannot be read.
    """
    try:
        size, cached = _size_and_cache(path)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    index = _load(cached)
    if index is not None:
        return index
    groups, sound = _read_headers(path, size)
    members = np.array(list(groups.values()), dtype=np.int64).reshape(-1, len(ROLES), 2)
    index = ShardIndex(PackedStrings(groups), members)
    if sound:
        _save(cached, index)
    return index


def is_indexed(path: Path) -> bool:
    """Return whether the cache has an index of the shard as it is now, so that `index_shard` need not read headers."""
    try:
        return _size_and_cache(path)[1].exists()
    except OSError:
        return False


def _size_and_cache(path: Path) -> tuple[int, Path]:
    """Return a shard's size in bytes, and the file of the cache that belongs to the shard as it is now."""
    status = path.stat()
    identity = f"{_FORMAT} {path.absolute()} {status.st_size} {status.st_mtime_ns}"
    return status.st_size, cached_path("index", identity, ".npz")


def _load(path: Path) -> ShardIndex | None:
    """Return a cached index, or None if it is not there or damaged."""
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as content:
            text, members = content["keys"].tobytes(), content["members"]
    # zipfile raises RuntimeError for flags that it takes for encryption or an unknown compression
    except (OSError, ValueError, KeyError, EOFError, RuntimeError, zlib.error, zipfile.BadZipFile):
        return None
    keys = text.decode("utf-8", errors="surrogateescape").split("\0")[:-1]
    if members.dtype != np.int64 or members.shape != (len(keys), len(ROLES), 2):
        return None
    return ShardIndex(PackedStrings(keys), members)


def _save(path: Path, index: ShardIndex) -> None:
    """Keep an index; without a place for it the shard is read again next time."""
    text = "".join(f"{index.keys[number]}\0" for number in range(len(index.keys)))
    content = io.BytesIO()
    keys = np.frombuffer(text.encode("utf-8", errors="surrogateescape"), dtype=np.uint8)
    np.savez(content, keys=keys, members=index.members)
    try:
        write_atomically(path, content.getvalue())
    except OSError as error:
        _log.info("the index of a shard is not kept: %s", error)


def _read_headers(path: Path, size: int) -> tuple[dict[str, list[tuple[int, int]]], bool]:
    """Return sample name -> (offset, size) of its members, in the order of `ROLES`, and whether all is well."""
    groups: dict[str, list[tuple[int, int]]] = {}
    damage, repeated = "", []
    try:
        with tarfile.open(path, mode="r:", tarinfo=_Header) as archive:
            try:
                for member in archive:
                    damage = _cut_off(member, size) or damage
                    if member.size < 0 or archive.offset <= member.offset:  # an extension header may say so
                        damage = f"impossible size of {member.name}"
                        break
                    if not damage and (again := _add_member(groups, member)):
                        repeated.append(again)
                    archive.members = []  # type: ignore[attr-defined]  # it keeps what it has seen: 1 kB a member
            except _BROKEN as error:
                damage = str(error)
            end = archive.offset
        damage = damage or _damage_at_end(path, end)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    except _BROKEN as error:
        raise DataError(f"{path} {_why_unreadable(path)}: {error}") from error
    if damage:
        _log.warning("%s is damaged (%s): its first %d samples are used", path, damage, len(groups))
    if repeated:
        _log.warning("%s: %d members repeat a name, the first of each is used: %s", path, len(repeated), repeated[0])
    return groups, not damage and not repeated


def _cut_off(member: tarfile.TarInfo, file_size: int) -> str:
    """Return a word on a member that is needed and reaches beyond the end of the file."""
    beyond = member.isreg() and member.offset_data + member.size > file_size
    return f"cut off within {member.name}" if beyond else ""


def _add_member(groups: dict[str, list[tuple[int, int]]], member: tarfile.TarInfo) -> str:
    """Add a member to its group; return a word on it if the group has one of its kind."""
    if not member.isreg() or member.issparse():
        return ""
    folder, _, file_name = member.name.rpartition("/")
    stem, _, extension = file_name.partition(".")
    role = _role(extension)
    if role is None or not stem:
        return ""
    key = f"{folder}/{stem}" if folder else stem
    group = groups.setdefault(key, [(ABSENT, 0)] * len(ROLES))
    if group[role][0] != ABSENT:  # the first is used
        return f"{key} has more than one {ROLES[role]}"
    group[role] = (member.offset_data, member.size)
    return ""


def _role(extension: str) -> int | None:
    extension = extension.lower()
    if extension in ROLES[1:]:
        return ROLES.index(extension)
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
