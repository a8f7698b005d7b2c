"""What every masking strategy shares: the number of kept patches, blocks, and the context a strategy reads."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from aclip import rng
from aclip.errors import ConfigError


def fitting_block_size(block_size: int, grid_size: tuple[int, int]) -> int:
    """Return `block_size` if blocks of that side tile the grid exactly, else 1."""
    return block_size if all(side % block_size == 0 for side in grid_size) else 1


def num_keep(mask_ratio: float, grid_size: int | tuple[int, int], block_size: int = 1) -> int:
    """Return how many patches of a view are kept.

    kept blocks = floor(blocks * (1 - mask_ratio) + 0.5), at least 1; patches = blocks * block_size^2.
    Where blocks do not tile the grid, single patches are counted (`fitting_block_size`).

    Args:
        mask_ratio: fraction removed, in [0, 1).
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
    grid = (grid_size, grid_size) if isinstance(grid_size, int) else grid_size
    block = fitting_block_size(block_size, grid)
    blocks = math.prod(grid) // block**2
    return max(1, math.floor(blocks * keep_fraction(mask_ratio) + Fraction(1, 2))) * block**2


def keep_fraction(mask_ratio: float) -> Fraction:
    """Return 1 - mask_ratio as an exact fraction: in binary floating point, 1 - 0.9 is less than a tenth."""
    # Decimals and simple fractions, and what is computed from them, differ by far more than 1e-9.
    return 1 - Fraction(mask_ratio).limit_denominator(10**9)


@dataclass(frozen=True)
class MaskingContext:
    """What a strategy may read to choose patches for one view of a batch.

    Attributes:
        batch_size: B.
        grid_size: patches (down, across); N = down * across.
        device: of the resulting `keep_indices`.
        scores: (B, N) float, the relevance of each patch, on this view's own grid.
        generator: source of randomness where `seeds` is None; None is torch's default generator.
        images: (B, 3, h, w) float, normalised pixels of the view.
        seeds: (B,) int64. Each row's draws then depend on its own seed and `purpose` alone, so that masks are
            independent of batch size, number of ranks, micro-batches and resuming.
        purpose: separates the streams of views and passes that share `seeds`.
    """

    batch_size: int
    grid_size: tuple[int, int]
    device: torch.device | str
    scores: Float[Tensor, "B N"] | None = None
    generator: torch.Generator | None = None
    images: Float[Tensor, "B 3 h w"] | None = None
    seeds: Int[Tensor, " B"] | None = None
    purpose: str = "mask"

    @property
    def num_patches(self) -> int:
        """N."""
        return math.prod(self.grid_size)

    def uniform(self, count: int) -> Float[Tensor, "B count"]:
        """Return (B, count) float32 draws in [0, 1)."""
        if self.seeds is not None:
            return rng.uniform(self.seeds, count, self.purpose)
        return torch.rand(self.batch_size, count, device=self.device, generator=self.generator)


class MaskingStrategy(ABC):
    """Keeps the K patches, or blocks of patches, with the highest `scores`; ties go to the lower index.

    Where blocks do not tile the grid, single patches are chosen.

    Args:
        mask_ratio: fraction of patches removed, in [0, 1).
        block_size: side in patches of the blocks that are kept or removed as a whole.

    Attributes:
        needs_scores: whether `MaskingContext.scores` must be given; a pass then needs `scores_from`.
        needs_images: whether `MaskingContext.images` must be given.

    Raises:
        ConfigError: an argument out of its range.
    """

    needs_scores: ClassVar[bool] = False
    needs_images: ClassVar[bool] = False

    def __init__(self, mask_ratio: float = 0.5, block_size: int = 1) -> None:
        num_keep(mask_ratio, 1, block_size)  # checks both
        self.mask_ratio = mask_ratio
        self.block_size = block_size

    @abstractmethod
    def scores(self, context: MaskingContext) -> Float[Tensor, "B M"]:
        """Return (B, M) float, a score for each of M blocks.

        Args:
            context: on the grid of blocks: a block is one large patch, its score the mean of its patches'.
        """

    def kept_blocks(self, blocks: int) -> int:
        """Return how many of `blocks` blocks, or single patches, are kept."""
        return num_keep(self.mask_ratio, (1, blocks))

    def num_keep(self, grid_size: tuple[int, int]) -> int:
        """Return K on this grid."""
        patches = fitting_block_size(self.block_size, grid_size) ** 2
        return self.kept_blocks(math.prod(grid_size) // patches) * patches

    def __call__(self, context: MaskingContext) -> Int[Tensor, "B K"]:
        """Return `keep_indices`: (B, K) int64, ascending, without repeats, CLS not counted.

        Raises:
            ConfigError: scores or images that the strategy needs are missing, or scores do not fit the grid.
        """
        scores, (height, width) = context.scores, context.grid_size
        if self.needs_scores and scores is None:
            raise ConfigError(f"{type(self).__name__} ranks patches by their scores: pass MaskingContext(scores=...)")
        if self.needs_images and context.images is None:
            raise ConfigError(f"{type(self).__name__} reads pixels: pass MaskingContext(images=...)")
        block = fitting_block_size(self.block_size, (height, width))
        rows, columns = height // block, width // block
        if scores is not None:
            if scores.shape[1] != height * width:
                raise ConfigError(f"{scores.shape[1]} scores do not fit the {height} x {width} grid: crop_scores "
                                  "resamples scores of another grid")
            scores = scores.float().unflatten(1, (rows, block, columns, block)).mean(dim=(2, 4)).flatten(1)
        scores = self.scores(replace(context, grid_size=(rows, columns), scores=scores))
        if scores.shape != (context.batch_size, rows * columns):
            raise ConfigError(f"{type(self).__name__}.scores returned {tuple(scores.shape)}, not one score a patch: "
                              f"{(context.batch_size, rows * columns)}")
        ranked = best_first(scores)
        kept = ranked[:, : self.kept_blocks(rows * columns)]
        patches = torch.arange(height * width, device=kept.device).view(rows, block, columns, block)
        patches_of_blocks = patches.transpose(1, 2).reshape(rows * columns, block**2)
        return patches_of_blocks[kept].flatten(1).sort(dim=1).values


class NoMasking(MaskingStrategy):
    """Keeps every patch; `mask_ratio`, which would have no effect, must be 0."""

    def __init__(self, mask_ratio: float = 0.0, block_size: int = 1) -> None:
        if mask_ratio != 0.0:
            raise ConfigError(f"masking 'none' removes nothing, so mask_ratio must be 0, not {mask_ratio}: choose a "
                              "masking strategy, e.g. 'uniform'")
        super().__init__(mask_ratio, block_size)

    def scores(self, context: MaskingContext) -> Float[Tensor, "B M"]:
        return torch.zeros(context.batch_size, context.num_patches, device=context.device)


def best_first(scores: Float[Tensor, "B M"]) -> Int[Tensor, "B M"]:
    """Return indices by descending score; ties go to the lower index, on every device."""
    return scores.argsort(dim=1, descending=True, stable=True)
