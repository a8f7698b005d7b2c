"""Read every sample of a source once and keep a few numbers of each."""

import hashlib
import io
import re
import tempfile
import unicodedata
import warnings
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from aclip import rng
from aclip.data.captions import CaptionTokenizer, caption_id, clean_captions
from aclip.data.decode import FORMATS, decode_image
from aclip.data.doctor.picture_hash import DECODED_SIDE, PRINT_BYTES, SHRUNK, hash_pictures, shrink
from aclip.data.sources.base import Source
from aclip.data.workers import read_ahead
from aclip.errors import BadSampleError, category

SAMPLE = np.dtype([
    ("index", np.int64), ("content", np.uint64), ("across", np.uint64), ("down", np.uint64), ("bytes", np.int64),
    ("width", np.int32), ("height", np.int32), ("captions", np.int32), ("empty_captions", np.int32),
    ("reason", np.int16), ("decoded", np.bool_), ("blank", np.bool_),
])
"""What is kept of a sample: its number in the source; a hash of the file; see `PictureHashes`; the upright size in
pixels; usable and empty captions; why it cannot be used, a number in `Measurements.reasons`, or `GOOD`."""

CAPTION = np.dtype([("sample", np.int64), ("exact", np.uint64), ("loose", np.uint64), ("tokens", np.int32)])
"""What is kept of a usable caption: its sample's row; `caption_id`; `loose_caption`; its length in tokens."""

GOOD = -1

_CHUNK = 64  # samples that a worker is asked for at a time
_REMEMBERED = 50_000  # captions of which a worker remembers what it measured
_SWAPPED = frozenset({5, 6, 7, 8})  # EXIF orientations that swap width and height
_ORIENTATION_TAG = 0x0112


@dataclass(frozen=True)
class Measurements:
    """What was measured of a source.

    Attributes:
        source: the source.
        samples: (n,) of `SAMPLE`, in the source's order.
        captions: (m,) of `CAPTION`, in the samples' order.
        fingerprints: (n, PRINT_BYTES) uint8 on disk, see `PictureHashes`.
        reasons: why samples cannot be used, each once.
    """

    source: Source
    samples: np.ndarray
    captions: np.ndarray
    fingerprints: np.ndarray
    reasons: tuple[str, ...]


def measure(
    source: Source,
    *,
    tokenizer: CaptionTokenizer | None = None,
    workers: int = 0,
    limit: int | None = None,
    scratch: Path | None = None,
    progress: Callable[[int], object] = lambda _: None,
) -> Measurements:
    """Measure the samples of `source`: read, hash, decode and tokenise each once.

    Kept in memory are about 70 bytes a sample and 28 a caption, and on disk 288 bytes a sample.

    Args:
        source: what is measured.
        tokenizer: counts the tokens of captions, as far as its context goes; None counts none.
        workers: processes; 0 measures in this one.
        limit: measure so many samples at most, drawn at random, the same ones each time.
        scratch: folder of a temporary file; the system's by default.
        progress: called with a number of samples when they are done.
    """
    chosen = np.arange(len(source))
    if limit is not None and len(source) > limit:
        chosen = np.sort(rng.generator(0, "doctor").choice(len(source), size=limit, replace=False))
    reasons: dict[str, int] = {}
    samples, captions = array("b"), array("b")
    chunks = (chosen[first : first + _CHUNK] for first in range(0, len(chosen), _CHUNK))
    with tempfile.TemporaryFile(dir=scratch) as file:
        done = 0
        for answer in read_ahead(MeasureChunk(source, tokenizer), chunks, workers=workers, prefetch=4):
            for row, reason in answer.bad.items():
                answer.samples["reason"][row] = reasons.setdefault(reason, len(reasons))
            answer.captions["sample"] += done
            samples.frombytes(answer.samples.tobytes())
            captions.frombytes(answer.captions.tobytes())
            file.write(answer.fingerprints.tobytes())
            done += len(answer.samples)
            progress(len(answer.samples))
        file.flush()
        # The map keeps the file's content after its name and handle are gone.
        fingerprints = np.memmap(file, dtype=np.uint8, mode="r", shape=(done, PRINT_BYTES))
    return Measurements(source, np.frombuffer(samples, SAMPLE), np.frombuffer(captions, CAPTION), fingerprints,
                        tuple(reasons))


@dataclass(frozen=True)
class Chunk:
    """What a worker sends back: as in `Measurements`, rows counted from the chunk's first; row -> reason."""

    samples: np.ndarray
    captions: np.ndarray
    fingerprints: np.ndarray
    bad: dict[int, str]


class MeasureChunk:
    """What a worker does for some samples; picklable if the source and the tokenizer are."""

    def __init__(self, source: Source, tokenizer: CaptionTokenizer | None) -> None:
        """Measure samples of `source`; without a tokenizer, captions are not counted in tokens."""
        self._source = source
        self._tokenizer = tokenizer
        self._padding = None if tokenizer is None else int(tokenizer([""])[0, -1])
        # of captions seen lately, as templates and class names come again and again: "exact", "loose", "tokens"
        self._known: dict[str, tuple[int, int, int]] = {}

    def __call__(self, indices: np.ndarray) -> Chunk:
        """Measure the samples `indices`."""
        samples = np.zeros(len(indices), SAMPLE)
        samples["index"], samples["reason"] = indices, GOOD
        shrunk = np.zeros((len(indices), *SHRUNK), np.uint8)
        bad: dict[int, str] = {}
        owners: list[int] = []
        texts: list[str] = []
        for row, index in enumerate(indices.tolist()):
            usable: tuple[str, ...] = ()
            try:
                raw = self._source.read(index)
                samples["bytes"][row] = len(raw.image)
                samples["content"][row] = _hash(raw.image)
                try:
                    usable = clean_captions(raw.captions)
                except BadSampleError as error:
                    bad[row] = error.reason
                samples["captions"][row], samples["empty_captions"][row] = len(usable), len(raw.captions) - len(usable)
                samples["width"][row], samples["height"][row], shrunk[row] = look_at(raw.image)
                samples["decoded"][row] = True
            except BadSampleError as error:
                bad[row] = category(error.reason)  # weighs more than a missing caption
            owners += [row] * len(usable)
            texts += usable
        hashes = hash_pictures(shrunk)
        samples["across"], samples["down"], samples["blank"] = hashes.across, hashes.down, hashes.blank
        return Chunk(samples, self._measure_captions(owners, texts), hashes.fingerprints, bad)

    def _measure_captions(self, owners: list[int], texts: list[str]) -> np.ndarray:
        captions = np.zeros(len(texts), CAPTION)
        captions["sample"] = owners
        if len(self._known) > _REMEMBERED:
            self._known.clear()
        new = [text for text in dict.fromkeys(texts) if text not in self._known]
        lengths = [0] * len(new)
        if self._tokenizer is not None and new:
            tokens = self._tokenizer(new).numpy()
            lengths = (tokens.shape[1] - np.argmax(tokens[:, ::-1] != self._padding, axis=1)).tolist()
        for text, length in zip(new, lengths, strict=True):
            self._known[text] = caption_id(text), loose_caption(text), length
        known = [self._known[text] for text in texts]
        for name, values in zip(("exact", "loose", "tokens"), zip(*known, strict=True), strict=False):
            captions[name] = values
        return captions


def look_at(data: bytes) -> tuple[int, int, np.ndarray]:
    """Decode a picture; return its upright width and height, and it shrunk for `hash_pictures`.

    A JPEG is decoded at the smallest scale that serves the hashes. All of its file is read for that: one that is
    cut off or damaged is found as at full size.

    Raises:
        BadSampleError: it cannot be decoded.
    """
    image = decode_image(data, min_side=DECODED_SIDE)
    width, height = jpeg_size(data) if data.startswith(b"\xff\xd8") else image.size
    return width, height, shrink(image)


def jpeg_size(data: bytes) -> tuple[int, int]:
    """Return the upright width and height in the header of a JPEG that can be decoded."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(io.BytesIO(data), formats=FORMATS[:1]) as header:
            width, height = header.size
            try:
                swapped = header.getexif().get(_ORIENTATION_TAG) in _SWAPPED
            except (OSError, SyntaxError, TypeError, ValueError, KeyError):
                swapped = False  # damaged metadata around a sound picture
    return (height, width) if swapped else (width, height)


def loose_caption(text: str) -> int:
    """Return a 64-bit number that captions share if they differ in case, accents, punctuation, digits or order.

    "Two dogs, 1 cat!" and "2 cat: Two dogs" share theirs.
    """
    plain = unicodedata.normalize("NFKD", text.casefold())
    plain = "".join(letter for letter in plain if not unicodedata.combining(letter))
    words = sorted(_DIGITS.sub("0", word) for word in _WORDS.findall(plain))
    # A caption of signs alone, such as "!!!", stands for itself.
    joined = " ".join(words) or text
    return _hash(joined.encode("utf-8", errors="surrogatepass"))


def _hash(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


_WORDS = re.compile(r"\w+")
_DIGITS = re.compile(r"\d+")
