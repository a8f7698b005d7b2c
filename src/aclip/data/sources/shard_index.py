"""Which bytes of a tar file are which sample: read from its headers once, and cached."""

import functools
import hashlib
import io
import json
import logging
import os
import tarfile
import time
import zipfile
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from aclip.data.decode import IMAGE_EXTENSIONS
from aclip.data.sources.base import PackedStrings
from aclip.errors import DataError
from aclip.files import cache_root, write_atomically

_log = logging.getLogger(__name__)

SIZES = "sizes.json"  # a file beside shards with the number of samples in each, by file name, as in open_clip
ROLES = ("image", "txt", "json", "cls")  # what a member can be in a sample
ABSENT = -1  # offset of a member that a sample does not have
_FORMAT = 2  # of cached indexes
_BLOCK = 512  # bytes; POSIX.1-2017, pax, "ustar Interchange Format"
# What tarfile raises for hostile bytes: a chain of extension headers recurses, absurd sizes overflow.
_BROKEN = (tarfile.TarError, ValueError, OverflowError, RecursionError)

# Words within an ending: of what lies beside an image, and of the image that the others are derived from.
_AUXILIARY = frozenset((
    "mask", "masks", "depth", "seg", "segmentation", "semantic", "instance", "normal", "normals", "alpha", "matte",
    "edge", "edges", "canny", "pose", "flow", "heatmap", "saliency", "thumb", "thumbnail",
))  # fmt: skip
_PRIMARY = frozenset(("image", "img", "input", "rgb", "photo", "picture", "source", "original"))
_NAMINGS = (0, 1, 2)  # words of an ending, counted from the back; 0: all after the first dot, as WebDataset has it

_Members = list[tuple[str, int, int]]  # name, offset, size
_Sample = dict[str, tuple[int, int]]  # the members of one name: ending -> offset, size


class Endings(NamedTuple):
    """The endings that the user has chosen, each without its first dot, e.g. "input.jpg"; None: understood."""

    image: str | None = None
    caption: str | None = None  # ends in txt or json


UNDERSTOOD = Endings()  # nothing is chosen


@dataclass(frozen=True)
class ShardIndex:
    """The samples of one shard."""

    keys: PackedStrings  # their names, in the order of their first members
    members: np.ndarray  # (n, len(ROLES), 2) int64, offset and size in bytes, `ABSENT` and 0 without a member
    damage: str = ""  # what is wrong with the archive
    repeated: int = 0  # members whose name occurred before; the first of each is used
    used: Mapping[str, int] = field(default_factory=dict)  # ending -> number of images that are used
    unused: Mapping[str, int] = field(default_factory=dict)  # likewise, of samples with another image
    rivals: Sequence[str] = ()  # endings of images that could as well be those of their samples


def cached_path(kind: str, address: str, ending: str = "") -> Path:
    """Return the file of a kind in the cache that belongs to an address; there is one for each."""
    name = hashlib.sha256(address.encode(errors="surrogateescape")).hexdigest()[:32]
    return cache_root() / kind / f"{name}{ending}"


def index_shard(
    path: Path, endings: Endings = UNDERSTOOD, *, address: str | None = None, version: str | None = None
) -> ShardIndex:
    """Read and cache the index of a shard; of a truncated one the readable part is indexed, and `damage` says so.

    It is cached under the `address` and `version`, by default the absolute path, and the shard's size and time of
    change.
    """
    try:
        version = version or _version_of(path)
        index = _as_samples(*_read_headers(path), endings)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    about = {"format": _FORMAT, "endings": endings, "version": version, "index": {
        name: getattr(index, name) for name in ("damage", "repeated", "used", "unused", "rivals")}}  # fmt: skip
    text = "".join(f"{index.keys[number]}\0" for number in range(len(index.keys)))
    content = io.BytesIO()
    np.savez(content, keys=_bytes(text), members=index.members, about=_bytes(json.dumps(about)))
    try:
        write_atomically(cached_path("index", address or str(path.absolute()), ".npz"), content.getvalue())
    except OSError as error:
        _log.info("the index of a shard is not cached: %s", error)
    return index


def local_index(path: Path, endings: Endings) -> ShardIndex | None:
    """Return the cached index of a shard on this machine, or None if there is none of its present version."""
    try:
        return cached_index(str(path.absolute()), endings, _version_of(path))
    except OSError:
        return None


def _version_of(path: Path) -> str:
    status = path.stat()
    return f"{status.st_size} {status.st_mtime_ns}"


def cached_index(address: str, endings: Endings = UNDERSTOOD, version: str | None = None) -> ShardIndex | None:
    """Return the cached index of an address, or None if there is none of this version (None: any), or it is damaged."""
    path = cached_path("index", address, ".npz")
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as content:
            text, members = content["keys"].tobytes(), content["members"]
            about = json.loads(content["about"].tobytes())
        if about["format"] != _FORMAT or Endings(*about["endings"]) != endings:
            return None
        if version is not None and about["version"] != version:
            return None
        keys = text.decode("utf-8", errors="surrogateescape").split("\0")[:-1]
        if members.dtype != np.int64 or members.shape != (len(keys), len(ROLES), 2):
            return None
        os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))
        return ShardIndex(PackedStrings(keys), members, **about["index"])
    # zipfile raises RuntimeError for flags that it takes for encryption, NotImplementedError for unknown compression
    except (OSError, ValueError, KeyError, TypeError, EOFError, RuntimeError, zlib.error, zipfile.BadZipFile):
        return None


def _bytes(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-8", errors="surrogateescape"), dtype=np.uint8)


def _read_headers(path: Path) -> tuple[_Members, str]:
    """Return the members of an archive, and what is wrong with it: "" for nothing."""
    members: _Members = []
    damage, size = "", path.stat().st_size
    try:
        with tarfile.open(path, mode="r:") as archive:
            try:
                for header in archive:
                    if header.size < 0 or archive.offset <= header.offset:  # which would lead backwards
                        damage = f"impossible size of {header.name}"
                    elif header.isreg() and header.offset_data + header.size > size:
                        damage = f"truncated within {header.name}"
                    if damage:
                        break
                    if header.isreg() and not header.issparse():
                        members.append((header.name, header.offset_data, header.size))
                    archive.members = []  # type: ignore[attr-defined]  # it keeps what it has seen: 1 kB a member
            except _BROKEN as error:
                damage = str(error)
            end = archive.offset
    except _BROKEN as error:
        with path.open("rb") as file:
            compressed = file.read(4).startswith((b"\x1f\x8b", b"BZh", b"\xfd7zX", b"\x28\xb5\x2f\xfd"))
        what = ("is compressed, and a compressed tar file has no random access: unpack it to a plain .tar" if compressed
                else "is not a tar file")
        raise DataError(f"{path} {what}: {error}") from error
    if not damage:  # `tarfile` stops without a word at a header that it cannot read; a whole archive ends in zeros
        with path.open("rb") as file:
            file.seek(end)
            block = file.read(_BLOCK)
        damage = f"unreadable header at byte {end}" if any(block) else "" if block else "no end-of-archive mark"
    return members, damage


def _as_samples(members: _Members, damage: str, endings: Endings) -> ShardIndex:
    """Group members into samples, by the naming under which most images have a caption or a label.

    WebDataset's rule, a name ends at its first dot, wins unless another gives more pairs: that is the case where names
    have dots of their own, as in `22.00.jpg`, `22.00.txt`, `22.01.jpg`.
    """
    with_dots = any(name.rpartition("/")[2].count(".") > 1 for name, *_ in members)
    namings = [_grouped(members, words) for words in (_NAMINGS if with_dots else _NAMINGS[:1])]
    samples, repeated = max(namings, key=lambda naming: _score(naming[0], endings)) if with_dots else namings[0]
    used, unused, rivals = Counter[str](), Counter[str](), Counter[str]()
    rows = []
    for sample in samples.values():
        image, *_ = chosen = _chosen(sample, endings)
        spare = [ending for ending in sample if _role(ending, endings)[0] == 0 and ending != image]
        unused.update(spare)
        if image is not None:
            used[image] += 1
            rivals.update(one for one in spare if _role(one, endings) == _role(image, endings))
        rows.append([(ABSENT, 0) if ending is None else sample[ending] for ending in chosen])
    return ShardIndex(
        PackedStrings(samples), np.array(rows, dtype=np.int64).reshape(-1, len(ROLES), 2), damage, repeated,
        dict(used.most_common(9)), dict(unused.most_common(9)), sorted(dict(rivals.most_common(9))),
    )  # fmt: skip


def _grouped(members: _Members, words: int) -> tuple[dict[str, _Sample], int]:
    """Return samples by name, and how many members repeat a name; files whose name starts with a dot are left out."""
    samples: dict[str, _Sample] = {}
    repeated = 0
    for name, offset, size in members:
        folder, slash, file_name = name.removeprefix("./").rpartition("/")
        parts = file_name.split(".")
        split = max(1, len(parts) - words) if words else 1
        if words and _AUXILIARY.intersection(word.lower() for word in parts[1:split]):
            split = 1  # `0.depth.png` is no sample "0.depth"
        ending = ".".join(parts[split:]).lower()
        if not parts[0] or not ending or _role(ending, UNDERSTOOD)[0] is None:
            continue
        sample = samples.setdefault(folder + slash + ".".join(parts[:split]), {})
        repeated += ending in sample
        sample.setdefault(ending, (offset, size))
    return samples, repeated


def _chosen(sample: _Sample, endings: Endings) -> list[str | None]:
    """Return the ending of a sample's member for each role."""
    ranked = sorted((_role(ending, endings)[1], ending) for ending in sample)
    return [next((ending for rank, ending in ranked if rank >= 0 and _role(ending, endings)[0] == role), None)
            for role in range(len(ROLES))]


def _score(samples: Mapping[str, _Sample], endings: Endings) -> tuple[int, int]:
    """Return how many samples have an image with a companion, and if none has, how many have an image."""
    images = [others for image, *others in (_chosen(sample, endings) for sample in samples.values()) if image]
    pairs = sum(map(any, images))
    return pairs, 0 if pairs else len(images)


@functools.lru_cache(maxsize=10_000)
def _role(ending: str, endings: Endings) -> tuple[int | None, int]:
    """Return what a member with this ending is, and how likely it is meant, lowest first; negative: it is not meant."""
    *words, last = ending.split(".")
    role = 0 if last in IMAGE_EXTENSIONS else ROLES.index(last) if last in ROLES[1:] else None
    if role is None:
        return None, -1
    wanted = {0: endings.image, 1: endings.caption, 2: endings.caption}.get(role)
    if wanted is not None and (role == 0 or wanted.rpartition(".")[2] == ROLES[role]):
        return role, 0 if ending == wanted else -1
    if role == 0 and _AUXILIARY.intersection(words):
        return role, -1
    return role, 0 if not words else 1 if _PRIMARY.intersection(words) else 2
