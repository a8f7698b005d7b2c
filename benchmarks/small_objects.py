"""Small objects in clutter: where there is something for attention to discard.

    aclip data fetch cifar10
    python benchmarks/small_objects.py make FOLDER             20 s: FOLDER/train.tar, FOLDER/test.tar
    aclip compare --data FOLDER/train.tar --validation test=FOLDER/test.tar ...
    python benchmarks/small_objects.py kept RUN                what its masks keep of the test images

Each photo of `cifar10` (32 px) lies at a random place on a canvas of 64 px whose other three quarters are tiles of
8 px cut from other photos, or plain grey (`--plain`). Captions, class and concept are the photo's own. A quarter of
the image is what the caption speaks of, and where it lies is known: `kept` prints what `kept_on_object.py` prints of
cut-out images.
"""

import argparse
import io
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image
from rich.progress import track

from aclip import data, rng
from aclip.data import RawSample
from aclip.data.packing import Sample, write_tar
from kept_on_object import add_options, measure

CANVAS, PHOTO, TILE = 64, 32, 8


def main() -> None:
    """Make the set, or measure what a run keeps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(required=True, dest="verb")
    make, kept = verbs.add_parser("make"), verbs.add_parser("kept")
    make.add_argument("folder", type=Path)
    make.add_argument("--train", type=int, default=10000, help="photos to train on")
    for verb in (make, kept):
        verb.add_argument("--test", type=int, default=2000, help="photos to test on")
        verb.add_argument("--photos", default="cifar10:{split}", help="source of 32 px photos; {split}: train or test")
        verb.add_argument("--plain", action="store_true", help="grey in place of clutter")
    add_options(kept)
    args = parser.parse_args()
    if args.verb == "kept":
        placed_photos = compositions(args.photos, "test", args.test, args.plain)
        measure(args, ((canvas, outline) for _, canvas, outline in placed_photos))
        return
    args.folder.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", args.train), ("test", args.test)):
        with (args.folder / f"{split}.tar").open("wb") as file:
            placed_photos = compositions(args.photos, split, count, args.plain)
            write_tar(file, (stored(raw, canvas) for raw, canvas, _ in placed_photos))


def stored(raw: RawSample, canvas: Image.Image) -> Sample:
    """Return an image as a shard keeps it."""
    png = io.BytesIO()
    canvas.save(png, "PNG")
    facts = {"captions": raw.captions, "label": raw.label, "concept": raw.concept}
    return Sample(raw.name.rpartition("/")[2], {"png": png.getvalue(), "json": json.dumps(facts).encode()})


def compositions(
    source_of: str, split: str, count: int, plain: bool
) -> Iterator[tuple[RawSample, Image.Image, Image.Image]]:
    """Yield photos as the set has them, on their canvas, and where they lie on it, white on black."""
    source = data.open_source(source_of.replace("{split}", split))
    raw = [source.read(number) for number in range(count)]
    photos = np.stack([np.asarray(data.decode_image(sample.image)) for sample in raw])
    for number in track(range(count), f"{split} images"):
        canvas, (top, left) = placed(photos, number, split, plain)
        outline = np.zeros_like(canvas)
        outline[top:top + PHOTO, left:left + PHOTO] = 255
        yield raw[number], Image.fromarray(canvas), Image.fromarray(outline)


def placed(
    photos: UInt8[np.ndarray, "n 32 32 3"], number: int, split: str, plain: bool
) -> tuple[UInt8[np.ndarray, "64 64 3"], tuple[int, int]]:
    """Return photo `number` on its canvas, and the row and column of its corner; a function of the number alone."""
    draw = rng.generator(0, "small objects", split, number)
    if plain:
        canvas = np.full((CANVAS, CANVAS, 3), 128, np.uint8)
    else:
        side = CANVAS // TILE
        others = draw.integers(len(photos), size=side * side)
        corners = draw.integers(PHOTO - TILE + 1, size=(side * side, 2))
        tiles = [photos[other, y:y + TILE, x:x + TILE] for other, (y, x) in zip(others, corners, strict=True)]
        canvas = np.stack(tiles).reshape(side, side, TILE, TILE, 3).swapaxes(1, 2).reshape(CANVAS, CANVAS, 3)
    top, left = (int(place) for place in draw.integers(CANVAS - PHOTO + 1, size=2))
    canvas[top:top + PHOTO, left:left + PHOTO] = photos[number]
    return canvas, (top, left)


if __name__ == "__main__":
    main()
