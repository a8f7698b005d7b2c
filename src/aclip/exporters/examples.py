"""What an export is checked with: pictures and captions, real where there are any, else made here."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from PIL import Image

from aclip import rng

CAPTIONS = (
    "a photo of a dog", "two people walk along a beach at sunset", "red apple", "A Drawing of a LIGHTHOUSE on a cliff",
    "it's 12 o'clock, isn't it?", "café 北京 – naïve façade 😀", "",  # noqa: RUF001
    "rock &amp; roll", "“curly quotes” and a cat’s paw", "a very long caption " * 30,  # noqa: RUF001
)
"""Captions that try the tokenizer: cases, accents, emoji, entities, quotes, nothing at all, too much."""


@dataclass(frozen=True)
class Examples:
    """Pictures and captions to compare features on.

    Attributes:
        pictures: in mode RGB. captions: not cleaned.
        origin: where they come from, in a few words.
    """

    pictures: tuple[Image.Image, ...]
    captions: tuple[str, ...]
    origin: str


def made_examples(image_size: tuple[int, int]) -> Examples:
    """Return pictures and captions that are the same everywhere.

    The pictures are coloured clouds, sharp and soft ones: a square twice as large as the input, one much wider and one
    much higher than it, whose margins divide evenly, and a small square, which has to be enlarged.

    Args:
        image_size: (height, width) of the model's input in pixels.
    """
    height, width = image_size
    sizes = ((2 * height, 2 * width), (height, 3 * width), (3 * height, width), (height // 2 + 1, width // 2 + 1))
    pictures = tuple(_cloud(number, *size) for number, size in enumerate(sizes))
    return Examples(pictures, CAPTIONS, f"{len(pictures)} made pictures, {len(CAPTIONS)} captions")


def real_examples(pairs: Sequence[tuple[Image.Image, str]], source: str) -> Examples:
    """Return examples from a source; the captions that try the tokenizer are added."""
    pictures, captions = zip(*pairs, strict=True)
    return Examples(tuple(pictures), (*captions, *CAPTIONS),
                    f"{len(pictures)} pictures of {source} with their captions, {len(CAPTIONS)} more captions")


def _cloud(number: int, height: int, width: int) -> Image.Image:
    draw = partial(rng.generator(0, "export", number).integers, 0, 256, dtype=np.uint8)
    cells = (2 + 3 * number, 3 + 2 * number)
    soft = Image.fromarray(draw((*cells, 3))).resize((width, height), Image.Resampling.BICUBIC)
    return Image.blend(soft, Image.fromarray(draw((height, width, 3))), 0.2)
