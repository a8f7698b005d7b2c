"""Centred random masking, the strategy of GLIP (Liang and Larson, arXiv 2403.15837)."""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from aclip.errors import ConfigError
from aclip.masking.base import (
    MaskingContext,
    MaskingStrategy,
    best_first,
    fitting_block_size,
    kept_blocks_to_patches,
)


class GaussianMasking(MaskingStrategy):
    """Keeps patches at random, those near the centre of the view more often.

    score = u - (1 - p), u uniform in [0, 1), p the density of `centre_density`; the K patches with the highest
    score stay. As in the authors' release p is the density itself, 1 / (2 pi variance) = 0.796 at the centre for
    the default variance, not scaled to 1 there.

    Deviations: K follows `masking.num_keep`, where the release truncates; whole blocks can be chosen, on whose
    grid the density is then taken.
    """

    def __init__(self, mask_ratio: float = 0.5, *, block_size: int = 1, variance: float = 0.2) -> None:
        """Set the fraction removed, the block side in patches, and the variance along each axis of [-1, 1]^2.

        Raises:
            ConfigError: a variance that is not positive and finite, besides what `num_keep` raises.
        """
        super().__init__(mask_ratio, block_size=block_size)
        if not 0.0 < variance < math.inf:
            raise ConfigError(f"variance is that of a Gaussian on [-1, 1]^2, positive and finite, not {variance}")
        self.variance = variance

    def __call__(self, context: MaskingContext) -> Int[Tensor, "B K"]:
        """Return the K patches with the highest scores."""
        block = fitting_block_size(self.block_size, context.grid_size)
        grid = context.grid_size[0] // block, context.grid_size[1] // block
        density = centre_density(grid, self.variance, context.device)
        scores = context.uniform(grid[0] * grid[1]) - (1.0 - density)
        kept = self.num_keep(context.grid_size) // block**2
        return kept_blocks_to_patches(best_first(scores)[:, :kept], context.grid_size, block)


def centre_density(
    grid_size: tuple[int, int], variance: float, device: torch.device | str
) -> Float[Tensor, " N"]:
    """Return the density of N(0, variance I) at the centre of every patch.

    p(x, y) = exp(-(x^2 + y^2) / (2 variance)) / (2 pi variance), the centres of the outermost patches at -1 and
    1 in both directions, whatever the grid; a grid of one patch across has it at 0.

    Returns:
        (N,) float32, patches numbered row by row.
    """
    rows, columns = (
        torch.arange(1 - count, count, 2, device=device, dtype=torch.float32) / max(1, count - 1)
        for count in grid_size
    )
    distances = rows.square()[:, None] + columns.square()
    return (torch.exp(distances / (-2.0 * variance)) / (2.0 * math.pi * variance)).flatten()
