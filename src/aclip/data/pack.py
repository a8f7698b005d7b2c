"""Write any source as shards of pictures that are no larger than training needs."""

import errno
import io
import json
import os
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image

from aclip.data.captions import clean_captions
from aclip.data.decode import decode_image
from aclip.data.sources.base import RawSample, Source
from aclip.data.sources.shard_index import SIZES
from aclip.data.tar_files import Sample, write_tar
from aclip.data.workers import read_ahead
from aclip.errors import BadSampleError, ConfigError, DataError
from aclip.files import write_atomically

SETTINGS, SKIPPED = "pack.json", "skipped.jsonl"

_CHUNK = 50  # samples that a worker is asked for at a time
_Answer = tuple[int, RawSample | tuple[str, str]]  # a sample packed, or its name and what is wrong with it


@dataclass(frozen=True)
class PackSettings:
    """What determines the content of packed shards, beside the source.

    Attributes:
        side: pixels of a picture's shorter side at most; smaller pictures are not enlarged.
        quality: of JPEG, 1 to 95.
        shard_size: samples of the source in a shard.
    """

    side: int = 336
    quality: int = 90
    shard_size: int = 1000

    def __post_init__(self) -> None:
        for name, least, most in (("side", 1, 16384), ("quality", 1, 95), ("shard_size", 1, 10**7)):
            if not least <= getattr(self, name) <= most:
                raise ConfigError(f"{name} must be {least} to {most}, not {getattr(self, name)}")


@dataclass(frozen=True)
class Packed:
    """What was written.

    Attributes:
        samples: in all shards.
        skipped: bad samples, named in `skipped.jsonl`.
        left_out: samples that were left out on request.
        bytes: size of all shards.
    """

    samples: int
    skipped: int
    left_out: int
    bytes: int


def pack(
    source: Source,
    folder: Path,
    settings: PackSettings,
    *,
    leave_out: Collection[str] = (),
    workers: int = 0,
    progress: Callable[[int], object] = lambda _: None,
) -> Packed:
    """Write `source` to WebDataset shards in `folder`, in its order.

    A JPEG that is small enough is copied as it is; everything else is decoded (alpha on white, upright), shrunk and
    encoded as JPEG. Captions, tags, label and concept go to a `.json` beside each. Shards appear whole or not at
    all, and a call that was interrupted goes on after the last of them; the result does not depend on `workers`.
    `sizes.json` holds the number of samples in each shard.

    Args:
        source: the pairs.
        folder: new, or of an earlier call with the same source and settings.
        settings: of the pictures and shards.
        leave_out: names of samples, as `Source.key` has them, that are not wanted.
        workers: processes that read and encode; 0 does it in this one.
        progress: called with a number of samples of the source when they are done.

    Raises:
        ConfigError: a folder of another source or other settings, or names to leave out that are not in the source.
        DataError: the disk is full or the folder cannot be written; what is whole stays.
    """
    left = sorted(index for index in range(len(source)) if source.key(index) in leave_out) if leave_out else []
    if len(left) < len(set(leave_out)):
        known = {source.key(index) for index in left}
        missing = next(name for name in leave_out if name not in known)
        raise ConfigError(f"{source.name} has no sample '{missing}' that could be left out")
    try:
        return _Packer(source, folder, settings, frozenset(left), workers, progress).run()
    except OSError as error:
        full = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else str(error.strerror)
        raise DataError(f"cannot write to {folder}: {full}; the finished shards stay, and the same call goes on "
                        "after them") from error


class _Packer:
    def __init__(self, source: Source, folder: Path, settings: PackSettings, left: frozenset[int], workers: int,
                 progress: Callable[[int], object]) -> None:
        self._source, self._folder, self._settings = source, folder, settings
        self._left, self._workers, self._progress = left, workers, progress
        starts = range(0, len(source), settings.shard_size)
        self._shards = {f"{number:06}.tar": range(start, min(start + settings.shard_size, len(source)))
                        for number, start in enumerate(starts)}

    def run(self) -> Packed:
        self._folder.mkdir(parents=True, exist_ok=True)
        self._check_settings()
        sizes = {name: n for name, n in _read_json(self._folder / SIZES).items() if (self._folder / name).is_file()}
        skipped = [record for record in _read_lines(self._folder / SKIPPED) if record.get("shard") in sizes]
        self._progress(sum(len(self._shards[name]) for name in sizes))
        missing = {name: self._chunks(indices) for name, indices in self._shards.items() if name not in sizes}
        requests = (chunk for chunks in missing.values() for chunk in chunks)
        answers = read_ahead(_PackSamples(self._source, self._settings), requests, workers=self._workers)
        for name, chunks in missing.items():
            bad: list[dict[str, str]] = []
            sizes[name] = self._write(self._folder / name, islice(answers, len(chunks)), bad)
            self._progress(len(self._shards[name]) - sum(map(len, chunks)))
            skipped += [{"shard": name} | one for one in bad]
            write_atomically(self._folder / SKIPPED, "".join(json.dumps(record) + "\n" for record in skipped))
            write_atomically(self._folder / SIZES, json.dumps(sizes, indent=1) + "\n")
        size = sum((self._folder / name).stat().st_size for name in self._shards)
        return Packed(sum(sizes.values()), len(skipped), len(self._left), size)

    def _chunks(self, indices: range) -> list[list[int]]:
        """Return what a shard is asked for, in order."""
        wanted = [index for index in indices if index not in self._left]
        return [wanted[first : first + _CHUNK] for first in range(0, len(wanted), _CHUNK)]

    def _check_settings(self) -> None:
        """Note what is packed here, or refuse to mix it with something else."""
        wanted = {"source": self._source.name, "samples": len(self._source), "left_out": sorted(self._left),
                  **asdict(self._settings)}
        there = _read_json(self._folder / SETTINGS)
        if not there and any(self._folder.glob("*.tar")):
            raise ConfigError(f"{self._folder} holds shards that were not packed here: name a new folder")
        changed = [name for name, value in wanted.items() if there and there.get(name) != value]
        if changed:
            raise ConfigError(f"{self._folder} was begun with other settings ({', '.join(changed)}): name a new folder")
        write_atomically(self._folder / SETTINGS, json.dumps(wanted, indent=1) + "\n")

    def _write(self, path: Path, answers: Iterator[list[_Answer]], bad: list[dict[str, str]]) -> int:
        """Write one shard, whole or not at all; return its number of samples, and add the bad ones to `bad`."""

        def good() -> Iterator[Sample]:
            for samples in answers:
                for index, sample in samples:
                    if isinstance(sample, tuple):
                        bad.append({"key": sample[0], "reason": sample[1]})
                    else:
                        yield Sample(f"{index:09}", {"jpg": sample.image, "json": json.dumps(_fields(sample)).encode()})
                self._progress(len(samples))

        part = path.with_name(f".{path.name}.part")
        try:
            with part.open("wb") as file:
                written = write_tar(file, good())
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
        return written


class _PackSamples:
    """What a worker does: samples with their pictures encoded anew, or (name, reason) where one is bad."""

    def __init__(self, source: Source, settings: PackSettings) -> None:
        self._source, self._settings = source, settings

    def __call__(self, indices: list[int]) -> list[_Answer]:
        return [(index, self._pack(index)) for index in indices]

    def _pack(self, index: int) -> RawSample | tuple[str, str]:
        try:
            raw = self._source.read(index)
            captions = clean_captions(raw.captions)
            image = shrink(raw.image, self._settings)
        except BadSampleError as error:
            return self._source.key(index), error.reason
        return RawSample(raw.key, image, captions, raw.tags, raw.label, raw.concept)


def shrink(data: bytes, settings: PackSettings) -> bytes:
    """Return a picture's file as a JPEG of the wanted size; `data` itself if it is one.

    Raises:
        BadSampleError: it cannot be decoded.
    """
    # Decoded in any case: what cannot be decoded must not get into a shard. A JPEG comes at a reduced scale, but
    # never with fewer than twice the pixels that are wanted, unless it has them not.
    image = decode_image(data, min_side=2 * settings.side)
    if min(image.size) <= settings.side:
        if data.startswith(b"\xff\xd8"):
            return data
    else:
        scale = settings.side / min(image.size)
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        image = image.resize(size, Image.Resampling.BICUBIC)
    content = io.BytesIO()
    image.save(content, "JPEG", quality=settings.quality)
    return content.getvalue()


def _fields(sample: RawSample) -> dict[str, Any]:
    fields: dict[str, Any] = {"captions": sample.captions, "tags": sample.tags, "label": sample.label,
                              "concept": sample.concept}
    return {name: value for name, value in fields.items() if value} | {"key": sample.key}


def _read_json(path: Path) -> dict[str, Any]:
    """Return the object in a file of an earlier call; nothing if it is not there or damaged."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _read_lines(path: Path) -> Iterator[dict[str, Any]]:
    if path.is_file():
        for line in path.read_text().splitlines():
            record = json.loads(line)
            if isinstance(record, dict):
                yield record
