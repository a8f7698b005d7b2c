"""Where an image answers a text: how often a text's map points at the object that the text names.

    aclip data fetch tuxpaint
    python benchmarks/maps.py make FOLDER                       1 min: FOLDER/scenes.tar, to train on
    aclip train --recipe a-clip --model vit-tiny --data FOLDER/scenes.tar --output RUN ...
    python benchmarks/maps.py measure RUN ...                   new scenes of the same objects

A scene has two cut-out photos of `tuxpaint`, which do not overlap, on a canvas of tiles cut from other photos. Its
captions are the sentences of either and of both. A map is enlarged to the canvas, and printed are, over scenes and
both of their objects,

    points: how often the map's highest pixel lies on the object that the text names
    IoU: of that object's outline and the highest pixels of the map, as many as the object has
    named: how often the map is higher on the object that is named than on the other one (means over their pixels)

for the maps of texts, for attention and a Gaussian at the centre, which know no text, and for random maps. `answers` is
how often the image is more similar to the text of an object in it than to that of an object of another scene: whether
the model knows the objects at all.
"""

import argparse
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, UInt8
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

import aclip
from aclip import data, models, rng
from aclip.data.packing import Sample, write_tar

CANVAS, TILE = 128, 16
SIDES = 48, 64  # of an object's square, pixels


class Scene(NamedTuple):
    """An image with two objects, their outlines and their texts."""

    image: UInt8[np.ndarray, "h w 3"]
    outlines: Bool[np.ndarray, "2 h w"]
    texts: tuple[str, str]


def main() -> None:
    """Make scenes, or measure on others."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", default="tuxpaint:all", help="source of cut-out images")
    parser.add_argument("--objects", type=int, default=24, help="how many of its photos")
    verbs = parser.add_subparsers(required=True, dest="verb")
    make, test = verbs.add_parser("make"), verbs.add_parser("measure")
    make.add_argument("folder", type=Path)
    make.add_argument("--count", type=int, default=5000)
    test.add_argument("runs", nargs="+")
    test.add_argument("--count", type=int, default=500)
    args = parser.parse_args()
    if args.verb == "make":
        args.folder.mkdir(parents=True, exist_ok=True)
        with (args.folder / "scenes.tar").open("wb") as file:
            write_tar(file, (stored(f"{number:06}", scene) for number, scene in
                             enumerate(scenes(args.photos, args.objects, "train", args.count))))
        return
    measure(args.runs, list(scenes(args.photos, args.objects, "test", args.count)))


def stored(name: str, scene: Scene) -> Sample:
    """Return a scene as a shard keeps it."""
    jpeg = io.BytesIO()
    Image.fromarray(scene.image).save(jpeg, "JPEG", quality=90)
    captions = [*scene.texts, " ".join(scene.texts)]
    return Sample(name, {"jpg": jpeg.getvalue(), "json": json.dumps({"captions": captions}).encode()})


def scenes(photos: str, objects: int, split: str, count: int) -> Iterator[Scene]:
    """Yield scenes of some of the source's photos, with sentences of their own, each a function of number and split."""
    source = data.open_source(photos)
    cut_outs: list[Image.Image] = []
    texts: list[str] = []
    for raw in map(source.read, rng.generator(0, "maps").permutation(len(source)).tolist()):
        if raw.label == "drawing" or raw.captions[0] in texts or len(texts) == objects:
            continue
        image = Image.open(io.BytesIO(raw.image)).convert("RGBA")
        image = image.crop(image.getchannel("A").getbbox())
        image.thumbnail((SIDES[1], SIDES[1]), Image.Resampling.LANCZOS)
        if (np.asarray(image)[..., 3] > 128).sum() > 0.1 * SIDES[0] ** 2:
            cut_outs.append(image)
            texts.append(raw.captions[0])
    for number in track(range(count), f"{split} scenes"):
        draw = rng.generator(0, "maps", split, number)
        first, second = (int(one) for one in draw.choice(len(texts), 2, replace=False))
        pixels, outlines = compose([cut_outs[first], cut_outs[second]], clutter(cut_outs, draw), draw)
        yield Scene(pixels, outlines, (texts[first], texts[second]))


def clutter(cut_outs: Sequence[Image.Image], draw: np.random.Generator) -> Image.Image:
    """Return a canvas of tiles from the middles of objects, each on a colour of its own."""
    canvas = Image.new("RGB", (CANVAS, CANVAS))
    for place in range((CANVAS // TILE) ** 2):
        image = cut_outs[int(draw.integers(len(cut_outs)))]
        left, top = ((side - TILE) // 2 + int(draw.integers(-TILE // 2, TILE // 2)) for side in image.size)
        tile = Image.new("RGB", (TILE, TILE), tuple(int(c) for c in draw.integers(256, size=3)))
        tile.paste(image, (-left, -top), image)
        canvas.paste(tile, (place % (CANVAS // TILE) * TILE, place // (CANVAS // TILE) * TILE))
    return canvas


def compose(
    objects: Sequence[Image.Image], canvas: Image.Image, draw: np.random.Generator
) -> tuple[UInt8[np.ndarray, "h w 3"], Bool[np.ndarray, "2 h w"]]:
    """Place two objects so that their squares do not overlap."""
    outlines = np.zeros((2, CANVAS, CANVAS), dtype=bool)
    while True:
        sides = draw.integers(SIDES[0], SIDES[1] + 1, size=2)
        corners = draw.integers(CANVAS - sides + 1, size=(2, 2))
        if (np.abs((corners[0] - corners[1]) + (sides[0] - sides[1]) / 2) >= sides.mean()).any():
            break
    for outline, image, side, corner in zip(outlines, objects, sides, corners, strict=True):
        scale = int(side) / max(image.size)
        resized = image.resize([max(1, round(scale * one)) for one in image.size], Image.Resampling.LANCZOS)
        alpha = Image.new("L", canvas.size)
        left, top = (int(c) + (int(side) - one) // 2 for c, one in zip(corner, resized.size, strict=True))
        canvas.paste(resized, (left, top), resized)
        alpha.paste(resized.getchannel("A"), (left, top))
        outline[:] = np.asarray(alpha) > 127
    return np.asarray(canvas), outlines


@torch.no_grad()
def measure(runs: Sequence[str], shown: Sequence[Scene]) -> None:
    """Print how well the maps of each run find the objects of scenes."""
    table = Table("run", "answers", "map", "points", "IoU", "named", box=None)
    named = torch.from_numpy(np.concatenate([np.stack([scene.outlines[i] for scene in shown]) for i in (0, 1)]))
    others = named.roll(len(shown), 0)
    for run in runs:
        model = aclip.load(run)
        visual, grid = models.visual_of(model.model), models.vit_of(models.visual_of(model.model)).grid_size
        pixels = torch.stack([model.preprocess(Image.fromarray(scene.image)) for scene in shown])
        texts = torch.stack([model.encode_texts([scene.texts[i] for scene in shown]) for i in (0, 1)])
        features = torch.cat([model.encode_image(some) for some in pixels.split(100)])
        answers = ((features * texts).sum(-1) > (features * texts.roll(1, dims=1)).sum(-1)).float().mean()
        attention = torch.cat([model.attention_scores(some) for some in pixels.split(100)])
        both = torch.cat([models.text_maps(visual, one[None], two) for one, two in
                          zip(pixels, texts.transpose(0, 1), strict=True)])  # (B, 2, N)
        draw = torch.Generator().manual_seed(0)
        y, x = (torch.linspace(-1, 1, side) for side in grid)
        maps = {"of the text": both.transpose(0, 1).flatten(0, 1), "attention": attention.repeat(2, 1),
                "centre": -(y[:, None] ** 2 + x ** 2).flatten().expand(len(named), -1),
                "random": torch.rand(len(named), grid[0] * grid[1], generator=draw)}
        for number, (name, one) in enumerate(maps.items()):
            large = F.interpolate(one.reshape(-1, 1, *grid), (CANVAS, CANVAS), mode="bilinear")[:, 0]
            table.add_row("" if number else run, "" if number else f"{answers:.1%}", name,
                          *(f"{value:.1%}" for value in scores(large, named, others)))
    Console().print(table)


def scores(
    maps: Float[Tensor, "n h w"], named: Bool[Tensor, "n h w"], others: Bool[Tensor, "n h w"]
) -> tuple[float, float, float]:
    """Return what the table has of maps: points, IoU, named (ties are half right)."""
    values, right, wrong = maps.flatten(1), named.flatten(1), others.flatten(1)
    points = right.gather(1, values.argmax(dim=1, keepdim=True)).float().mean()
    order = values.argsort(dim=1, descending=True).argsort(dim=1)
    chosen = order < right.sum(dim=1, keepdim=True)
    iou = ((chosen & right).sum(dim=1) / (chosen | right).sum(dim=1)).mean()
    on_right, on_wrong = ((values * part).sum(dim=1) / part.sum(dim=1) for part in (right, wrong))
    return float(points), float(iou), float(((on_right - on_wrong).sign() / 2 + 0.5).mean())


if __name__ == "__main__":
    main()
