"""Captions: read, cleaned, drawn, identified and turned into tokens."""

import hashlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

from jaxtyping import Int
from torch import Tensor

from aclip import rng
from aclip.errors import BadSampleError

MAX_TAGS = 3
"""At most this many tags follow a caption in training."""

MAX_CHARACTERS = 2000
"""Characters of one caption that are tokenised; see `CaptionTokenizer`."""


class DrawnCaption(NamedTuple):
    """One caption, chosen.

    Attributes:
        text: what is tokenised, tags included.
        caption_id: `caption_id` of the caption without its tags.
    """

    text: str
    caption_id: int


def decode_text(data: bytes) -> str:
    """Decode a text file: UTF-8 with or without mark, UTF-16 with one, else Windows-1252."""
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return data.decode("utf-16", errors="replace")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return data.decode("cp1252", errors="replace")


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
    """Return a 63-bit number that two captions share if they differ in case and white space only.

    The first 63 bits of BLAKE2b of the normalised text: the same in every process and release. In a set
    of n captions two different ones collide with a probability of about n^2 / 2^64.
    """
    normalised = " ".join(text.casefold().split())
    digest = hashlib.blake2b(normalised.encode("utf-8", errors="surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def draw_caption(
    captions: Sequence[str], tags: Sequence[str], *, seed: int, epoch: int, sample: int
) -> DrawnCaption:
    """Draw what a picture is paired with in this epoch.

    One of the captions, uniformly. If the picture has tags, half of the time it is followed by one to
    `MAX_TAGS` of them in random order: "red heart, love, emotion".

    Args:
        captions: at least one, as `clean_captions` returns them.
        tags: may be empty; a tag that repeats the caption is not used.
        seed, epoch, sample: what the draw depends on, and nothing else.
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

    A text tower reads T tokens and a word is at least one, so no word after the first T can matter.
    Byte-pair encoding takes time quadratic in the length of a word (a random one of 2,000 letters 0.15 s,
    of 100,000 minutes), so a caption is also cut to `MAX_CHARACTERS`. The tokens of ordinary captions do
    not change; the end-of-text token is where the tokenizer puts it, at the end.

    Attributes:
        context_length: T, tokens per caption.
    """

    def __init__(self, tokenizer: Callable[[list[str]], Tensor]) -> None:
        """Wrap `tokenizer`, which maps n texts to (n, T) integer ids, padded on the right."""
        empty = tokenizer([""])
        self.context_length = int(empty.shape[1])
        self._padding = int(empty[0, -1])
        self._tokenizer = tokenizer

    def __call__(self, texts: Sequence[str]) -> Int[Tensor, "B T"]:
        """Return the (B, T) int64 ids of B texts."""
        return self._tokenizer([self.cap(text) for text in texts]).long()

    def cap(self, text: str) -> str:
        """Return the part of a cleaned caption that is tokenised."""
        return " ".join(text[:MAX_CHARACTERS].split()[: self.context_length])

    def count_truncated(self, tokens: Int[Tensor, "B T"]) -> int:
        """Return how many of the (B, T) rows fill the whole context: nearly all of those lost a tail."""
        return int((tokens[:, -1] != self._padding).sum())
