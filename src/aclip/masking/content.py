"""Masking by the pixels of the view: clusters of similar patches go together, or patches with edges stay."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from aclip.errors import ConfigError
from aclip.masking.base import MaskingContext, MaskingStrategy, best_first

# Rec. 601 luma, as in PIL and torchvision.
_LUMA = (0.299, 0.587, 0.114)

# Random term on similarities. Equal patches, e.g. of a plain background, would otherwise be ordered by rounding errors,
# in the same way in every epoch.
_JITTER = 2.0**-10

# Added to every patch's variance, so that a patch without contrast is similar to none.
_EPSILON = 1e-6


class EdgeMasking(MaskingStrategy):
    """Keeps the patches, or blocks, with the strongest edges (`edge_scores`).

    A control for attentive masking: it reads pixels alone, without a model and without randomness. CLIP-PGS (Pei et
    al., arXiv 2503.17080) uses Sobel edges to protect patches of a random selection; here edges alone decide.
    """

    def scores(self, context: MaskingContext) -> Float[Tensor, "B M"]:
        """Return the edge strength of `context.images`."""
        return edge_scores(images_of(context), context.grid_size)


def edge_scores(images: Float[Tensor, "B 3 h w"], grid_size: tuple[int, int]) -> Float[Tensor, "B N"]:
    """Return the mean gradient magnitude of every patch.

    |g| = sqrt((S * Y)^2 + (S^T * Y)^2) at every pixel, Y the luma of the normalised image, S the 3 x 3 Sobel kernel
    ((-1, 0, 1), (-2, 0, 2), (-1, 0, 1)). Pixels are replicated at the border, so that the frame is no edge.

    Args:
        images: (B, 3, h, w) float, normalised; the grid divides h and w.
        grid_size: patches (down, across).

    Returns:
        (B, N) float32, in units of 8 times the luma per pixel.
    """
    height, width = grid_size
    red, green, blue = (weight * channel for weight, channel in zip(_LUMA, images.float().unbind(1), strict=True))
    luma = F.pad((red + green + blue)[:, None], (1, 1, 1, 1), mode="replicate")[:, 0]
    # Sobel = smoothing across the gradient x difference along it. Slices, unlike a convolution, stay in float32 under
    # autocast, and a flat region gives exactly 0.
    down = luma[:, :-2] + 2.0 * luma[:, 1:-1] + luma[:, 2:]
    across = luma[:, :, :-2] + 2.0 * luma[:, :, 1:-1] + luma[:, :, 2:]
    magnitude = torch.hypot(down[:, :, 2:] - down[:, :, :-2], across[:, 2:] - across[:, :-2])
    patches: Tensor = magnitude.unflatten(2, (width, -1)).unflatten(1, (height, -1))  # (B, down, p, across, q)
    return patches.mean(dim=(2, 4)).flatten(1)


class ClusterMasking(MaskingStrategy):
    """Removes random clusters of similar patches (Wei, Pan and Owens, arXiv 2405.08815).

    A random fraction `anchor_ratio` of the patches are anchors. The anchors and the patches most similar to any of them
    (`patch_similarity`) are removed.

    Deviations from the paper: it removes patches above a similarity threshold, tuned to a mean ratio, and evens out the
    counts in a batch with an attention mask; here exactly N - K patches are removed from every view, so that a cluster
    may be cut short or extended. Its variant that adds the similarity of patch embeddings is left out. With
    `block_size` > 1 a block is one large patch.

    Args:
        mask_ratio: fraction of patches removed, in [0, 1).
        block_size: side of a block, in patches.
        anchor_ratio: fraction of patches that are anchors, in (0, 1].

    Raises:
        ConfigError: an anchor ratio outside (0, 1], besides what `MaskingStrategy` raises.
    """

    def __init__(self, mask_ratio: float = 0.5, block_size: int = 1, anchor_ratio: float = 0.03) -> None:
        super().__init__(mask_ratio, block_size)
        if not 0.0 < anchor_ratio <= 1.0:
            raise ConfigError(f"anchor_ratio is a fraction of the patches, 0 < ratio <= 1, not {anchor_ratio}")
        self.anchor_ratio = anchor_ratio

    def num_anchors(self, count: int, removed: int) -> int:
        """Return how many of `count` patches are anchors: at least 1, and no more than are removed."""
        return max(1, min(removed, math.floor(count * self.anchor_ratio + 0.5)))

    def scores(self, context: MaskingContext) -> Float[Tensor, "B M"]:
        """Return the negated similarity to the nearest anchor; anchors score lowest."""
        images, count = images_of(context), context.num_patches
        draws = context.uniform(count)
        anchors = best_first(draws)[:, : self.num_anchors(count, count - self.kept_blocks(count))]
        similarity = patch_similarity(images, context.grid_size, anchors).amax(dim=1)
        return -(similarity + _JITTER * draws).scatter(1, anchors, 2.0)


def patch_similarity(
    images: Float[Tensor, "B 3 h w"], grid_size: tuple[int, int], anchors: Int[Tensor, "B A"]
) -> Float[Tensor, "B A N"]:
    """Return the similarity of every patch to each anchor: the correlation of their pixel values.

    z = (x - mean(x)) / sqrt(var(x) + 1e-6) over the d values x of a patch; similarity = z . z' / d.
    A patch without contrast has similarity 0 to all, itself included.

    Args:
        images: (B, 3, h, w) float, normalised; the grid divides h and w.
        grid_size: patches (down, across).
        anchors: (B, A) int64 indices of patches.

    Returns:
        (B, A, N) float32 in [-1, 1], under autocast too.
    """
    height, width = grid_size
    patches = images.float().unflatten(3, (width, -1)).unflatten(2, (height, -1))  # (B, 3, down, p, across, q)
    z = patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
    z = z - z.mean(dim=2, keepdim=True)
    z = z * torch.rsqrt(z.square().mean(dim=2, keepdim=True) + _EPSILON)
    with torch.autocast(images.device.type, enabled=False):
        similarity: Tensor = z.take_along_dim(anchors[:, :, None], dim=1) @ z.mT / z.shape[2]
    return similarity


def images_of(context: MaskingContext) -> Float[Tensor, "B 3 h w"]:
    """Return the pixels of the view.

    Raises:
        ConfigError: there are none, or the grid does not divide them.
    """
    if context.images is None:
        raise ConfigError("this masking strategy reads pixels: pass MaskingContext(images=...)")
    h, w = context.images.shape[2:]
    height, width = context.grid_size
    if h % height or w % width:
        raise ConfigError(f"images of {h} x {w} pixels do not divide into a {height} x {width} grid")
    return context.images
