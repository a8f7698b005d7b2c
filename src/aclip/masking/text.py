"""Masking of captions: text reductions keep a few tokens; `hide_tokens` hides some, as BERT does."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from aclip import rng
from aclip.config import Count
from aclip.masking.base import best_first
from aclip.tokens import is_word


@dataclass(frozen=True)
class TextReductionContext:
    """What a reduction may read besides the tokens.

    Attributes:
        seeds: (B,) int64; each row's draws depend on its own seed alone, not on the batch or its padding.
        frequencies: (vocabulary,) float, the share of each token id in the training captions, on the tokens' device
            (`aclip.data.token_frequencies`).
    """

    seeds: Int[Tensor, " B"]
    frequencies: Float[Tensor, " V"] | None = None

    def uniform(self, tokens: Int[Tensor, "B T"]) -> Float[Tensor, "B T"]:
        """Return one draw in [0, 1) for every token."""
        return rng.uniform(self.seeds, tokens.shape[1], "text")


class TextReduction(ABC):
    """Shortens captions to the `num_keep` tokens with the highest `score`; SOT and EOT stay and are not counted.

    A user's own is a subclass with a `score`, added to `TEXT_REDUCTIONS`.

    Args:
        num_keep: tokens of a caption that stay, at least 1.

    Attributes:
        needs_frequencies: whether `score` reads `TextReductionContext.frequencies`.
    """

    needs_frequencies: ClassVar[bool] = False

    def __init__(self, num_keep: Count) -> None:
        self.num_keep = num_keep

    @abstractmethod
    def score(self, tokens: Int[Tensor, "B T"], context: TextReductionContext) -> Float[Tensor, "B T"]:
        """Return a score for each token; ties go to the earlier one. Scores of SOT, EOT and padding are ignored."""

    def __call__(self, tokens: Int[Tensor, "B T"], context: TextReductionContext) -> Int[Tensor, "B S"]:
        """Return the shortened captions, without host synchronisation.

        Args:
            tokens: (B, T) int64, rows of SOT, the caption, EOT (the highest id of the row), then zeros.
            context: seeds and frequencies.

        Returns:
            (B, S) int64 of the same layout, S = min(T, num_keep + 2). Captions that are short enough are unchanged.
        """
        width = self.num_keep + 2
        if tokens.shape[1] <= width:
            return tokens
        end = tokens.argmax(dim=1, keepdim=True)
        position = torch.arange(tokens.shape[1], device=tokens.device)
        # SOT and EOT rank before every word and padding after, so that a fixed number of the best is always right.
        scores = torch.where(is_word(tokens), self.score(tokens, context), torch.inf)
        scores = scores.masked_fill(position > end, -torch.inf)
        return tokens.gather(1, best_first(scores)[:, :width].sort(dim=1).values)


class Truncation(TextReduction):
    """Keeps the first tokens (Li et al., "An Inverse Scaling Law for CLIP Training", arXiv 2305.07017)."""

    def score(self, tokens: Int[Tensor, "B T"], context: TextReductionContext) -> Float[Tensor, "B T"]:
        return torch.zeros(tokens.shape, device=tokens.device)


class RandomReduction(TextReduction):
    """Keeps a uniformly random subset of tokens ("random masking" of arXiv 2305.07017)."""

    def score(self, tokens: Int[Tensor, "B T"], context: TextReductionContext) -> Float[Tensor, "B T"]:
        return context.uniform(tokens)


class BlockReduction(TextReduction):
    """Keeps consecutive tokens from a uniformly random start ("block masking" of arXiv 2305.07017)."""

    def score(self, tokens: Int[Tensor, "B T"], context: TextReductionContext) -> Float[Tensor, "B T"]:
        num_words = tokens.argmax(dim=1) - 1
        starts = (num_words - self.num_keep + 1).clamp(min=1)
        skipped = (context.uniform(tokens)[:, 0] * starts).floor()[:, None]
        position = torch.arange(tokens.shape[1], device=tokens.device)
        return ((position > skipped) & (position <= skipped + self.num_keep)).float()


class FrequencyReduction(TextReduction):
    """Keeps rare words more often than frequent ones: CLIPF (Liang and Larson, arXiv 2412.16148).

    score = u - p, u uniform in [0, 1), p = max(0, 1 - sqrt(t / f)), f the word's share of all words of the training
    captions, t = 1e-6.

    Deviations from the release: tokens take the place of words; a token that was never counted (f = 0) has p = 0, as
    the equation says, where the release removes words seen less than five times first.
    """

    needs_frequencies = True

    def score(self, tokens: Int[Tensor, "B T"], context: TextReductionContext) -> Float[Tensor, "B T"]:
        assert context.frequencies is not None
        suppressed = (1.0 - (1e-6 / context.frequencies[tokens]).sqrt()).clamp(min=0.0)
        return context.uniform(tokens) - suppressed


TEXT_REDUCTIONS: dict[str, type[TextReduction]] = {
    "truncate": Truncation,
    "random": RandomReduction,
    "block": BlockReduction,
    "frequency": FrequencyReduction,
}


class HiddenTokens(NamedTuple):
    """Captions with `hidden` tokens to predict; of the `tokens`, the encoder sees the `masked` as the mask token."""

    tokens: Int[Tensor, "B T"]
    masked: Bool[Tensor, "B T"]
    hidden: Bool[Tensor, "B T"]


def hide_tokens(
    tokens: Int[Tensor, "B T"], mask_ratio: float, seeds: Int[Tensor, " B"], vocab_size: int, purpose: str
) -> HiddenTokens:
    """Hide each token with probability `mask_ratio` (BERT, arXiv 1810.04805, section 3.1).

    Of the hidden tokens, 80 % are replaced by the mask token and 10 % by a uniformly random token; 10 % stay as they
    are. SOT, EOT and padding are never hidden. A row's draws depend on its own seed alone, not on T.

    Args:
        tokens: (B, T) int64, rows of SOT, the caption, EOT (the highest id of the row), then padding.
        mask_ratio: probability in [0, 1).
        seeds: (B,) int64 per-sample seeds.
        vocab_size: SOT and EOT are its last two ids, as in CLIP's vocabulary; random tokens are drawn from the others.
        purpose: separates this draw from others with the same seeds.
    """
    length = tokens.shape[1]
    chosen, fate, other = (rng.uniform(seeds, length, f"{purpose}/{draw}") for draw in ("hide", "fate", "other"))
    hidden = is_word(tokens) & (chosen < mask_ratio)
    masked = hidden & (fate < 0.8)
    replaced = hidden & ~masked & (fate < 0.8 + 0.1)
    drawn = (other * (vocab_size - 2)).long()
    return HiddenTokens(torch.where(replaced, drawn, tokens), masked, hidden)
