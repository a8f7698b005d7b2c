"""`aclip data pack`: write any source as WebDataset shards of images that are no larger than training needs."""

import errno
import io
import json
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image

from aclip.data.progress import progress
from aclip.data.sources.base import RawSample, Source
from aclip.data.tar_files import Sample, write_tar
from aclip.errors import BadSampleError, ConfigError, DataError
from aclip.files import atomic_file, write_atomically

SETTINGS, SIZES, SKIPPED = "pack.json", "sizes.json", "skipped.jsonl"

_JOURNAL = ".finished.jsonl"  # a line per shard, until `sizes.json` takes its place
_CHUNK = 50  # samples per request to a worker
_JPEG, _PNG = b"\xff\xd8", b"\x89PNG\r\n\x1a\n"
_Answer = tuple[int, RawSample | tuple[str, str]]  # a sample with its image encoded, or its name and what is wrong


@dataclass(frozen=True)
class Packed:
    """What `write_shards` wrote: samples, bad samples (named in `skipped.jsonl`), and the bytes of all shards."""

    samples: int
    skipped: int
    bytes: int


def pack(
    source: str | Sequence[str],
    *,
    output: str,
    side: int | None = 336,
    quality: int = 90,
    shard_size: int = 1000,
    leave_out: str | None = None,
    workers: int | None = None,
) -> Path:
    """Write a source as WebDataset shards whose images are shrunk to what training needs.

    Bad samples are left out and named in `skipped.jsonl`. An interrupted call is continued by the next one. The
    source is never changed.

    Args:
        source: pairs of any kind that training takes; several are written one after the other.
        output: folder of the shards.
        side: shorter side of an image in pixels, at most; 1.5 times the model's input leaves crops their detail, None
            keeps JPEG and PNG files as they are.
        quality: JPEG quality, 1 to 95.
        shard_size: samples per shard.
        leave_out: file with the names of samples to leave out, one a line, as `aclip data doctor --fix` writes them.
        workers: processes that read and encode (default: one per core).

    Returns:
        The folder.

    Raises:
        ConfigError: an option out of range, a folder of another source or other options, or names to leave out that
            are not in the source.
        DataError: the disk is full or the folder cannot be written; finished shards stay.
    """
    from rich.console import Console

    from aclip.data.sources import open_training, weights_of

    if not source or any(weights_of(source)):
        raise ConfigError("name what to pack, without weights: `aclip data pack SOURCE --output FOLDER`")
    for name, value, least, most in (("side", side, 1, 16384), ("quality", quality, 1, 95),
                                     ("shard_size", shard_size, 1, 10**7), ("workers", workers, 0, 1024)):
        if value is not None and not least <= value <= most:
            raise ConfigError(f"{name} must be {least} to {most}, not {value}")
    opened = open_training(source)
    folder = Path(output)
    packed = write_shards(opened, folder, side=side, quality=quality, shard_size=shard_size, workers=workers,
                          leave_out=_read_names(leave_out) if leave_out is not None else ())
    console = Console(soft_wrap=True, highlight=False, markup=False)
    if packed.skipped:
        console.print(f"{packed.skipped:,} bad samples were skipped: see {folder / SKIPPED}")
    console.print(f"done. {packed.samples:,} of {len(opened):,} samples, {packed.bytes / 1e6:,.1f} MB: {output}")
    return folder


def write_shards(
    source: Source,
    folder: Path,
    *,
    side: int | None = None,
    quality: int = 90,
    shard_size: int = 1000,
    leave_out: Collection[str] = (),
    workers: int | None = None,
    keep_names: bool = False,
) -> Packed:
    """Write `source` to shards `000000.tar` ... in `folder`, in its order.

    An image that is small enough is copied if it is a JPEG; others are decoded (alpha on white, upright), shrunk and
    encoded as JPEG. Captions, tags, label, concept and name go to a `.json` beside each. Shards appear whole or
    not at all, and a call that was interrupted goes on after the last of them; the result does not depend on
    `workers`. At the end `sizes.json` holds the number of samples in each shard.

    Args:
        source: the pairs.
        folder: new, or of an earlier call with the same source and options.
        side, quality, shard_size, workers: see `pack`.
        leave_out: names of samples.
        keep_names: name the members of a shard as the samples, whose names have no dot or slash, instead of by number.

    Raises:
        ConfigError: a folder of another source or other options, or names to leave out that are not in the source.
        DataError: the disk is full or the folder cannot be written; finished shards stay.
    """
    from aclip.data.workers import read_ahead
    from aclip.devices import usable_cores

    left = _find(source, leave_out)
    settings = {"source": source.spec, "samples": len(source), "left_out": sorted(left), "side": side,
                "quality": quality, "shard_size": shard_size}
    shards = {f"{first // shard_size:06}.tar": range(first, min(first + shard_size, len(source)))
              for first in range(0, len(source), shard_size)}
    try:
        _check_settings(folder, settings)
        sizes, skipped = _finished(folder)
        missing = {name: [index for index in indices if index not in left]
                   for name, indices in shards.items() if name not in sizes}
        requests = (chunk for indices in missing.values() for chunk in _chunks(indices))
        answers = read_ahead(_PackSamples(source, side, quality), requests,
                             workers=usable_cores() if workers is None else workers)
        with (
            (folder / _JOURNAL).open("a") as journal,
            (folder / SKIPPED).open("a") as skips,
            progress(f"packing {source.spec}", sum(map(len, missing.values()))) as advance,
        ):
            for name, indices in missing.items():
                bad: list[tuple[str, str]] = []
                samples = _good(islice(answers, len(_chunks(indices))), bad, advance)
                with atomic_file(folder / name) as file:
                    sizes[name] = write_tar(file, (_shard_sample(*sample, keep_names) for sample in samples))
                for sample_name, reason in bad:
                    skips.write(json.dumps({"shard": name, "key": sample_name, "reason": reason}) + "\n")
                skips.flush()
                journal.write(json.dumps({"shard": name, "samples": sizes[name]}) + "\n")
                journal.flush()
                skipped += len(bad)
        write_atomically(folder / SIZES, json.dumps({name: sizes[name] for name in shards}, indent=1) + "\n")
        (folder / _JOURNAL).unlink()
        size = sum((folder / name).stat().st_size for name in shards)
    except OSError as error:
        full = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else str(error.strerror or error)
        raise DataError(f"cannot write to {folder}: {full}; finished shards stay, and the same command continues after "
                        "them") from error
    return Packed(sum(sizes[name] for name in shards), skipped, size)


class _PackSamples:
    """What a worker does."""

    def __init__(self, source: Source, side: int | None, quality: int) -> None:
        self._source, self._side, self._quality = source, side, quality

    def __call__(self, indices: list[int]) -> list[_Answer]:
        return [(index, self._pack(index)) for index in indices]

    def _pack(self, index: int) -> RawSample | tuple[str, str]:
        from aclip.data.captions import clean_captions

        try:
            raw = self._source.read(index)
            captions = clean_captions(raw.captions)
            image = shrink(raw.image, self._side, self._quality)
        except BadSampleError as error:
            return self._source.name(index), error.reason
        return RawSample(raw.name, image, captions, raw.tags, raw.label, raw.concept)


def shrink(data: bytes, side: int | None, quality: int) -> bytes:
    """Return an image file whose shorter side is at most `side`; `data` itself if it is one.

    Raises:
        BadSampleError: it cannot be decoded.
    """
    from aclip.data.decode import decode_image

    # Decoded in any case: what cannot be decoded must not get into a shard. A JPEG is decoded at reduced scale, but
    # never below twice the target side.
    image = decode_image(data, min_side=None if side is None else 2 * side)
    if side is None or min(image.size) <= side:
        if data.startswith(_JPEG) or (side is None and data.startswith(_PNG)):
            return data
    else:
        scale = side / min(image.size)
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        image = image.resize(size, Image.Resampling.BICUBIC)
    content = io.BytesIO()
    image.save(content, "JPEG", quality=quality)
    return content.getvalue()


def _good(
    answers: Iterator[list[_Answer]], bad: list[tuple[str, str]], advance: Callable[[int], None]
) -> Iterator[tuple[int, RawSample]]:
    """Yield number and sample of the good ones, and add name and reason of the others to `bad`."""
    for samples in answers:
        for index, sample in samples:
            if isinstance(sample, RawSample):
                yield index, sample
            else:
                bad.append(sample)
        advance(len(samples))


def _shard_sample(index: int, sample: RawSample, keep_names: bool) -> Sample:
    fields: dict[str, Any] = {"captions": sample.captions, "tags": sample.tags, "label": sample.label,
                              "concept": sample.concept, "key": None if keep_names else sample.name}
    text = json.dumps({name: value for name, value in fields.items() if value})
    ending = "png" if sample.image.startswith(_PNG) else "jpg"
    return Sample(sample.name if keep_names else f"{index:09}", {ending: sample.image, "json": text.encode()})


def _chunks(indices: list[int]) -> list[list[int]]:
    return [indices[first : first + _CHUNK] for first in range(0, len(indices), _CHUNK)]


def _read_names(path: str) -> frozenset[str]:
    try:
        return frozenset(Path(path).read_text("utf-8", errors="surrogateescape").splitlines())
    except OSError as error:
        raise ConfigError(f"the list of names to leave out, {path}, cannot be read: {error.strerror}") from error


def _find(source: Source, names: Collection[str]) -> frozenset[int]:
    """Return the numbers of the samples with these names."""
    found = {source.name(index): index for index in range(len(source)) if source.name(index) in names} if names else {}
    missing = next((name for name in names if name not in found), None)
    if missing is not None:
        raise ConfigError(f"{source.spec} has no sample '{missing}' to leave out")
    return frozenset(found.values())


def _check_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Write down what is packed into `folder`, or refuse to mix it with something else."""
    folder.mkdir(parents=True, exist_ok=True)
    earlier = _read_object(folder / SETTINGS)
    if not earlier and any(folder.glob("*.tar")):
        raise ConfigError(f"{folder} holds shards that `aclip data pack` did not write: name a new folder")
    changed = [name for name, value in settings.items() if earlier and earlier.get(name) != value]
    if changed:
        raise ConfigError(f"{folder} was begun with another value of {', '.join(changed)}: name a new folder")
    write_atomically(folder / SETTINGS, json.dumps(settings, indent=1) + "\n")


def _finished(folder: Path) -> tuple[dict[str, int], int]:
    """Return the sizes of finished shards and how many bad samples they had; drop other lines of the journals."""
    sizes = {name: samples for name, samples in _read_object(folder / SIZES).items() if isinstance(samples, int)}
    sizes |= {line["shard"]: line["samples"] for line in _read_lines(folder / _JOURNAL)}
    sizes = {name: samples for name, samples in sizes.items() if (folder / name).is_file()}
    skipped = [line for line in _read_lines(folder / SKIPPED) if line.get("shard") in sizes]
    lines = [{"shard": name, "samples": samples} for name, samples in sizes.items()]
    for part in folder.glob(".*.tar.*.part"):  # of a call that was killed
        part.unlink()
    for path, kept in ((folder / SKIPPED, skipped), (folder / _JOURNAL, lines)):
        write_atomically(path, "".join(json.dumps(line) + "\n" for line in kept))
    return sizes, len(skipped)


def _read_object(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; an empty one if the file is missing or damaged."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects in a file of JSON lines, without a last line that was cut off."""
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        try:
            yield json.loads(line)
        except ValueError:
            continue
