"""Read every sample of a source once and keep a few numbers of each."""

import hashlib
import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import ExifTags, Image

from aclip import rng
from aclip.data.sources.base import Source
from aclip.errors import BadSampleError, category

if TYPE_CHECKING:
    from aclip.data.captions import CaptionTokenizer

SAMPLE = np.dtype([
    ("index", np.int64), ("content", np.uint64), ("across", np.uint64), ("down", np.uint64), ("bytes", np.int64),
    ("width", np.int32), ("height", np.int32), ("captions", np.int32), ("reason", np.int32), ("decoded", np.bool_),
    ("blank", np.bool_), ("dark", np.bool_),
])
"""What is kept of a sample: its index in the source; a hash of the file; see `hash_images`; file size; upright size in
pixels; number of usable captions; why it cannot be used, an index into `Measurements.reasons` or `GOOD`; whether it
could be decoded, has one colour, is a 16-bit grey image that comes out nearly black."""

CAPTION = np.dtype([("sample", np.int64), ("exact", np.uint64), ("tokens", np.int32)])
"""What is kept of a usable caption: its sample's row; `caption_id`; its length in tokens."""

GOOD = -1

PRINT_BYTES = 16 * 16 + 2 * 4 * 4  # cells of a fingerprint

_CHUNK = 64  # samples per request to a worker
_DECODED_SIDE = 64  # a JPEG is decoded at the smallest scale that leaves both sides so many pixels
_DARK = 2**13  # of 16 bits: below it, no pixel gets brighter than 31 of 255
_SIDE = 16  # cells of the shrunk image
_MARGIN = 2.0  # levels of 255 that a cell must be brighter by: in flat areas noise decides about less
_BLANK = 8  # levels of 255
_TO_YCC = np.array([[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]], np.float32)
_SWAPPED = frozenset({5, 6, 7, 8})  # EXIF orientations that swap width and height


@dataclass(frozen=True)
class Measurements:
    """What was measured of a source.

    Attributes:
        samples: (n,) of `SAMPLE`, in the source's order. captions: (m,) of `CAPTION`, in the samples' order.
        fingerprints: (n, PRINT_BYTES) uint8, see `hash_images`.
        reasons: why samples cannot be used, each once.
    """

    source: Source
    samples: np.ndarray
    captions: np.ndarray
    fingerprints: np.ndarray
    reasons: tuple[str, ...]


def measure(source: Source, *, tokenizer: "CaptionTokenizer | None" = None, workers: int = 0, limit: int | None = None,
            advance: Callable[[int], object] = lambda _: None) -> Measurements:
    """Read, hash, decode and tokenise the samples of `source` once each; takes 360 bytes a sample and 20 a caption.

    Args:
        source: what is measured.
        tokenizer: counts the tokens of captions, up to its context length; None counts none.
        workers: processes; 0 measures in this one.
        limit: measure at most so many samples, drawn at random, the same ones each time.
        advance: called with a number of samples when they are done.
    """
    from aclip.data.workers import read_ahead

    chosen = np.arange(len(source))
    if limit is not None and len(source) > limit:
        chosen = np.sort(rng.generator(0, "doctor").choice(len(source), size=limit, replace=False))
    chunks = [chosen[first : first + _CHUNK] for first in range(0, len(chosen), _CHUNK)]
    samples, fingerprints = np.empty(len(chosen), SAMPLE), np.empty((len(chosen), PRINT_BYTES), np.uint8)
    captions = [np.empty(0, CAPTION)]
    reasons: dict[str, int] = {}
    done = 0
    for chunk in read_ahead(_Measure(source, tokenizer), chunks, workers=workers, prefetch=4):
        for row, reason in chunk.bad.items():
            chunk.samples["reason"][row] = reasons.setdefault(reason, len(reasons))
        chunk.captions["sample"] += done
        captions.append(chunk.captions)
        rows = slice(done, done + len(chunk.samples))
        samples[rows], fingerprints[rows] = chunk.samples, chunk.fingerprints
        done = rows.stop
        advance(len(chunk.samples))
    return Measurements(source, samples, np.concatenate(captions), fingerprints, tuple(reasons))


class _Chunk(NamedTuple):
    """What a worker sends back: as in `Measurements`, rows counted from the chunk's first; row -> reason."""

    samples: np.ndarray
    captions: np.ndarray
    fingerprints: np.ndarray
    bad: dict[int, str]


class _Measure:
    """What a worker does."""

    def __init__(self, source: Source, tokenizer: "CaptionTokenizer | None") -> None:
        self._source, self._tokenizer = source, tokenizer
        self._padding = None if tokenizer is None else int(tokenizer([""])[0, -1])

    def __call__(self, indices: np.ndarray) -> _Chunk:
        from aclip.data.captions import clean_captions

        samples = np.zeros(len(indices), SAMPLE)
        samples["index"], samples["reason"] = indices, GOOD
        shrunk = np.zeros((len(indices), _SIDE, _SIDE, 3), np.uint8)
        bad: dict[int, str] = {}
        texts: list[str] = []
        for row, index in enumerate(indices.tolist()):
            sample = samples[row]
            try:
                raw = self._source.read(index)
                sample["bytes"] = len(raw.image)
                sample["content"] = int.from_bytes(hashlib.blake2b(raw.image, digest_size=8).digest(), "little")
                try:
                    usable = clean_captions(raw.captions)
                    texts += usable
                    sample["captions"] = len(usable)
                except BadSampleError as error:
                    bad[row] = category(error.reason)
                sample["width"], sample["height"], sample["dark"], shrunk[row] = look_at(raw.image)
                sample["decoded"] = True
            except BadSampleError as error:
                bad[row] = category(error.reason)  # takes precedence over a missing caption
        hashes = hash_images(shrunk)
        samples["across"], samples["down"] = hashes.across, hashes.down
        samples["blank"] = hashes.blank & ~samples["dark"]
        owners = np.repeat(np.arange(len(samples)), samples["captions"])
        return _Chunk(samples, self._measure_captions(owners, texts), hashes.fingerprints, bad)

    def _measure_captions(self, owners: np.ndarray, texts: list[str]) -> np.ndarray:
        from aclip.data.captions import caption_id

        captions = np.zeros(len(texts), CAPTION)
        captions["sample"] = owners
        captions["exact"] = np.array([caption_id(text) for text in texts], np.uint64)
        if self._tokenizer is not None and texts:
            tokens = self._tokenizer(texts).numpy()
            captions["tokens"] = tokens.shape[1] - np.argmax(tokens[:, ::-1] != self._padding, axis=1)
        return captions


def look_at(data: bytes) -> tuple[int, int, bool, np.ndarray]:
    """Decode an image; return its upright width and height, whether it is `dark`, and (16, 16, 3) uint8 cells of it.

    A JPEG is decoded at the smallest scale that serves the hashes, which still reads the whole file: a truncated or
    damaged one is found as at full size.

    Raises:
        BadSampleError: it cannot be decoded.
    """
    from aclip.data.decode import decode_image, grey_peak

    image = decode_image(data, min_side=_DECODED_SIDE)
    is_jpeg = data.startswith(b"\xff\xd8")
    width, height = jpeg_size(data) if is_jpeg else image.size
    peak = None if is_jpeg else grey_peak(data)
    dark = peak is not None and 0 < peak < _DARK
    cells = np.asarray(image.resize((_SIDE, _SIDE), Image.Resampling.BILINEAR, reducing_gap=1.0))
    return width, height, dark, cells


def jpeg_size(data: bytes) -> tuple[int, int]:
    """Return the upright width and height of a JPEG that can be decoded, from its header."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(io.BytesIO(data), formats=["JPEG"]) as header:
            width, height = header.size
            try:
                swapped = header.getexif().get(ExifTags.Base.Orientation) in _SWAPPED
            except (OSError, SyntaxError, TypeError, ValueError, KeyError):
                swapped = False  # damaged metadata of a sound image
    return (height, width) if swapped else (width, height)


class ImageHashes(NamedTuple):
    """What is kept of B images, see `hash_images`."""

    across: np.ndarray
    down: np.ndarray
    fingerprints: np.ndarray
    blank: np.ndarray


def hash_images(shrunk: np.ndarray) -> ImageHashes:
    """Return what finds images again in another size, format or quality.

    Args:
        shrunk: (B, 16, 16, 3) uint8 images from `look_at`.

    Returns:
        across, down: (B,) uint64 difference hashes: bit (r, c) says whether cell (r, c) of 8 x 8 is brighter than the
        next to the right, or below; the last cell's next is the first. fingerprints: (B, PRINT_BYTES) uint8, 16 x 16
        cells of brightness, then 4 x 4 of Cb and of Cr (ITU-T T.871, section 7). blank: (B,) whether no cell differs
        from another by more than 8 levels of 255: the hashes then say nothing.
    """
    colours = shrunk.astype(np.float32) @ _TO_YCC.T + np.array([0, 128, 128], np.float32)
    luma = colours[..., 0]
    parts = [luma, _cells(colours[..., 1], 4), _cells(colours[..., 2], 4)]
    prints = [part.reshape(len(shrunk), -1).round().clip(0, 255).astype(np.uint8) for part in parts]
    blank = np.max([np.ptp(part, axis=1) for part in prints], axis=0) <= _BLANK
    coarse = _cells(luma, 8)
    across, down = (_pack_bits(coarse > np.roll(coarse, -1, axis=axis) + _MARGIN) for axis in (2, 1))
    return ImageHashes(across, down, np.concatenate(prints, axis=1), blank)


def _cells(values: np.ndarray, side: int) -> np.ndarray:
    """Return the means of side x side cells of (B, H, H) values."""
    step = values.shape[1] // side
    means: np.ndarray = values.reshape(len(values), side, step, side, step).mean(axis=(2, 4))
    return means


def _pack_bits(bits: np.ndarray) -> np.ndarray:
    return np.packbits(bits.reshape(len(bits), 64), axis=1).view(np.uint64)[:, 0]
