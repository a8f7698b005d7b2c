"""A small convolutional net with a bag-of-words text tower on some of the styles of `emoji`: what the data allow.

    aclip data fetch emoji
    python benchmarks/convolutional.py --styles 7             all that are trained on; 10 min on one core

32 px, 1.7 million parameters in the image tower, InfoNCE at batch 128, AdamW at 1e-3, random affine crops, flips and
colours. With fewer styles the number of steps stays. R@1 and R@5 to caption on the held-out splits.
"""

import argparse
import itertools
import math
import re
import time
import zlib

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

import aclip
from aclip import data

SIZE, WIDTH, WORDS, RATE = 32, 192, 8192, 1e-3


def main() -> None:
    """Train, then print the recalls of each held-out split."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="emoji:{split}", help="source; {split}: train, val_vendor, ...")
    parser.add_argument("--validation", nargs="+", default=["val_vendor", "val_concept", "val_both"])
    parser.add_argument("--styles", type=int, default=7, help="train on the first N of the styles, by name")
    parser.add_argument("--steps", type=int, default=1620)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    pixels, captions = read(args.data.format(split="train"), args.styles)
    ids = torch.tensor([zlib.crc32(caption.encode()) for caption in captions])
    image, text = ImageTower().to(memory_format=torch.channels_last), TextTower()
    log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
    optimizer = torch.optim.AdamW([*image.parameters(), *text.parameters(), log_scale], lr=RATE, weight_decay=0.05)
    order, started = torch.randperm(len(pixels)), time.process_time()
    for step in track(range(args.steps), "training"):
        at = step % (len(pixels) // args.batch_size) * args.batch_size
        if at == 0:
            order = torch.randperm(len(pixels))
        rows = order[at : at + args.batch_size]
        cosine = (1 + math.cos(math.pi * step / args.steps)) / 2
        optimizer.param_groups[0]["lr"] = RATE * min(1, (step + 1) / 100) * cosine
        loss = aclip.losses.clip_loss(image(augment(pixels[rows])), text([captions[i] for i in rows.tolist()]),
                                      log_scale.exp(), ids[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    console = Console()
    console.print(f"{len(pixels)} images of {args.styles} styles, loss {loss.item():.2f}, "
                  f"{time.process_time() - started:.0f} s of processor time")
    image.eval()
    for split in args.validation:
        first, fifth = recalls(image, text, *read(args.data.format(split=split)))
        console.print(f"{split}: R@1 {first:.1%}, R@5 {fifth:.1%}")


def read(source: str, styles: int | None = None) -> tuple[UInt8[Tensor, "N 3 h w"], list[str]]:
    """Return the images of a set, small, and their labels; with `styles` only those of its first styles."""
    opened = data.open_training(source)
    samples = [opened.read(i) for i in range(len(opened))]
    style = [sample.name.rpartition("/")[2].removesuffix(f"-{sample.concept}") for sample in samples]
    chosen = sorted(set(style))[:styles]
    samples = [sample for sample, its in zip(samples, style, strict=True) if its in chosen]
    images = [torch.from_numpy(np.array(data.decode_image(sample.image))).permute(2, 0, 1) for sample in samples]
    small = [F.interpolate(one[None].float(), (SIZE, SIZE), mode="bicubic", antialias=True)[0] for one in images]
    return torch.stack(small).clamp(0, 255).byte(), [sample.captions[0] for sample in samples]


class ImageTower(nn.Sequential):
    """Four strided convolutions, each with a residual block: (B, 3, h, w) in [-1, 1] to normalised features."""

    def __init__(self) -> None:
        widths = (3, 48, 96, 192, 256)
        stages = [part for a, b in itertools.pairwise(widths) for part in (convolution(a, b, 2), Residual(b))]
        super().__init__(*stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, WIDTH))

    def forward(self, pixels: Float[Tensor, "B 3 h w"]) -> Float[Tensor, "B D"]:
        x = pixels.contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            for layer in self:
                x = layer(x)
        return F.normalize(x.float(), dim=1)


class Residual(nn.Module):
    """Two convolutions around which the input goes."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(convolution(width, width), nn.Conv2d(width, width, 3, padding=1, bias=False),
                                  nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.body(x))


def convolution(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    """Return a convolution of 3 x 3 with BatchNorm and ReLU."""
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False), nn.BatchNorm2d(outputs),
                         nn.ReLU())


class TextTower(nn.Module):
    """The mean of hashed words, and a residual MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.EmbeddingBag(WORDS, WIDTH, mode="mean")
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, captions: list[str]) -> Float[Tensor, "B D"]:
        bags = [[zlib.crc32(word.encode()) % WORDS for word in re.findall(r"\w+", caption.lower())] or [0]
                for caption in captions]
        starts = torch.tensor([0, *map(len, bags[:-1])]).cumsum(0)
        x = self.words(torch.tensor([word for bag in bags for word in bag]), starts)
        return F.normalize(x + self.mlp(x), dim=1)


def augment(pixels: UInt8[Tensor, "B 3 h w"]) -> Float[Tensor, "B 3 h w"]:
    """Turn, scale, shift, mirror and recolour images on white: to [-1, 1]."""
    def draw(low: float, high: float, *shape: int) -> Tensor:
        return torch.empty(len(pixels), *shape).uniform_(low, high)

    x = (pixels / 255 * draw(0.7, 1.3, 1, 1, 1) * draw(0.8, 1.2, 3, 1, 1)).clamp(0, 1)
    x = torch.where(draw(0, 1, 1, 1, 1) < 0.2, x.mean(dim=1, keepdim=True), x)
    angle, scale, mirror = draw(-0.25, 0.25), draw(0.75, 1.1), draw(-1, 1).sign()
    rows = (torch.stack([scale * angle.cos() * mirror, -scale * angle.sin(), draw(-0.12, 0.12)], 1),
            torch.stack([scale * angle.sin() * mirror, scale * angle.cos(), draw(-0.12, 0.12)], 1))
    grid = F.affine_grid(torch.stack(rows, 1), list(x.shape), align_corners=False)
    return 2 * F.grid_sample(x - 1, grid, align_corners=False) + 1


@torch.no_grad()
def recalls(
    image: nn.Module, text: nn.Module, pixels: UInt8[Tensor, "N 3 h w"], captions: list[str]
) -> tuple[float, float]:
    """Return R@1 and R@5 from image to the distinct captions."""
    every = sorted(set(captions))
    features = torch.cat([image(part / 127.5 - 1) for part in pixels.split(256)])
    nearest = (features @ text(every).T).topk(5).indices
    right = nearest == torch.tensor([every.index(caption) for caption in captions])[:, None]
    return right[:, 0].float().mean().item(), right.any(dim=1).float().mean().item()


if __name__ == "__main__":
    main()
