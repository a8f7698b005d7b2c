"""What every masking strategy shares: the count of kept patches, blocks, and the context they read."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from aclip import rng
from aclip.errors import ConfigError


def fitting_block_size(block_size: int, grid_size: tuple[int, int]) -> int:
    """Return `block_size` if blocks of that side tile the grid exactly, else 1."""
    height, width = grid_size
    return block_size if height % block_size == 0 and width % block_size == 0 else 1


def share_kept(mask_ratio: float) -> Fraction:
    """Return 1 - mask_ratio without the noise of binary numbers, in which 1 - 0.9 is a little less than a tenth."""
    # floats of decimals and of simple fractions, written or computed (1 - 0.7), are nowhere near 1e-9 from another such
    return 1 - Fraction(mask_ratio).limit_denominator(10**9)


def num_keep(mask_ratio: float, grid_size: int | tuple[int, int], block_size: int = 1) -> int:
    """Return how many patches a view keeps; the one place where a ratio becomes a count.

    kept blocks = floor(blocks * (1 - mask_ratio) + 0.5), at least 1; patches = blocks * block_size^2.
    Where blocks do not tile the grid, single patches are counted (`fitting_block_size`).

    Args:
        mask_ratio: fraction removed, 0 <= mask_ratio < 1.
        grid_size: patches (down, across), or one number for a square grid.
        block_size: side of a block, in patches.

    Raises:
        ConfigError: a ratio outside [0, 1), or a block size below 1.

    >>> num_keep(0.5, 14, block_size=2)   # 25 of 49 blocks
    100
    """
    if not 0.0 <= mask_ratio < 1.0:
        raise ConfigError(f"mask_ratio is the fraction of patches removed, 0 <= ratio < 1, not {mask_ratio}")
    if block_size < 1:
        raise ConfigError(f"block_size is counted in patches, at least 1, not {block_size}")
    height, width = (grid_size, grid_size) if isinstance(grid_size, int) else grid_size
    block = fitting_block_size(block_size, (height, width))
    blocks = (height // block) * (width // block)
    return max(1, math.floor(blocks * share_kept(mask_ratio) + Fraction(1, 2))) * block * block


@dataclass(frozen=True)
class MaskingContext:
    """What a strategy may look at to choose patches for one view of a batch.

    Attributes:
        batch_size: B.
        grid_size: patches (down, across); N = down * across.
        device: where `keep_indices` are wanted.
        scores: (B, N) float, the relevance of each patch, on this view's own grid.
        generator: source of randomness when `seeds` are absent; None is torch's default generator.
        images: (B, 3, h, w) float, normalised, for strategies that look at pixels.
        seeds: (B,) int64; with them every row's draw depends on its own seed and `purpose` alone, so
            that masks do not change with batch size, process count, accumulation or resume.
        purpose: separates the views and passes that share `seeds`.
    """

    batch_size: int
    grid_size: tuple[int, int]
    device: torch.device | str
    scores: Float[Tensor, "B N"] | None = None
    generator: torch.Generator | None = None
    images: Float[Tensor, "B 3 h w"] | None = None
    seeds: Int[Tensor, " B"] | None = None
    purpose: str = "mask"

    def uniform(self, count: int) -> Float[Tensor, "B count"]:
        """Return (B, count) draws in [0, 1), per sample where seeds are known."""
        if self.seeds is not None:
            return rng.uniform(self.seeds, count, self.purpose)
        return torch.rand(self.batch_size, count, device=self.device, generator=self.generator)


class MaskingStrategy(ABC):
    """Chooses the patches that stay.

    Attributes:
        needs_scores: whether `MaskingContext.scores` must be given.
    """

    needs_scores: ClassVar[bool] = False

    def __init__(self, mask_ratio: float = 0.0, *, block_size: int = 1) -> None:
        """Set the fraction removed and the side of a block in patches."""
        num_keep(mask_ratio, 1, block_size)  # the same errors, at construction
        self.mask_ratio = mask_ratio
        self.block_size = block_size

    def num_keep(self, grid_size: tuple[int, int]) -> int:
        """Return K on this grid."""
        return num_keep(self.mask_ratio, grid_size, self.block_size)

    @abstractmethod
    def __call__(self, context: MaskingContext) -> Int[Tensor, "B K"]:
        """Return `keep_indices`: (B, K) int64, ascending, without repeats, CLS not counted."""


def pool_to_blocks(
    scores: Float[Tensor, "B N"], grid_size: tuple[int, int], block_size: int
) -> Float[Tensor, "B M"]:
    """Return the mean score of every block, blocks numbered row by row."""
    if block_size == 1:
        return scores
    height, width = grid_size
    blocks = scores.reshape(-1, height // block_size, block_size, width // block_size, block_size)
    return blocks.mean(dim=(2, 4)).flatten(1)


def best_first(scores: Float[Tensor, "B M"]) -> Int[Tensor, "B M"]:
    """Return indices by falling score; ties go to the lower index, on every device."""
    return scores.argsort(dim=1, descending=True, stable=True)


def kept_blocks_to_patches(
    blocks: Int[Tensor, "B k"], grid_size: tuple[int, int], block_size: int
) -> Int[Tensor, "B K"]:
    """Return the patches of the chosen blocks, ascending; K = k * block_size^2."""
    if block_size == 1:
        return blocks.sort(dim=1).values
    across = grid_size[1]
    row = blocks // (across // block_size) * block_size
    column = blocks % (across // block_size) * block_size
    step = torch.arange(block_size, device=blocks.device)
    rows = row[:, :, None, None] + step[:, None]
    columns = column[:, :, None, None] + step
    return (rows * across + columns).flatten(1).sort(dim=1).values
