"""Attentive masking, the strategy of A-CLIP (Yang et al., arXiv 2212.08653, section 3), and its score maps."""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from aclip.masking.base import MaskingContext, MaskingStrategy, best_first, keep_fraction

Keep = Literal["highest", "lowest", "mixed", "sampled"]


class AttentiveMasking(MaskingStrategy):
    """Keeps the patches that the EMA encoder's [CLS] token attends to most.

    Scores are averaged over blocks of `block_size` x `block_size` patches, and whole blocks are kept.

    Args:
        mask_ratio, block_size: see `MaskingStrategy`.
        keep: which scores survive. "highest"; "lowest", the paper's control; "mixed", half of the kept blocks (rounded
            up) by score and the rest uniformly at random (our definition); "sampled" (not of the paper), blocks drawn
            without replacement in proportion to their scores: the K largest of log(u) / score, u uniform (Efraimidis
            and Spirakis 2006, "Weighted random sampling with a reservoir").
        rounding: of the number of kept blocks. "nearest" as `masking.num_keep`; "released" as in the authors' release,
            floor(blocks * (1 - mask_ratio)) + 1.
    """

    needs_scores = True

    def __init__(self, mask_ratio: float = 0.5, block_size: int = 2, keep: Keep = "highest",
                 rounding: Literal["nearest", "released"] = "nearest") -> None:
        super().__init__(mask_ratio, block_size)
        self.keep, self.rounding = keep, rounding

    def kept_blocks(self, blocks: int) -> int:
        if self.rounding == "nearest":
            return super().kept_blocks(blocks)
        return min(blocks, math.floor(blocks * keep_fraction(self.mask_ratio)) + 1)

    def scores(self, context: MaskingContext) -> Float[Tensor, "B M"]:
        scores = context.scores
        assert scores is not None
        if self.keep == "lowest":
            return -scores
        if self.keep == "mixed":
            by_score = math.ceil(self.kept_blocks(context.num_patches) / 2)
            draws = context.uniform(context.num_patches - by_score)
            draws = F.pad(draws, (by_score, 0), value=1.0)  # 1 is above every draw
            return torch.empty_like(draws).scatter(1, best_first(scores), draws)
        if self.keep == "sampled":
            draws = context.uniform(context.num_patches)
            return draws.log() / scores.clamp_min(torch.finfo(scores.dtype).tiny)
        return scores


def crop_scores(
    scores: Float[Tensor, "B Nc"],
    context_grid: tuple[int, int],
    context_box: Float[Tensor, "B 4"],
    view_box: Float[Tensor, "B 4"],
    grid_size: tuple[int, int],
    flipped: Bool[Tensor, " B"] | None = None,
    padding: Literal["border", "zeros"] = "border",
) -> Float[Tensor, "B N"]:
    """Resample score maps from the scored crop onto each view's own patch grid.

    The score of view patch (i, j) is the context map, bilinear between patch centres, at the source pixel
        y = top + (i + 1/2) / h * height,   x = left + (j + 1/2) / w * width
    of the view's box; in a flipped view, patch j shows source column w - 1 - j.

    Args:
        scores: (B, Nc) float, on the context's grid.
        context_grid, grid_size: patches (down, across) of the context and of the view.
        context_box, view_box: (B, 4) float, (top, left, height, width) of the scored crop and of the view, in source
            pixels.
        flipped: (B,) bool, views mirrored left to right; None means none.
        padding: scores beyond the context's outermost patch centres. "border" repeats the edge value; with "zeros",
            patches whose centre lies outside the context box score 0, as in the A-CLIP release.

    Returns:
        (B, N) float32.
    """
    maps = scores.float().reshape(-1, 1, *context_grid)
    context, view = context_box.float(), view_box.float()
    rows, columns = ((torch.arange(n, device=maps.device, dtype=torch.float32) + 0.5) / n for n in grid_size)
    y = view[:, 0, None] + rows * view[:, 2, None]
    x = view[:, 1, None] + columns * view[:, 3, None]
    # grid_sample without align_corners: -1 and 1 are the outer edges of the map's corner pixels
    y = (y - context[:, 0, None]) / context[:, 2, None] * 2 - 1
    x = (x - context[:, 1, None]) / context[:, 3, None] * 2 - 1
    if flipped is not None:
        x = torch.where(flipped[:, None], x.flip(1), x)
    points = torch.stack(torch.broadcast_tensors(x[:, None, :], y[:, :, None]), dim=-1)
    sampled = F.grid_sample(maps, points, mode="bilinear", padding_mode="border", align_corners=False)
    if padding == "zeros":
        sampled = sampled * (points.abs() <= 1).all(dim=-1)[:, None]
    return sampled.flatten(1)
