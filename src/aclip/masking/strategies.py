"""Masking at random: uniform (FLIP), centred (GLIP), by clusters of similar patches; and by edges, without chance."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from aclip.config import Fraction, Positive
from aclip.masking.base import MaskingContext, MaskingStrategy, best_first


class UniformMasking(MaskingStrategy):
    """Keeps a uniformly random subset of patches (FLIP, Li et al., arXiv 2212.00794), or of blocks."""

    def scores(self, context: MaskingContext) -> Float[Tensor, "B M"]:
        return context.uniform(context.num_patches)


class GaussianMasking(MaskingStrategy):
    """Keeps patches at random, more often near the centre (GLIP, Liang and Larson, arXiv 2403.15837).

    score = u - (1 - p), u uniform in [0, 1), p the density of `centre_density`. As in the authors' release, p is the
    density itself, 1 / (2 pi variance) = 0.796 at the centre for the default variance, not scaled to 1 there.

    Deviations from the release: K is rounded (`masking.num_keep`), not truncated; with `block_size` > 1 the density is
    taken on the grid of blocks.

    Args:
        mask_ratio, block_size: see `MaskingStrategy`.
        variance: of the Gaussian, along each axis of [-1, 1]^2, positive.
    """

    def __init__(self, mask_ratio: float = 0.5, block_size: int = 1, variance: Positive = 0.2) -> None:
        super().__init__(mask_ratio, block_size)
        self.variance = variance

    def scores(self, context: MaskingContext) -> Float[Tensor, "B M"]:
        density = centre_density(context.grid_size, self.variance, context.device)
        return context.uniform(context.num_patches) - (1.0 - density)


def centre_density(grid_size: tuple[int, int], variance: float, device: torch.device | str) -> Float[Tensor, " N"]:
    """Return the density of N(0, variance I) at the centre of every patch, (N,) float32.

    p(x, y) = exp(-(x^2 + y^2) / (2 variance)) / (2 pi variance), the centres of the outermost patches at -1 and 1 in
    both directions; in a grid of one patch across, its centre is at 0.
    """
    rows, columns = (
        torch.arange(1 - count, count, 2, device=device, dtype=torch.float32) / max(1, count - 1)
        for count in grid_size
    )
    distances = rows.square()[:, None] + columns.square()
    return (torch.exp(distances / (-2.0 * variance)) / (2.0 * math.pi * variance)).flatten()


class EdgeMasking(MaskingStrategy):
    """Keeps the patches, or blocks, with the strongest edges: the largest mean gradient magnitude of their pixels.

    |g| = sqrt((S * Y)^2 + (S^T * Y)^2) at every pixel, Y the luma of the normalised image, S the 3 x 3 Sobel kernel
    ((-1, 0, 1), (-2, 0, 2), (-1, 0, 1)). Pixels are replicated at the border, so that the frame is no edge.

    A control for attentive masking: it reads pixels alone, without a model and without randomness. CLIP-PGS (Pei et
    al., arXiv 2503.17080) uses Sobel edges to protect patches of a random selection; here edges alone decide.
    """

    needs_images = True

    def scores(self, context: MaskingContext) -> Float[Tensor, "B M"]:
        assert context.images is not None
        height, width = context.grid_size
        red, green, blue = (weight * channel.float() for weight, channel in zip(
            (0.299, 0.587, 0.114), context.images.unbind(1), strict=True))  # Rec. 601, as in PIL and torchvision
        luma = F.pad((red + green + blue)[:, None], (1, 1, 1, 1), mode="replicate")[:, 0]
        # Sobel = smoothing across the gradient x difference along it. Slices, unlike a convolution, stay in float32
        # under autocast, and a flat region gives exactly 0.
        down = luma[:, :-2] + 2.0 * luma[:, 1:-1] + luma[:, 2:]
        across = luma[:, :, :-2] + 2.0 * luma[:, :, 1:-1] + luma[:, :, 2:]
        magnitude = torch.hypot(down[:, :, 2:] - down[:, :, :-2], across[:, 2:] - across[:, :-2])
        patches: Tensor = magnitude.unflatten(2, (width, -1)).unflatten(1, (height, -1))  # (B, down, p, across, q)
        return patches.mean(dim=(2, 4)).flatten(1)


class ClusterMasking(MaskingStrategy):
    """Removes random clusters of similar patches (Wei, Pan and Owens, arXiv 2405.08815).

    A random fraction `anchor_ratio` of the patches, at least one, are anchors. They and the patches most similar to any
    of them (`patch_similarity`) are removed.

    Deviations from the paper: it removes patches above a similarity threshold, tuned to a mean ratio, and evens out the
    counts in a batch with an attention mask; here exactly N - K patches are removed from every view, so that a cluster
    may be cut short or extended. Its variant that adds the similarity of patch embeddings is left out. With
    `block_size` > 1 a block is one large patch.

    Args:
        mask_ratio, block_size: see `MaskingStrategy`.
        anchor_ratio: fraction of patches that are anchors, in [0, 1].
    """

    needs_images = True

    def __init__(self, mask_ratio: float = 0.5, block_size: int = 1, anchor_ratio: Fraction = 0.03) -> None:
        super().__init__(mask_ratio, block_size)
        self.anchor_ratio = anchor_ratio

    def scores(self, context: MaskingContext) -> Float[Tensor, "B M"]:
        assert context.images is not None
        count = context.num_patches
        draws = context.uniform(count)
        num_anchors = min(count - self.kept_blocks(count), math.floor(count * self.anchor_ratio + 0.5))
        anchors = best_first(draws)[:, : max(1, num_anchors)]
        similarity = patch_similarity(context.images, context.grid_size, anchors).amax(dim=1)
        # random, because rounding errors would order equal patches, e.g. of a plain background, alike in every epoch
        return -(similarity + 2.0**-10 * draws).scatter(1, anchors, 2.0)


def patch_similarity(
    images: Float[Tensor, "B 3 h w"], grid_size: tuple[int, int], anchors: Int[Tensor, "B A"]
) -> Float[Tensor, "B A N"]:
    """Return the correlation of the pixel values of every patch with those of each anchor, float32 in [-1, 1].

    z = (x - mean(x)) / sqrt(var(x) + 1e-6) over the d values x of a patch; similarity = z . z' / d.
    A patch without contrast has similarity 0 to all, itself included. Under autocast the same.
    """
    height, width = grid_size
    patches = images.float().unflatten(3, (width, -1)).unflatten(2, (height, -1))  # (B, 3, down, p, across, q)
    z = patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
    z = z - z.mean(dim=2, keepdim=True)
    z = z * torch.rsqrt(z.square().mean(dim=2, keepdim=True) + 1e-6)
    with torch.autocast(images.device.type, enabled=False):
        similarity: Tensor = z.take_along_dim(anchors[:, :, None], dim=1) @ z.mT / z.shape[2]
    return similarity
