"""How much of what a mask keeps lies on the object, over training.

    aclip data fetch tuxpaint
    aclip train --recipe a-clip --model vit-tiny --data emoji:train --epochs 20 --batch-size 64 --save-every 2 \\
                --keep-checkpoints 100 --output runs/kept
    python benchmarks/kept_on_object.py runs/kept

The images of `tuxpaint` are cut out: their alpha channel is the object's true outline. Each is padded to a square,
put on white, resized to the model's input, and masked as in training. For the trained encoder, for the EMA encoder at
every checkpoint of the run, and for the strategies that need no scores, it prints the mean over images of

    on object: the fraction of the kept area that lies on the object
    of object: the fraction of the object's area that is kept

and both for uniform masking, whose expectations are exact, and for the best that blocks of that size can do.
"""

import argparse
import io
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor

from aclip import data, models
from aclip.checkpoint import list_checkpoints, step_of
from aclip.masking import MASKING, MaskingContext, num_keep
from aclip.run_folder import RunFolder


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="tuxpaint:all")
    add_options(parser)
    args = parser.parse_args()
    source = data.open_source(args.data)
    measure(args, (cut_out(source.read(index).image) for index in range(len(source))))


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add what `measure` reads."""
    parser.add_argument("run", type=Path)
    parser.add_argument("--mask-ratio", type=float, default=0.5)
    parser.add_argument("--block-size", type=int, default=2)


def measure(args: argparse.Namespace, images: Iterable[tuple[Image.Image, Image.Image]]) -> None:
    """Print what masks keep of images, each with its object's outline as a white area on black."""
    model = models.load(args.run)
    grid = models.vit_of(models.visual_of(model.model)).grid_size
    normalization = models.preprocess_config(model.model)
    mean, std = (torch.tensor(normalization[key])[:, None, None] for key in ("mean", "std"))
    preprocessed, coverage = [], []
    for colours, outline in images:
        alpha = model.preprocess(outline)[:1] * std[:1] + mean[:1]
        if alpha.max() > 0.5:  # a few stamps are shadows, all but transparent
            preprocessed.append(model.preprocess(colours))
            coverage.append(F.adaptive_avg_pool2d(alpha.clamp(0, 1), grid).flatten())
    pixels, covered = torch.stack(preprocessed), torch.stack(coverage)

    def row(strategy: str, scores: Tensor | None = None) -> tuple[float, float]:
        chosen = MASKING[strategy](args.mask_ratio, block_size=args.block_size)(MaskingContext(
            len(pixels), grid, "cpu", scores, images=pixels,
            seeds=torch.arange(len(pixels)), purpose="kept on object"))
        return fractions(covered, chosen)

    kept = num_keep(args.mask_ratio, grid, args.block_size) / (grid[0] * grid[1])
    table = Table("patches chosen by", "on object", "of object", box=None)
    table.add_row("uniform masking (exact)", f"{covered.mean():.1%}", f"{kept:.1%}")
    for strategy in ("gaussian", "cluster", "edge"):
        table.add_row(strategy, *(f"{part:.1%}" for part in row(strategy)))

    def attentive(scorer: models.LoadedModel) -> list[str]:
        with torch.inference_mode():
            scores = torch.cat([scorer.attention_scores(some) for some in pixels.split(256)])
        return [f"{part:.1%}" for part in row("attentive", scores)]

    table.add_row("attention of the trained encoder, at the end", *attentive(model))
    averaged = RunFolder(args.run).config().recipe.uses_ema
    for checkpoint in list_checkpoints(args.run / "checkpoints") if averaged else ():
        table.add_row(f"attention of the EMA encoder, step {step_of(checkpoint):,}",
                      *attentive(models.load(checkpoint, weights="ema")))
    table.add_row("the outline itself (best possible)", *(f"{part:.1%}" for part in row("attentive", covered)))
    console = Console()
    console.print(f"{len(pixels)} images, {grid[0]} x {grid[1]} patches, {kept:.1%} kept")
    console.print(table)


def cut_out(encoded: bytes) -> tuple[Image.Image, Image.Image]:
    """Return a cut-out image on a white square, and its alpha channel on the same square as an RGB image."""
    image = Image.open(io.BytesIO(encoded)).convert("RGBA")
    side = max(image.size)
    corner = (side - image.width) // 2, (side - image.height) // 2
    colours, outline = Image.new("RGB", (side, side), "white"), Image.new("L", (side, side), 0)
    colours.paste(image, corner, mask=image)
    outline.paste(image.getchannel("A"), corner)
    return colours, outline.convert("RGB")


def fractions(covered: Tensor, keep_indices: Tensor) -> tuple[float, float]:
    """Return the fraction of the kept area on the object and of the object's area kept, means over images.

    Args:
        covered: (B, N) fraction of each patch that the object covers. keep_indices: (B, K) int64.
    """
    on_object = covered.gather(1, keep_indices)
    return float(on_object.mean()), float((on_object.sum(dim=1) / covered.sum(dim=1)).mean())


if __name__ == "__main__":
    main()
