"""Small pictures, and a tokenizer and a view pipeline simple enough to predict."""

import io
import struct
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from aclip import rng
from aclip.data.views import Crop


def encode(image: Image.Image, image_format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def picture(number: int, side: int = 24) -> Image.Image:
    """A noisy picture that is different for every number."""
    pixels = np.random.default_rng(number).integers(0, 256, (side, side, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def captioned_noise(folder: Path, sizes: Sequence[tuple[int, int]]) -> Path:
    """Write an image of noise for each (height, width), with a caption beside it, and return the folder."""
    for number, (height, width) in enumerate(sizes):
        noise = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{number:02}.png")
        (folder / f"{number:02}.txt").write_text(f"noise number {number}\n")
    return folder


def giant_png(width: int = 30000, height: int = 30000) -> bytes:
    """A PNG of a few bytes that claims to be enormous."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


class WordTokenizer:
    """Words to ids below 900, 999 at the end, zeros after it."""

    def __init__(self, context_length: int = 8) -> None:
        self.context_length = context_length

    def __call__(self, texts: list[str]) -> torch.Tensor:
        rows = torch.zeros(len(texts), self.context_length, dtype=torch.int64)
        for row, text in zip(rows, texts, strict=True):
            ids = [1 + rng.stable_hash(word) % 899 for word in text.split()][: self.context_length - 1]
            row[: len(ids) + 1] = torch.tensor([*ids, 999])
        return rows


class WholePicture:
    """The picture resized, with one number drawn: what is random can be told from what is not."""

    names = ("a",)

    def boxes(self, height: int, width: int, **_: int) -> dict[str, tuple[int, int, int, int]]:
        return {"a": (0, 0, height, width)}

    def least_side(self, sizes: Mapping[str, tuple[int, int]]) -> int:
        return 4 * max(map(max, sizes.values()))

    def __call__(
        self,
        image: np.ndarray,
        *,
        seed: int,
        epoch: int,
        sample: int,
        sizes: Mapping[str, tuple[int, int]],
    ) -> dict[str, Crop]:
        height, width = sizes["a"]
        pixels = np.asarray(Image.fromarray(image).resize((width, height))).transpose(2, 0, 1)
        drawn = rng.generator(seed, "test", epoch, sample).random(1, dtype=np.float32)
        return {"a": Crop(pixels, (0, 0, *image.shape[:2]), False, drawn)}
