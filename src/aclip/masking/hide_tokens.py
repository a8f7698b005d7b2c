"""Hiding words of a caption from the text encoder, as BERT does."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from aclip import rng
from aclip.tokens import is_word

_BEHIND_MASK, _BEHIND_RANDOM = 0.8, 0.1  # the rest of the chosen tokens stays visible, and is predicted all the same


class HiddenTokens(NamedTuple):
    """Captions with some tokens hidden.

    Attributes:
        tokens: (B, T) int64, the ids that the encoder sees.
        behind_mask: (B, T) bool, where it sees the mask token instead.
        hidden: (B, T) bool, every token that has to be predicted.
    """

    tokens: Int[Tensor, "B T"]
    behind_mask: Bool[Tensor, "B T"]
    hidden: Bool[Tensor, "B T"]


def hide_tokens(
    tokens: Int[Tensor, "B T"], mask_ratio: float, seeds: Int[Tensor, " B"], vocab_size: int, purpose: str
) -> HiddenTokens:
    """Hide each token with probability `mask_ratio` (BERT, arXiv 1810.04805, section 3.1).

    Of the hidden ones 80 % stand behind the mask token, 10 % behind a uniformly random token, 10 % are left as they
    are. The first token (SOT), EOT (the highest id of its row) and padding are never hidden. A row's draws depend
    on its own seed alone, not on T.

    Args:
        tokens: (B, T) int64.
        mask_ratio: probability in [0, 1).
        seeds: (B,) int64 per-sample seeds.
        vocab_size: SOT and EOT are its last two ids, as in CLIP's vocabulary; random tokens are drawn from the rest.
        purpose: separates this draw from others with the same seeds.
    """
    length = tokens.shape[1]
    chosen, fate, other = (rng.uniform(seeds, length, f"{purpose}/{draw}") for draw in ("hide", "fate", "other"))
    hidden = is_word(tokens) & (chosen < mask_ratio)
    behind_mask = hidden & (fate < _BEHIND_MASK)
    random = hidden & ~behind_mask & (fate < _BEHIND_MASK + _BEHIND_RANDOM)
    drawn = (other * (vocab_size - 2)).long()
    return HiddenTokens(torch.where(random, drawn, tokens), behind_mask, hidden)
