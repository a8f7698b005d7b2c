"""Uniform random masking, the strategy of FLIP (Li et al., arXiv 2212.00794)."""

from jaxtyping import Int
from torch import Tensor

from aclip.masking.base import (
    MaskingContext,
    MaskingStrategy,
    best_first,
    fitting_block_size,
    kept_blocks_to_patches,
    num_keep,
)


class UniformMasking(MaskingStrategy):
    """Keeps a uniformly random subset of patches, or of whole blocks with `block_size` > 1."""

    def __call__(self, context: MaskingContext) -> Int[Tensor, "B K"]:
        """Return the K patches with the highest of N independent uniform draws."""
        block = fitting_block_size(self.block_size, context.grid_size)
        height, width = context.grid_size
        kept = num_keep(self.mask_ratio, context.grid_size, self.block_size) // block**2
        draws = context.uniform((height // block) * (width // block))
        return kept_blocks_to_patches(best_first(draws)[:, :kept], context.grid_size, block)
