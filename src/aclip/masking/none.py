"""No masking: every patch is kept."""

import torch
from jaxtyping import Int
from torch import Tensor

from aclip.errors import ConfigError
from aclip.masking.base import MaskingContext, MaskingStrategy


class NoMasking(MaskingStrategy):
    """Keeps everything; a mask ratio other than 0 is refused, so that it cannot be ignored silently."""

    def __init__(self, mask_ratio: float = 0.0, *, block_size: int = 1) -> None:
        """Accept only a ratio of 0."""
        if mask_ratio != 0.0:
            raise ConfigError(f"masking 'none' removes nothing, so mask_ratio must be 0, not {mask_ratio}: "
                              "choose a masking strategy as well")
        super().__init__(mask_ratio, block_size=block_size)

    def __call__(self, context: MaskingContext) -> Int[Tensor, "B K"]:
        """Return (B, N): 0, 1, ..., N - 1 for every sample."""
        count = context.grid_size[0] * context.grid_size[1]
        return torch.arange(count, device=context.device).expand(context.batch_size, count)
