"""The token layout of open_clip's tokenizers for CLIP."""

import torch
from jaxtyping import Bool, Int
from torch import Tensor


def is_word(tokens: Int[Tensor, "B T"]) -> Bool[Tensor, "B T"]:
    """Return which tokens are words of the caption: all but SOT (the first), EOT (the highest id), and padding.

    By position, since padding shares its id with a word. No host synchronisation.

    Args:
        tokens: (B, T) int64, rows of SOT, the caption, EOT, then padding.
    """
    position = torch.arange(tokens.shape[1], device=tokens.device)
    return (position > 0) & (position < tokens.argmax(dim=1, keepdim=True))
