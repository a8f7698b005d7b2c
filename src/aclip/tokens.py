"""How open_clip's tokenizers for CLIP lay out a caption."""

import torch
from jaxtyping import Bool, Int
from torch import Tensor


def is_word(tokens: Int[Tensor, "B T"]) -> Bool[Tensor, "B T"]:
    """Return which tokens belong to the caption: not SOT (the first), EOT (the highest id of its row), or padding.

    By place, since padding shares its id with a word. Nothing is read back to the host.

    Args:
        tokens: (B, T) int64, rows of SOT, the caption, EOT, then padding.
    """
    place = torch.arange(tokens.shape[1], device=tokens.device)
    return (place > 0) & (place < tokens.argmax(dim=1, keepdim=True))
