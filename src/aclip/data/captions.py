"""Captions: read, cleaned, drawn, identified and turned into tokens."""

import codecs
import gzip
import hashlib
import logging
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

from jaxtyping import Int
from torch import Tensor

from aclip import rng
from aclip.errors import BadSampleError, ConfigError, DataError

MAX_TAGS = 3  # at most this many tags follow a caption in training
MAX_CHARACTERS = 2000  # characters of one caption that are tokenised; see `CaptionTokenizer`.


class DrawnCaption(NamedTuple):
    """One caption, chosen."""

    text: str  # what is tokenised, tags included
    caption_id: int  # of the caption without its tags


def decode_text(data: bytes, encoding: str | None = None, fallback: str | None = None) -> str:
    """Decode a text in a known `encoding`, else by its mark, as UTF-8, or in `fallback`, which None guesses."""
    codec = encoding or _marked(data)
    if codec is None:
        codec = "utf-8-sig" if is_utf8(data) else fallback or guess_encoding(data) or "cp1252"
    return data.decode(codec, errors=text_errors(codec))


def find_encoding(path: Path, chosen: str | None = None) -> tuple[str, str]:
    """Return the codec of a text file, and a note if it is not plain UTF-8.

    It is as `chosen`, by its mark, UTF-8, or what most lines beyond ASCII are in. A file put together from several
    often has a few lines of Windows-1252 in UTF-8: only their bytes that are not UTF-8 are read so.

    Raises:
        ConfigError: no such encoding.
        DataError: no encoding fits.
    """
    if chosen is not None:
        try:
            return codecs.lookup(chosen).name, f"read as {chosen}"
        except LookupError as error:
            raise ConfigError(f"'encoding={chosen}' is unknown: write a name such as utf-8, gb18030 or "
                              "shift_jis") from error
    with open_binary(path) as file:
        head = file.read(4096)
        if codec := _marked(head) or _wide(head):
            return codec, ""
        file.seek(0)
        decoder = codecs.getincrementaldecoder("utf-8")()
        try:
            while chunk := file.read(_SAMPLE_BYTES):
                decoder.decode(chunk)
            decoder.decode(b"", final=True)
            return "utf-8-sig", ""
        except UnicodeDecodeError:
            file.seek(0)
        broken, first, sound, odd = bytearray(), 0, 0, 0
        for number, line in enumerate(file, start=1):
            if line.isascii():
                continue
            if is_utf8(line):
                sound += 1
                continue
            odd, first = odd + 1, first or number
            broken += line[: max(0, _SAMPLE_BYTES - len(broken))]
    if sound >= odd:
        return "utf-8-sig", (f"{odd} lines are not UTF-8, the first is line {first}: what is not in them is read as "
                             "Windows-1252")
    guessed = guess_encoding(bytes(broken))
    if guessed is None:
        raise DataError(f"{path} is not UTF-8 and no other encoding fits it: say which with "
                        f"'{path.name}?encoding=NAME'")
    said = "Windows-1252" if guessed == "cp1252" else guessed
    return guessed, f"read as {said}, as it is not UTF-8 ('?encoding=NAME' reads it as another)"


def open_binary(path: Path) -> BinaryIO:
    """Open a file that may be compressed by gzip."""
    with path.open("rb") as file:
        compressed = file.read(2) == b"\x1f\x8b"
    return gzip.open(path) if compressed else path.open("rb")  # type: ignore[return-value]


def guess_encoding(data: bytes) -> str | None:
    """Return the likely codec of text that is not UTF-8, or None if nothing fits.

    In Western European text (Windows-1252) letters beyond ASCII stand alone or in twos among ASCII ones; in Chinese,
    Japanese, Korean or Cyrillic they come in runs, which charset-normalizer tells apart.
    """
    if wide := _wide(data[:4096]):
        return wide
    high = sum(map(len, _HIGH.findall(data)))
    sound = data.decode("utf-8", errors="ignore")
    if sum(len(letter.encode()) for letter in sound if not letter.isascii()) > 0.7 * high:
        return "utf-8-sig"
    if 2 * sum(map(len, _WESTERN.findall(data))) > high:
        return "cp1252"
    from charset_normalizer import from_bytes

    logging.getLogger("charset_normalizer").setLevel(logging.ERROR)
    words = b" ".join(word for word in re.split(rb"[\s,;]", data[:_SAMPLE_BYTES]) if not word.isascii())
    matches = list(from_bytes(words, cp_isolation=_CODECS))
    alike = [match for match in matches if match.percent_chaos <= matches[0].percent_chaos + 5]
    best = max(alike, key=lambda match: (match.percent_coherence, -_CODECS.index(match.encoding)), default=None)
    return None if best is None else str(best.encoding)


def text_errors(codec: str) -> str:
    """Return how bytes that a codec does not know are handled: in UTF-8 they are taken for Windows-1252."""
    return _AS_CP1252 if codec in ("utf-8-sig", "utf-8") else "replace"


def is_utf8(data: bytes) -> bool:
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _marked(data: bytes) -> str | None:
    marks = {codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32",
             codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}  # fmt: skip
    return next((codec for mark, codec in marks.items() if data.startswith(mark)), None)


def _wide(data: bytes) -> str | None:
    """Return the codec of UTF-16 without a mark, in which every second byte of Western text is zero."""
    if data.count(0) <= len(data) // 4:
        return None
    return "utf-16-le" if data[1::2].count(0) > data[::2].count(0) else "utf-16-be"


def _as_cp1252(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    return error.object[error.start : error.end].decode("cp1252", errors="replace"), error.end


_AS_CP1252 = "aclip-cp1252"
codecs.register_error(_AS_CP1252, _as_cp1252)
_SAMPLE_BYTES = 2**18
_HIGH = re.compile(rb"[\x80-\xff]+")
_WESTERN = re.compile(rb"(?<![\x80-\xff])"
                      rb"(?:[\x80-\xff]|(?<=[A-Za-z])[\x80-\xff]{2}|[\x80-\xff]{2}(?=[A-Za-z ]))(?![\x80-\xff])")
_CODECS = ["gb18030", "cp932", "cp949", "big5", "euc_jp", "cp1251", "koi8_r", "cp1253", "cp1254", "cp1255", "cp1256",
           "cp1250", "cp874"]  # fmt: skip


def caption_lines(text: str) -> tuple[str, ...]:
    """Return the captions of a `.txt` file, one a line; a file without any holds one empty caption."""
    return tuple(line for line in text.splitlines() if line.strip()) or ("",)


def clean_captions(captions: Sequence[str]) -> tuple[str, ...]:
    """Return the captions with white space collapsed, halves of surrogate pairs replaced, empty ones dropped.

    Raises:
        BadSampleError: "missing caption" if there were none, "empty caption" if none has a character.
    """
    if not captions:
        raise BadSampleError("missing caption")
    # JSON can hold half a surrogate pair, which no tokenizer and no UTF-8 file takes
    whole = (caption.encode("utf-8", errors="replace").decode("utf-8") for caption in captions)
    cleaned = tuple(text for text in (" ".join(caption.split()) for caption in whole) if text)
    if not cleaned:
        raise BadSampleError("empty caption")
    return cleaned


def caption_id(text: str) -> int:
    """Return 63 bits of BLAKE2b of the normalised text: captions that differ in case and white space share them."""
    normalised = " ".join(text.casefold().split())
    digest = hashlib.blake2b(normalised.encode("utf-8", errors="surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def draw_caption(
    captions: Sequence[str], tags: Sequence[str], *, seed: int, epoch: int, sample: int
) -> DrawnCaption:
    """Draw what an image is paired with in this epoch: one of the captions, at least one, as `clean_captions` returns.

    If the image has tags, half of the time one to `MAX_TAGS` that do not repeat the caption follow in random order:
    "red heart, love, emotion".
    """
    if len(captions) == 1 and not tags:  # nothing to draw
        return DrawnCaption(captions[0], caption_id(captions[0]))
    generator = rng.generator(seed, "caption", epoch, sample)
    caption = captions[int(generator.integers(len(captions)))]
    base = caption_id(caption)
    others = [tag for tag in (" ".join(tag.split()) for tag in tags) if tag and caption_id(tag) != base]
    if others and generator.random() < 0.5:
        count = int(generator.integers(1, min(MAX_TAGS, len(others)) + 1))
        chosen = generator.permutation(len(others))[:count]
        caption = ", ".join([caption, *(others[int(i)] for i in chosen)])
    return DrawnCaption(caption, base)


class CaptionTokenizer:
    """Caps captions before the tokenizer sees them; picklable if the tokenizer is.

    A text tower reads T tokens (`context_length`) and a word is at least one, so no word after the first T can matter.
    Byte-pair encoding takes time quadratic in the length of a word (a random one of 2,000 letters 0.15 s, of 100,000
    minutes), so a caption is also cut to `MAX_CHARACTERS`. The tokens of ordinary captions do not change.
    """

    def __init__(self, tokenizer: Callable[[list[str]], Tensor]) -> None:
        """Wrap `tokenizer`, which maps n texts to (n, T) integer ids, padded on the right."""
        empty = tokenizer([""])
        self.context_length = int(empty.shape[1])
        self._padding = int(empty[0, -1])
        # Where padding is the end token, a full row ends in it, too, and the token before it tells.
        ends_in_padding = int(tokenizer(["a " * (2 * self.context_length)])[0, -1]) == self._padding
        self._last = max(-2, -self.context_length) if ends_in_padding else -1
        self._tokenizer = tokenizer

    def __call__(self, texts: Sequence[str]) -> Int[Tensor, "B T"]:
        """Return the (B, T) int64 ids of B texts."""
        return self._tokenizer([self.cap(text) for text in texts]).long()

    def cap(self, text: str) -> str:
        """Return the part of a cleaned caption that is tokenised."""
        return " ".join(text[:MAX_CHARACTERS].split()[: self.context_length])

    def count_truncated(self, tokens: Int[Tensor, "B T"]) -> int:
        """Return how many of the (B, T) rows fill the whole context: nearly all of those lost a tail."""
        return int((tokens[:, self._last] != self._padding).sum())
