"""Attentive masking, the strategy of A-CLIP (Yang et al., arXiv 2212.08653, section 3)."""

import math
from typing import Literal, get_args

import torch
from jaxtyping import Int
from torch import Tensor

from aclip.errors import ConfigError, unknown_name
from aclip.masking.base import (
    MaskingContext,
    MaskingStrategy,
    best_first,
    fitting_block_size,
    kept_blocks_to_patches,
    num_keep,
    pool_to_blocks,
    share_kept,
)

Keep = Literal["highest", "lowest", "mixed", "sampled"]
"""Which scores survive, see `AttentiveMasking`."""


class AttentiveMasking(MaskingStrategy):
    """Keeps the patches that the EMA encoder's [CLS] token attends to most.

    Scores are mean-pooled over blocks of `block_size` x `block_size` patches and whole blocks are chosen;
    ties go to the lower index. Where blocks do not tile the grid, single patches are chosen.

    `keep` says which scores survive: "highest"; "lowest", the paper's control that keeps the least
    relevant ones; "mixed", half of the kept blocks (rounded up) by score and the rest uniformly among
    the others (our definition); or "sampled" (not of the paper), blocks drawn one after the other without
    replacement, each with a probability in proportion to its score among those left: the K largest of
    log(u) / score, u uniform (Efraimidis and Spirakis 2006, "Weighted random sampling with a reservoir").

    `rounding` is "nearest" (`masking.num_keep`) or "released": floor(blocks * (1 - mask_ratio)) + 1, as
    the authors' release counts, which is one more where that product is less than half above a whole number.
    """

    needs_scores = True

    def __init__(
        self,
        mask_ratio: float = 0.5,
        block_size: int = 2,
        keep: Keep = "highest",
        rounding: Literal["nearest", "released"] = "nearest",
    ) -> None:
        """Set the fraction removed, the block side in patches, which scores survive, and how to count."""
        super().__init__(mask_ratio, block_size=block_size)
        if keep not in get_args(Keep):
            raise ConfigError(unknown_name("value for keep", keep, get_args(Keep)))
        if rounding not in ("nearest", "released"):
            raise ConfigError(unknown_name("value for rounding", rounding, ("nearest", "released")))
        self.keep = keep
        self.rounding = rounding

    def num_keep(self, grid_size: tuple[int, int]) -> int:
        """Return K on this grid, under the chosen rounding."""
        if self.rounding == "nearest":
            return num_keep(self.mask_ratio, grid_size, self.block_size)
        block = fitting_block_size(self.block_size, grid_size)
        blocks = grid_size[0] * grid_size[1] // block**2
        return min(blocks, math.floor(blocks * share_kept(self.mask_ratio)) + 1) * block**2

    def __call__(self, context: MaskingContext) -> Int[Tensor, "B K"]:
        """Choose by `context.scores`, (B, N) on the view's own grid.

        Raises:
            ValueError: no scores, or scores of another grid.
        """
        if context.scores is None:
            raise ValueError("attentive masking needs scores; pass MaskingContext(scores=...)")
        if context.scores.shape[1] != context.grid_size[0] * context.grid_size[1]:
            raise ValueError(f"{context.scores.shape[1]} scores do not fit the grid {context.grid_size}")
        block = fitting_block_size(self.block_size, context.grid_size)
        kept = self.num_keep(context.grid_size) // block**2
        scores = pool_to_blocks(context.scores.float(), context.grid_size, block)
        if self.keep == "lowest":
            order = best_first(-scores)
        elif self.keep == "mixed":
            by_score = math.ceil(kept / 2)
            order = best_first(scores)
            draws = context.uniform(order.shape[1] - by_score)
            others = order[:, by_score:].gather(1, best_first(draws))
            order = torch.cat([order[:, :by_score], others], dim=1)
        elif self.keep == "sampled":
            draws = context.uniform(scores.shape[1])
            order = best_first(draws.log() / scores.clamp_min(torch.finfo(scores.dtype).tiny))
        else:
            order = best_first(scores)
        return kept_blocks_to_patches(order[:, :kept], context.grid_size, block)
