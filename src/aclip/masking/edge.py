"""Masking by edges: the patches with the strongest gradients stay."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from aclip.masking.base import (
    MaskingContext,
    MaskingStrategy,
    best_first,
    fitting_block_size,
    kept_blocks_to_patches,
    pool_to_blocks,
)

# Rec. 601 luma, as in PIL and torchvision.
_LUMA = (0.299, 0.587, 0.114)


class EdgeMasking(MaskingStrategy):
    """Keeps the patches, or whole blocks with `block_size` > 1, with the strongest edges (`edge_scores`).

    What looks at pixels alone is the control for what looks at meaning: no draw, no model. CLIP-PGS (Pei et al.,
    arXiv 2503.17080) uses Sobel edges to protect patches of a random selection; here they decide alone. Ties, as
    in an empty picture, go to the lower index.
    """

    def __call__(self, context: MaskingContext) -> Int[Tensor, "B K"]:
        """Choose by `context.images`, the view itself.

        Raises:
            ValueError: no images, or images that the grid does not divide.
        """
        if context.images is None:
            raise ValueError("edge masking looks at pixels; pass MaskingContext(images=...)")
        block = fitting_block_size(self.block_size, context.grid_size)
        scores = pool_to_blocks(edge_scores(context.images, context.grid_size), context.grid_size, block)
        kept = self.num_keep(context.grid_size) // block**2
        return kept_blocks_to_patches(best_first(scores)[:, :kept], context.grid_size, block)


def edge_scores(images: Float[Tensor, "B 3 h w"], grid_size: tuple[int, int]) -> Float[Tensor, "B N"]:
    """Return the mean gradient magnitude of every patch.

    |g| = sqrt((S * Y)^2 + (S^T * Y)^2) at every pixel, Y the luma, S the 3 x 3 Sobel kernel
    ((-1, 0, 1), (-2, 0, 2), (-1, 0, 1)). Pixels are continued at the border, so that a picture's frame is no edge.

    The luma is that of the normalised values: of each channel divided by its standard deviation, which weighs the
    channels a few percent differently where the three are not alike.

    Args:
        images: (B, 3, h, w) float, normalised; the grid divides h and w.
        grid_size: patches (down, across).

    Returns:
        (B, N) float32, in units of the luma times 8 a pixel.

    Raises:
        ValueError: h or w is no multiple of the grid.
    """
    height, width = grid_size
    if images.shape[2] % height or images.shape[3] % width:
        raise ValueError(f"images of {tuple(images.shape[2:])} pixels do not divide into the grid {grid_size}")
    red, green, blue = (weight * channel for weight, channel in zip(_LUMA, images.float().unbind(1), strict=True))
    luma = F.pad((red + green + blue)[:, None], (1, 1, 1, 1), mode="replicate")[:, 0]
    # the kernel is a smoothing across the gradient times a difference along it; slices run in full precision
    # under autocast too, and a flat region gives exactly 0
    down = luma[:, :-2] + 2.0 * luma[:, 1:-1] + luma[:, 2:]
    across = luma[:, :, :-2] + 2.0 * luma[:, :, 1:-1] + luma[:, :, 2:]
    magnitude = torch.hypot(down[:, :, 2:] - down[:, :, :-2], across[:, 2:] - across[:, :-2])
    patches: Tensor = magnitude.unflatten(2, (width, -1)).unflatten(1, (height, -1))  # (B, down, p, across, q)
    return patches.mean(dim=(2, 4)).flatten(1)
