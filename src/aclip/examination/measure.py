"""Read every sample of a source once, keep a few numbers of each, and find the images that are the same."""

import hashlib
import io
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas
from PIL import ExifTags, Image

from aclip import rng
from aclip.data.sources.base import Source
from aclip.errors import BadSampleError, category

if TYPE_CHECKING:
    from aclip.data.captions import CaptionTokenizer

SAMPLE = {
    "index": np.int64,  # in the source
    "content": np.uint64,  # hash of the file
    "across": np.uint64, "down": np.uint64,  # difference hashes, see `hash_images`
    "bytes": np.int64, "width": np.int32, "height": np.int32,  # of the file; upright, in pixels
    "captions": np.int32,  # number of usable ones
    "decoded": np.bool_, "blank": np.bool_, "dark": np.bool_,  # can be; has one colour; nearly black 16-bit grey
}  # fmt: skip
PRINT_BYTES = 16 * 16 + 2 * 4 * 4  # cells of a fingerprint

_CHUNK = 64  # samples per request to a worker
_DECODED_SIDE = 64  # a JPEG is decoded at the smallest scale that leaves both sides so many pixels
_DARK = 2**13  # of 16 bits: below it, no pixel gets brighter than 31 of 255
_MARGIN = 2.0  # levels of 255 that a cell must be brighter by: in flat areas noise decides about less
_BLANK = 8  # levels of 255


@dataclass(frozen=True)
class Measurements:
    """What was measured of a source."""

    source: Source
    samples: pandas.DataFrame  # in its order, rows of `SAMPLE` and `reason`: why it cannot be used, "" if it can
    captions: pandas.DataFrame  # usable ones: `sample`, the row of its own; `exact`, its `caption_id`; `tokens`
    fingerprints: np.ndarray  # (n, PRINT_BYTES) uint8, see `hash_images`


def measure(source: Source, *, tokenizer: "CaptionTokenizer | None" = None, workers: int = 0, limit: int | None = None,
            advance: Callable[[int], object] = lambda _: None) -> Measurements:
    """Read, hash, decode and tokenise the samples of `source` once each; takes 360 bytes a sample and 20 a caption.

    At most `limit` samples are drawn at random, the same ones each time. `advance` is called with a number of samples
    when they are done.
    """
    from aclip.data.workers import read_ahead

    chosen = np.arange(len(source))
    if limit is not None and len(source) > limit:
        chosen = np.sort(rng.generator(0, "doctor").choice(len(source), size=limit, replace=False))
    chunks = [chosen[first : first + _CHUNK] for first in range(0, len(chosen), _CHUNK)]
    found: list[tuple[pandas.DataFrame, pandas.DataFrame, np.ndarray]] = []
    for number, answer in enumerate(read_ahead(_Measure(source, tokenizer), chunks, workers=workers, prefetch=4)):
        answer[1]["sample"] += number * _CHUNK
        found.append(answer)
        advance(len(answer[0]))
    samples, captions, fingerprints = zip(*found, strict=True)
    return Measurements(source, pandas.concat(samples, ignore_index=True), pandas.concat(captions, ignore_index=True),
                        np.concatenate(fingerprints))


class _Measure:
    """What a worker does: samples, captions and fingerprints of a chunk, as in `Measurements`."""

    def __init__(self, source: Source, tokenizer: "CaptionTokenizer | None") -> None:
        self._source, self._tokenizer = source, tokenizer
        self._padding = None if tokenizer is None else int(tokenizer([""])[0, -1])

    def __call__(self, indices: np.ndarray) -> tuple[pandas.DataFrame, pandas.DataFrame, np.ndarray]:
        from aclip.data.captions import caption_id, clean_captions

        samples: list[dict[str, Any]] = []
        cells = np.zeros((len(indices), 16, 16, 3), np.uint8)
        texts: list[str] = []
        for row, index in enumerate(indices.tolist()):
            sample: dict[str, Any] = dict.fromkeys(SAMPLE, 0) | {"index": index, "reason": ""}
            samples.append(sample)
            try:
                raw = self._source.read(index)
                sample["bytes"] = len(raw.image)
                sample["content"] = int.from_bytes(hashlib.blake2b(raw.image, digest_size=8).digest(), "little")
                try:
                    usable = clean_captions(raw.captions)
                    texts += usable
                    sample["captions"] = len(usable)
                except BadSampleError as error:
                    sample["reason"] = category(error.reason)
                cells[row] = look_at(raw.image, sample)
            except BadSampleError as error:
                sample["reason"] = category(error.reason)  # takes precedence over a missing caption
        captions = pandas.DataFrame({
            "sample": np.repeat(np.arange(len(samples)), [sample["captions"] for sample in samples]),
            "exact": np.array([caption_id(text) for text in texts], np.uint64), "tokens": np.int32(0)})
        if self._tokenizer is not None and texts:
            tokens = self._tokenizer(texts).numpy()
            captions["tokens"] = tokens.shape[1] - np.argmax(tokens[:, ::-1] != self._padding, axis=1)
        frame = pandas.DataFrame({name: np.array([sample[name] for sample in samples], kind)
                                  for name, kind in (SAMPLE | {"reason": object}).items()})
        frame["across"], frame["down"], blank, fingerprints = hash_images(cells)
        frame["blank"] = blank & frame["decoded"] & ~frame["dark"]
        return frame, captions, fingerprints


def look_at(data: bytes, sample: dict[str, Any]) -> np.ndarray:
    """Decode an image, note in its `SAMPLE` what it is, and return (16, 16, 3) uint8 cells of Y, Cb and Cr.

    A JPEG is decoded at the smallest scale that serves, which still reads the whole file: a truncated or damaged one
    is found as at full size.
    """
    from aclip.data.decode import decode_image, grey_peak

    image = decode_image(data, min_side=_DECODED_SIDE)
    is_jpeg = data.startswith(b"\xff\xd8")
    sample["width"], sample["height"] = jpeg_size(data) if is_jpeg else image.size
    sample["decoded"] = True
    sample["dark"] = not is_jpeg and 0 < (grey_peak(data) or 0) < _DARK
    return np.asarray(image.resize((16, 16), Image.Resampling.BILINEAR, reducing_gap=1.0).convert("YCbCr"))


def hash_images(cells: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return what finds images again in another size, format or quality, from the (B, 16, 16, 3) cells of `look_at`.

    Returns:
        (B,) uint64 difference hashes: bit (r, c) says whether cell (r, c) of 8 x 8 is brighter than the next to the
        right, or below; the last cell's next is the first. (B,) whether no cell differs from another by more than 8
        levels of 255: the hashes then say nothing. (B, PRINT_BYTES) uint8: all Y, then 4 x 4 of Cb and of Cr.
    """
    count, luma = len(cells), cells[..., 0]
    chroma = cells[..., 1:].reshape(count, 4, 4, 4, 4, 2).mean(axis=(2, 4)).round().astype(np.uint8)
    parts = [part.reshape(count, -1) for part in (luma, chroma[..., 0], chroma[..., 1])]
    blank = np.max([np.ptp(part, axis=1) for part in parts], axis=0) <= _BLANK
    coarse = luma.reshape(count, 8, 2, 8, 2).mean(axis=(2, 4))
    brighter = (coarse > np.roll(coarse, -1, axis=axis) + _MARGIN for axis in (2, 1))
    across, down = (np.packbits(bits.reshape(count, 64), axis=1).view(np.uint64)[:, 0] for bits in brighter)
    return across, down, blank, np.concatenate(parts, axis=1)


def jpeg_size(data: bytes) -> tuple[int, int]:
    """Return the upright width and height of a JPEG that can be decoded, from its header."""
    with warnings.catch_warnings(), Image.open(io.BytesIO(data), formats=["JPEG"]) as header:
        warnings.simplefilter("ignore")
        width, height = header.size
        try:
            swapped = header.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
        except (OSError, SyntaxError, TypeError, ValueError, KeyError):
            swapped = False  # damaged metadata of a sound image
    return (height, width) if swapped else (width, height)


# Which images of one or several sources are the same, by their bytes or by their looks

RADIUS = 10  # bits of 128 by which the hashes of two copies may differ

# Levels of 255 by which the fingerprints of two copies may differ: brightness on average, any cell's brightness,
# any cell's colour. Wider limits find more strongly compressed copies, and join drawings such as keycap # and *.
LUMA_MEAN, LUMA_MAX, CHROMA_MAX = 4.0, 20, 12

_WINDOW = 64  # neighbours in sorted order that an image is compared with, for each of the bands
_LUMA_CELLS = 16 * 16


def find_duplicates(measured: Sequence[Measurements]) -> tuple[np.ndarray, ...]:
    """Compare all images of all sources with each other; blank and dark ones by their bytes alone.

    Return for each source the (n,) int64 group of every image, -1 if it cannot be decoded: images of one group, in any
    source, have the same bytes or look the same.
    """
    samples = pandas.concat([one.samples for one in measured], ignore_index=True)
    rows = samples.index.to_series()
    first = rows.groupby(samples["content"]).transform("min").to_numpy()  # of the same file
    distinct = np.flatnonzero(samples["decoded"] & (first == rows) & ~samples["blank"] & ~samples["dark"])
    fingerprints = np.concatenate([one.fingerprints for one in measured])[distinct]
    across, down = (samples[name].to_numpy()[distinct] for name in ("across", "down"))
    look_of = rows.to_numpy().copy()
    look_of[distinct] = distinct[look_alikes(across, down, fingerprints)]
    groups = np.where(samples["decoded"], look_of[first], -1)
    return tuple(np.split(groups, np.cumsum([len(one.samples) for one in measured])[:-1]))


def look_alikes(across: np.ndarray, down: np.ndarray, fingerprints: np.ndarray) -> np.ndarray:
    """Return the group of every image: groups are the connected components of pairs that look the same.

    The images are sorted by their hash, rotated so that each of its four 16-bit bands leads once, and each is compared
    with the next 64 that share the band. Hashes across that differ in up to three bits share a band, so a pair
    is missed only where a band has more images than the window. Time and memory grow as n log n and n. Fingerprints
    confirm what the hashes propose; see `hash_images` for both. A group is called by its smallest image, (n,) int64.
    """
    groups = np.arange(len(across), dtype=np.int64)
    for turn in (0, 16, 32, 48):
        turned = (across << np.uint64(turn)) | (across >> np.uint64((64 - turn) % 64))
        order = np.lexsort((down, turned))
        lead = turned[order] >> np.uint64(48)
        for step in range(1, min(_WINDOW, len(order) - 1) + 1):
            at = np.flatnonzero(lead[:-step] == lead[step:])
            if not len(at):
                break
            first, second = order[at], order[at + step]
            apart = groups[first] != groups[second]
            first, second = first[apart], second[apart]
            distance = np.bitwise_count(across[first] ^ across[second]).astype(np.int16)
            distance += np.bitwise_count(down[first] ^ down[second])
            close = distance <= RADIUS
            first, second = _confirmed(first[close], second[close], fingerprints)
            if len(first):
                groups = join_groups(groups, first, second)
    return groups


def _confirmed(first: np.ndarray, second: np.ndarray, fingerprints: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    agree = np.zeros(len(first), dtype=bool)
    for start in range(0, len(first), 4096):
        part = slice(start, start + 4096)
        difference = np.abs(fingerprints[first[part]].astype(np.int16) - fingerprints[second[part]])
        luma, chroma = difference[:, :_LUMA_CELLS], difference[:, _LUMA_CELLS:]
        agree[part] = (luma.mean(1) <= LUMA_MEAN) & (luma.max(1) <= LUMA_MAX) & (chroma.max(1) <= CHROMA_MAX)
    return first[agree], second[agree]


def join_groups(groups: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return `groups`, (n,) int64, the smallest number in each, with those of the pairs (first, second) joined."""
    from scipy.sparse import coo_array  # type: ignore[import-untyped]
    from scipy.sparse.csgraph import connected_components  # type: ignore[import-untyped]

    edges = coo_array((np.ones(len(first)), (groups[first], groups[second])), shape=(len(groups), len(groups)))
    _, labels = connected_components(edges, directed=False)
    _, smallest, inverse = np.unique(labels[groups], return_index=True, return_inverse=True)
    joined: np.ndarray = smallest[inverse]
    return joined
