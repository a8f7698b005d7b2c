"""Cluster masking (Wei, Pan and Owens, arXiv 2405.08815): patches that look alike go together."""

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

_JITTER = 2.0**-10
"""Similarities that differ by less than this may change places at random: equal patches, of a plain background
say, would otherwise be ordered by rounding errors, the same way in every epoch."""

_FLAT = 1e-6
"""Added to every patch's variance, so that a patch without contrast is similar to none."""


class ClusterMasking(MaskingStrategy):
    """Removes random clusters of patches that look alike, so that whole structures go at once.

    A share `anchor_ratio` of the patches, drawn at random, are anchors. The similarity of two patches is the
    cosine of their pixel values, each patch first brought to mean 0 and variance 1 (`patch_similarity`). The
    anchors and the patches most similar to any of them go.

    Deviations from the paper: it removes what is more similar than a threshold, tuned to a mean ratio, and hides
    with an attention mask what differs in number between the pictures of a batch; here every view loses exactly
    N - K patches, the most similar ones first, so that a cluster is cut off or the next best is added where the
    counts do not agree. The weighted sum with the similarity of patch embeddings, its variant, is left out. With
    `block_size` > 1 a block is one large patch.
    """

    def __init__(self, mask_ratio: float = 0.5, *, block_size: int = 1, anchor_ratio: float = 0.03) -> None:
        """Set the fraction removed, the block side in patches, and the fraction of patches that are anchors.

        Raises:
            ConfigError: an anchor ratio outside (0, 1], besides what `num_keep` raises.
        """
        super().__init__(mask_ratio, block_size=block_size)
        if not 0.0 < anchor_ratio <= 1.0:
            raise ConfigError(f"anchor_ratio is a fraction of the patches, 0 < ratio <= 1, not {anchor_ratio}")
        self.anchor_ratio = anchor_ratio

    def num_anchors(self, count: int, removed: int) -> int:
        """Return how many of `count` patches are anchors: at least 1, and no more than are removed."""
        return max(1, min(removed, math.floor(count * self.anchor_ratio + 0.5)))

    def __call__(self, context: MaskingContext) -> Int[Tensor, "B K"]:
        """Choose by `context.images`, the view itself.

        Raises:
            ValueError: no images, or images that the grid does not divide.
        """
        if context.images is None:
            raise ValueError("cluster masking compares pixels; pass MaskingContext(images=...)")
        block = fitting_block_size(self.block_size, context.grid_size)
        grid = context.grid_size[0] // block, context.grid_size[1] // block
        count, kept = grid[0] * grid[1], self.num_keep(context.grid_size) // block**2
        draws = context.uniform(count)
        anchors = best_first(draws)[:, : self.num_anchors(count, count - kept)]
        similarity = patch_similarity(context.images, grid, anchors).amax(dim=1)
        nearness = (similarity + _JITTER * draws).scatter(1, anchors, 2.0)  # anchors go first
        return kept_blocks_to_patches(best_first(-nearness)[:, :kept], context.grid_size, block)


def patch_similarity(
    images: Float[Tensor, "B 3 h w"], grid_size: tuple[int, int], anchors: Int[Tensor, "B A"]
) -> Float[Tensor, "B A N"]:
    """Return the cosine similarity of every patch to each anchor, over values of mean 0 and variance 1.

    z = (x - mean(x)) / sqrt(var(x) + 1e-6) over the 3 d values x of a patch; similarity = z . z' / (3 d).
    A patch without any contrast between its values has similarity 0 to all, itself included.

    Args:
        images: (B, 3, h, w) float, normalised; the grid divides h and w.
        grid_size: patches (down, across).
        anchors: (B, A) int64 indices of patches.

    Returns:
        (B, A, N) float32 in [-1, 1], whatever the autocast state.

    Raises:
        ValueError: h or w is no multiple of the grid.
    """
    height, width = grid_size
    if images.shape[2] % height or images.shape[3] % width:
        raise ValueError(f"images of {tuple(images.shape[2:])} pixels do not divide into the grid {grid_size}")
    patches = images.float().unflatten(3, (width, -1)).unflatten(2, (height, -1))  # (B, 3, down, p, across, q)
    z = patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
    z = z - z.mean(dim=2, keepdim=True)
    z = z * torch.rsqrt(z.square().mean(dim=2, keepdim=True) + _FLAT)
    with torch.autocast(images.device.type, enabled=False):
        similarity: Tensor = z.take_along_dim(anchors[:, :, None], dim=1) @ z.mT / z.shape[2]
    return similarity
