"""A source of one's own: image-text pairs from anywhere, here drawn by the script.

    python docs/examples/own_source.py runs/squares
"""

import io
import sys

from PIL import Image

import aclip
from aclip.data import RawSample, Source

COLOURS = ("red", "green", "blue", "white", "black", "orange", "purple", "brown")


class Squares(Source):
    """Squares of one colour, `count` of them."""

    def __init__(self, count: str) -> None:
        self.count = int(count)
        self.spec = f"squares:{count}"

    def __len__(self) -> int:
        return self.count

    def read(self, index: int) -> RawSample:
        """Return the image file's bytes and the captions of a sample."""
        file = io.BytesIO()
        Image.new("RGB", (64, 64), COLOURS[index % len(COLOURS)]).save(file, "PNG")
        return RawSample(self.name(index), file.getvalue(), self.captions(index))

    def captions(self, index: int) -> tuple[str, ...]:
        """Return the captions without reading the image."""
        return (f"a {COLOURS[index % len(COLOURS)]} square",)

    def name(self, index: int) -> str:
        """Return the sample's unique name."""
        return f"square {index}"


aclip.SOURCES["squares"] = Squares  # opened by "squares:COUNT"

if __name__ == "__main__":
    aclip.train(recipe="clip", model="vit-micro", data="squares:64", output=sys.argv[1], epochs=2, batch_size=8)
