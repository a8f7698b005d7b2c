"""Random masking: uniform (FLIP), and centred (GLIP)."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from aclip.errors import ConfigError
from aclip.masking.base import MaskingContext, MaskingStrategy


class UniformMasking(MaskingStrategy):
    """Keeps a uniformly random subset of patches (FLIP, Li et al., arXiv 2212.00794), or of blocks."""

    def scores(self, context: MaskingContext) -> Float[Tensor, "B M"]:
        """Return independent uniform draws."""
        return context.uniform(context.num_patches)


class GaussianMasking(MaskingStrategy):
    """Keeps patches at random, more often near the centre (GLIP, Liang and Larson, arXiv 2403.15837).

    score = u - (1 - p), u uniform in [0, 1), p the density of `centre_density`. As in the authors' release, p is the
    density itself, 1 / (2 pi variance) = 0.796 at the centre for the default variance, not scaled to 1 there.

    Deviations from the release: K is rounded (`masking.num_keep`), not truncated; with `block_size` > 1 the density is
    taken on the grid of blocks.

    Args:
        mask_ratio: fraction of patches removed, in [0, 1).
        block_size: side of a block, in patches.
        variance: of the Gaussian, along each axis of [-1, 1]^2.

    Raises:
        ConfigError: a variance that is not positive and finite, besides what `MaskingStrategy` raises.
    """

    def __init__(self, mask_ratio: float = 0.5, block_size: int = 1, variance: float = 0.2) -> None:
        super().__init__(mask_ratio, block_size)
        if not 0.0 < variance < math.inf:
            raise ConfigError(f"variance is that of a Gaussian on [-1, 1]^2, positive and finite, not {variance}")
        self.variance = variance

    def scores(self, context: MaskingContext) -> Float[Tensor, "B M"]:
        """Return u - (1 - p)."""
        density = centre_density(context.grid_size, self.variance, context.device)
        return context.uniform(context.num_patches) - (1.0 - density)


def centre_density(grid_size: tuple[int, int], variance: float, device: torch.device | str) -> Float[Tensor, " N"]:
    """Return the density of N(0, variance I) at the centre of every patch.

    p(x, y) = exp(-(x^2 + y^2) / (2 variance)) / (2 pi variance), the centres of the outermost patches at -1 and 1 in
    both directions; in a grid of one patch across, its centre is at 0.

    Returns:
        (N,) float32, patches numbered row by row.
    """
    rows, columns = (
        torch.arange(1 - count, count, 2, device=device, dtype=torch.float32) / max(1, count - 1)
        for count in grid_size
    )
    distances = rows.square()[:, None] + columns.square()
    return (torch.exp(distances / (-2.0 * variance)) / (2.0 * math.pi * variance)).flatten()
