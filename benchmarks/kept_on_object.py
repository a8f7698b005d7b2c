"""How much of what a mask keeps lies on the object, over training.

    aclip data fetch tuxpaint
    aclip train --recipe a-clip --model vit-tiny --data emoji:train --epochs 20 --batch-size 64 --save-every 2 \\
                --set keep_checkpoints=100 --output runs/kept
    .venv/bin/python benchmarks/kept_on_object.py runs/kept

The pictures of `tuxpaint` are cut out: their alpha channel is the object's true outline. Each is padded to a square,
put on white, resized to the model's input, and masked as in training. For the trained encoder, for the EMA encoder at
every checkpoint of the run, and for the strategies that need no scores, it prints the mean over pictures of

    on object: the share of the kept area that lies on the object
    of object: the share of the object's area that is kept

and both for uniform masking, whose expectations are exact, and for the best that blocks of that size can do.
"""

import argparse
import io
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor

from aclip import data, models
from aclip.data.fetch import resolve_spec
from aclip.engine.checkpoint import list_checkpoints, step_of
from aclip.engine.run_config import saved_config
from aclip.masking import MASKING, MaskingContext, num_keep
from aclip.models.averaged import load_average_at
from aclip.run_folder import RunFolder
from scored_run import options


def main() -> None:
    """Measure and print."""
    parser = options(__doc__, "tuxpaint:all")
    add_options(parser)
    args = parser.parse_args()
    source = data.open_source(resolve_spec(args.data))
    measure(args, (cut_out(source.read(index).image) for index in range(len(source))))


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add what `measure` reads, besides `run`."""
    parser.add_argument("--mask-ratio", type=float, default=0.5)
    parser.add_argument("--block-size", type=int, default=2)


def measure(args: argparse.Namespace, pictures: Iterable[tuple[Image.Image, Image.Image]]) -> None:
    """Print what masks keep of pictures, each with its object's outline as a white area on black."""
    model = models.load(args.run)
    visual = models.visual_of(model.model)
    height, width = visual.image_size
    grid = height // visual.conv1.kernel_size[0], width // visual.conv1.kernel_size[1]
    mean, std = (torch.tensor(visual.preprocess_cfg[key])[:, None, None] for key in ("mean", "std"))
    preprocessed, coverage = [], []
    for colours, outline in pictures:
        alpha = model.preprocess(outline)[:1] * std[:1] + mean[:1]
        if alpha.max() > 0.5:  # a few stamps are shadows, all but transparent
            preprocessed.append(model.preprocess(colours))
            coverage.append(F.adaptive_avg_pool2d(alpha.clamp(0, 1), grid).flatten())
    images, covered = torch.stack(preprocessed), torch.stack(coverage)

    def row(strategy: str, scores: Tensor | None = None) -> tuple[float, float]:
        chosen = MASKING[strategy](args.mask_ratio, block_size=args.block_size)(MaskingContext(
            len(images), grid, "cpu", scores, torch.Generator().manual_seed(0), images))
        return shares(covered, chosen)

    kept = num_keep(args.mask_ratio, grid, args.block_size) / (grid[0] * grid[1])
    table = Table("patches chosen by", "on object", "of object", box=None)
    table.add_row("uniform masking (exact)", f"{covered.mean():.1%}", f"{kept:.1%}")
    for strategy in ("gaussian", "cluster", "edge"):
        table.add_row(strategy, *(f"{share:.1%}" for share in row(strategy)))

    def attentive() -> list[str]:
        with torch.inference_mode():
            scores = torch.cat([model.attention_scores(some) for some in images.split(256)])
        return [f"{share:.1%}" for share in row("attentive", scores)]

    table.add_row("attention of the trained encoder, at the end", *attentive())
    averaged = saved_config(RunFolder(args.run)).recipe.uses_ema
    for checkpoint in list_checkpoints(args.run / "checkpoints") if averaged else ():
        load_average_at(visual, checkpoint)
        table.add_row(f"attention of the EMA encoder, step {step_of(checkpoint):,}", *attentive())
    table.add_row("the outline itself (best possible)", *(f"{share:.1%}" for share in row("attentive", covered)))
    console = Console()
    console.print(f"{len(images)} pictures, {grid[0]} x {grid[1]} patches, {kept:.1%} kept")
    console.print(table)


def cut_out(encoded: bytes) -> tuple[Image.Image, Image.Image]:
    """Return a cut-out picture on a white square, and its alpha channel on the same square as an RGB picture."""
    picture = Image.open(io.BytesIO(encoded)).convert("RGBA")
    side = max(picture.size)
    corner = (side - picture.width) // 2, (side - picture.height) // 2
    colours, outline = Image.new("RGB", (side, side), "white"), Image.new("L", (side, side), 0)
    colours.paste(picture, corner, mask=picture)
    outline.paste(picture.getchannel("A"), corner)
    return colours, outline.convert("RGB")


def shares(covered: Tensor, keep_indices: Tensor) -> tuple[float, float]:
    """Return the share of the kept area on the object and of the object's area kept, means over pictures.

    Args:
        covered: (B, N) share of each patch that the object covers. keep_indices: (B, K) int64.
    """
    on_object = covered.gather(1, keep_indices)
    return float(on_object.mean()), float((on_object.sum(dim=1) / covered.sum(dim=1)).mean())


if __name__ == "__main__":
    main()
