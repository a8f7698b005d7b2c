"""`aclip data pack`: write any source as WebDataset shards of images that are no larger than training needs."""

import errno
import io
import json
import tarfile
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any, NamedTuple

from PIL import Image

from aclip.data.progress import progress
from aclip.data.sources.base import Source
from aclip.data.sources.shard_index import SIZES
from aclip.errors import BadSampleError, ConfigError, DataError
from aclip.files import atomic_file, read_json_lines, write_atomically

SETTINGS, SKIPPED = "pack.json", "skipped.jsonl"
_CHUNK = 50  # samples per request to a worker
_JPEG, _PNG = b"\xff\xd8", b"\x89PNG\r\n\x1a\n"


class Sample(NamedTuple):
    """The name that a sample's members share, without dot and slash, and their bytes by extension."""

    key: str
    members: Mapping[str, bytes]


def pack(source: str | Sequence[str], *, output: str, side: int | None = 336, quality: int = 90, shard_size: int = 1000,
         leave_out: str | None = None, workers: int | None = None) -> Path:
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
    opened, folder = open_training(source), Path(output)
    left = _names_in(leave_out) if leave_out is not None else frozenset()
    samples = write_shards(opened, folder, side=side, quality=quality, shard_size=shard_size, workers=workers,
                           leave_out=left)
    console = Console(soft_wrap=True, highlight=False, markup=False)
    if skipped := len(opened) - len(left) - samples:
        console.print(f"{skipped:,} bad samples were skipped: see {folder / SKIPPED}")
    size = sum(path.stat().st_size for path in folder.glob("*.tar"))
    console.print(f"done. {samples:,} of {len(opened):,} samples, {size / 1e6:,.1f} MB: {output}")
    return folder


def write_shards(source: Source, folder: Path, *, side: int | None = None, quality: int = 90, shard_size: int = 1000,
                 leave_out: Collection[str] = (), workers: int | None = None, keep_names: bool = False) -> int:
    """Write `source` to shards `000000.tar` ... in `folder`, in its order; return the number of samples in them.

    An image that is small enough is copied if it is a JPEG; others are decoded (alpha on white, upright), shrunk and
    encoded as JPEG. Captions, tags, label, concept and name go to a `.json` beside each. Shards appear whole or
    not at all, and a call that was interrupted goes on after the last of them. At the end `sizes.json` holds the number
    of samples in each shard.

    `folder` is new, or of an earlier call with the same source and options; `leave_out` holds names of samples; for
    the other options and errors see `pack`. With `keep_names` the members of a shard are named as the samples, whose
    names have no dot or slash, instead of by number.
    """
    every = range(len(source) if leave_out else 0)
    numbers = {name: index for index in every if (name := source.name(index)) in leave_out}
    if unknown := sorted(set(leave_out) - numbers.keys()):
        raise ConfigError(f"{source.spec} has no sample '{unknown[0]}' to leave out")
    left = set(numbers.values())
    settings = {"source": source.spec, "samples": len(source), "left_out": sorted(left), "side": side,
                "quality": quality, "shard_size": shard_size}
    indices = range(len(source))
    shards = {f"{first // shard_size:06}.tar": [i for i in indices[first : first + shard_size] if i not in left]
              for first in indices[::shard_size]}
    try:
        _check_settings(folder, settings)
        skipped = _skipped_in_finished(folder)
        _write_missing(source, folder, {name: some for name, some in shards.items() if not (folder / name).exists()},
                       skipped, partial(_packed, source, side, quality, keep_names), workers)
        sizes = {name: len(some) - skipped[name] for name, some in shards.items()}
        write_atomically(folder / SIZES, json.dumps(sizes, indent=1) + "\n")
    except OSError as error:
        full = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else str(error.strerror or error)
        raise DataError(f"cannot write to {folder}: {full}; finished shards stay, and the same command continues after "
                        "them") from error
    return sum(sizes.values())


def _write_missing(source: Source, folder: Path, missing: dict[str, list[int]], skipped: Counter[str],
                   packed: Callable[[list[int]], list[Sample | dict[str, str]]], workers: int | None) -> None:
    """Write some shards; name their bad samples in `skipped.jsonl` and count them in `skipped`."""
    from aclip.data.workers import read_ahead
    from aclip.devices import usable_cores

    chunks = {name: [indices[i : i + _CHUNK] for i in range(0, len(indices), _CHUNK)]
              for name, indices in missing.items()}
    answers = read_ahead(packed, chain.from_iterable(chunks.values()),
                         workers=usable_cores() if workers is None else workers)
    with (
        (folder / SKIPPED).open("a") as journal,
        progress(f"packing {source.spec}", sum(map(len, missing.values()))) as advance,
    ):

        def good_samples(name: str) -> Iterator[Sample]:
            for samples in islice(answers, len(chunks[name])):
                for sample in samples:
                    if isinstance(sample, Sample):
                        yield sample
                    else:
                        journal.write(json.dumps({"shard": name, **sample}) + "\n")
                        skipped[name] += 1
                advance(len(samples))

        for name in missing:
            with atomic_file(folder / name) as file:
                write_tar(file, good_samples(name))
                journal.flush()  # before the shard appears: it is counted by what the journal says of it


def _packed(source: Source, side: int | None, quality: int, keep_names: bool, indices: list[int]
            ) -> list[Sample | dict[str, str]]:
    """Return some samples, and for each bad one its name and what is wrong."""
    from aclip.data.captions import clean_captions

    done: list[Sample | dict[str, str]] = []
    for index in indices:
        try:
            raw = source.read(index)
            captions = clean_captions(raw.captions)
            image = shrink(raw.image, side, quality)
        except BadSampleError as error:
            done.append({"key": source.name(index), "reason": error.reason})
            continue
        fields = {"captions": captions, "tags": raw.tags, "label": raw.label, "concept": raw.concept,
                  "key": None if keep_names else raw.name}
        text = json.dumps({name: value for name, value in fields.items() if value})
        ending = "png" if image.startswith(_PNG) else "jpg"
        done.append(Sample(raw.name if keep_names else f"{index:09}", {ending: image, "json": text.encode()}))
    return done


def shrink(data: bytes, side: int | None, quality: int) -> bytes:
    """Return an image file whose shorter side is at most `side`; `data` itself if it is one."""
    from aclip.data.decode import decode_image

    # in any case: what cannot be decoded must not get into a shard
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


def _names_in(path: str) -> frozenset[str]:
    try:
        return frozenset(Path(path).read_text("utf-8", errors="surrogateescape").splitlines())
    except OSError as error:
        raise ConfigError(f"the list of names to leave out, {path}, cannot be read: {error.strerror}") from error


def _check_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Write down what is packed into `folder`, or refuse to mix it with something else."""
    folder.mkdir(parents=True, exist_ok=True)
    earlier = json.loads((folder / SETTINGS).read_bytes()) if (folder / SETTINGS).is_file() else {}
    if not earlier and any(folder.glob("*.tar")):
        raise ConfigError(f"{folder} holds shards that `aclip data pack` did not write: name a new folder")
    changed = [name for name, value in settings.items() if earlier and earlier.get(name) != value]
    if changed:
        raise ConfigError(f"{folder} was begun with another value of {', '.join(changed)}: name a new folder")
    write_atomically(folder / SETTINGS, json.dumps(settings, indent=1) + "\n")


def _skipped_in_finished(folder: Path) -> Counter[str]:
    """Return the number of bad samples in finished shards; drop other lines of the journal, and unfinished files."""
    for part in folder.glob(".*.tar.*.part"):
        part.unlink()
    lines = [line for line in read_json_lines(folder / SKIPPED)[0] if (folder / line["shard"]).exists()]
    write_atomically(folder / SKIPPED, "".join(json.dumps(line) + "\n" for line in lines))
    return Counter(line["shard"] for line in lines)


def write_tar(file: IO[bytes], samples: Iterable[Sample]) -> None:
    """Write the members `key.extension` of samples, in order; the bytes depend on nothing else: no times, no owners."""
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for sample in samples:
            for extension, data in sorted(sample.members.items()):
                member = tarfile.TarInfo(f"{sample.key}.{extension}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
