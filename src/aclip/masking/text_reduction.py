"""Which tokens of a caption are kept: text made shorter, as masking makes images shorter.

A reduction is built from `num_keep` and called with a batch of tokens and a `TextReductionContext`. To add one: a
class with a `score` for every word, and a line in `TEXT_REDUCTIONS`; the contract tests run over the table.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from aclip import rng
from aclip.errors import ConfigError
from aclip.masking.base import best_first
from aclip.tokens import is_word

_THRESHOLD = 1e-6
"""t of frequency masking: words rarer than this share of all are never held back."""


@dataclass(frozen=True)
class TextReductionContext:
    """What a reduction may look at besides the tokens.

    Attributes:
        seeds: (B,) int64; with them a row's draws depend on its own seed alone, not on the rest of the batch or on
            how far it is padded.
        frequencies: (V,) float, the share of each token id in the training captions, on the tokens' device
            (`aclip.data.token_frequencies`).
        generator: source of randomness when `seeds` are absent; None is torch's default generator.
    """

    seeds: Int[Tensor, " B"] | None = None
    frequencies: Float[Tensor, " V"] | None = None
    generator: torch.Generator | None = None

    def uniform(self, tokens: Int[Tensor, "B T"]) -> Float[Tensor, "B T"]:
        """Return one draw in [0, 1) for every token, per sample where seeds are known."""
        if self.seeds is not None:
            return rng.uniform(self.seeds, tokens.shape[1], "text")
        return torch.rand(tokens.shape, device=tokens.device, generator=self.generator)


class TextReduction(ABC):
    """Shortens captions to `num_keep` tokens; the start and end tokens stay and are not counted.

    Attributes:
        needs_frequencies: whether `TextReductionContext.frequencies` must be given.
    """

    needs_frequencies: ClassVar[bool] = False

    def __init__(self, num_keep: int) -> None:
        """Set how many tokens of a caption stay, at least 1."""
        if num_keep < 1:
            raise ConfigError(f"num_keep counts the tokens of a caption that stay, at least 1, not {num_keep}")
        self.num_keep = num_keep

    def __call__(self, tokens: Int[Tensor, "B T"], context: TextReductionContext) -> Int[Tensor, "B S"]:
        """Return the captions with `num_keep` tokens at most, in their order.

        Nothing is read back to the host: the width of the result depends on T and `num_keep` alone.

        Args:
            tokens: (B, T) int64, rows as open_clip's tokenizers for CLIP make them: start, the caption, end (the
                row's highest id), then zeros.
            context: draws and frequencies.

        Returns:
            (B, S) int64 of the same layout, S = min(T, num_keep + 2). Captions that are short enough are unchanged.

        Raises:
            ValueError: no frequencies for a reduction that needs them.
        """
        if self.needs_frequencies and context.frequencies is None:
            raise ValueError("this reduction needs token frequencies; pass TextReductionContext(frequencies=...)")
        width = self.num_keep + 2
        if tokens.shape[1] <= width:
            return tokens
        end = tokens.argmax(dim=1, keepdim=True)
        position = torch.arange(tokens.shape[1], device=tokens.device)
        # start and end before every word, padding after, so that a fixed number of the best is always right
        scores = torch.where(is_word(tokens), self.score(tokens, end[:, 0] - 1, context), torch.inf)
        scores = scores.masked_fill(position > end, -torch.inf)
        return tokens.gather(1, best_first(scores)[:, :width].sort(dim=1).values)

    @abstractmethod
    def score(
        self, tokens: Int[Tensor, "B T"], words: Int[Tensor, " B"], context: TextReductionContext
    ) -> Float[Tensor, "B T"]:
        """Return how much each token should stay; of equal ones the earlier stays. Only words are looked at.

        Args:
            tokens: (B, T) int64; row b has its words at 1, ..., words[b].
            words: (B,) int64, tokens of each caption, start and end not counted.
            context: draws and frequencies.
        """


class Truncation(TextReduction):
    """Keeps the first tokens (Li et al., "An Inverse Scaling Law for CLIP Training", arXiv 2305.07017)."""

    def score(
        self, tokens: Int[Tensor, "B T"], words: Int[Tensor, " B"], context: TextReductionContext
    ) -> Float[Tensor, "B T"]:
        """All are equal."""
        return torch.zeros(tokens.shape, device=tokens.device)


class RandomReduction(TextReduction):
    """Keeps tokens at random, every subset as likely ("random masking" of arXiv 2305.07017)."""

    def score(
        self, tokens: Int[Tensor, "B T"], words: Int[Tensor, " B"], context: TextReductionContext
    ) -> Float[Tensor, "B T"]:
        """Independent draws."""
        return context.uniform(tokens)


class BlockReduction(TextReduction):
    """Keeps consecutive tokens, every start as likely ("block masking" of arXiv 2305.07017)."""

    def score(
        self, tokens: Int[Tensor, "B T"], words: Int[Tensor, " B"], context: TextReductionContext
    ) -> Float[Tensor, "B T"]:
        """1 inside the block, 0 outside."""
        starts = (words - self.num_keep + 1).clamp(min=1)
        skipped = (context.uniform(tokens)[:, 0] * starts).floor()[:, None]
        position = torch.arange(tokens.shape[1], device=tokens.device)
        return ((position > skipped) & (position <= skipped + self.num_keep)).float()


class FrequencyReduction(TextReduction):
    """Keeps rare words more often than frequent ones: CLIPF (Liang and Larson, arXiv 2412.16148).

    score = u - p, u uniform in [0, 1), p = max(0, 1 - sqrt(t / f)), f the word's share of all words of the training
    captions, t = 1e-6.

    Deviations: tokens take the place of words, of which some are several tokens; a token that was never counted
    (f = 0) has p = 0, as the equation says, where the authors' release removes words seen less than five times
    first.
    """

    needs_frequencies = True

    def score(
        self, tokens: Int[Tensor, "B T"], words: Int[Tensor, " B"], context: TextReductionContext
    ) -> Float[Tensor, "B T"]:
        """A draw less the probability of being held back."""
        assert context.frequencies is not None
        held_back = (1.0 - (_THRESHOLD / context.frequencies[tokens]).sqrt()).clamp(min=0.0)
        return context.uniform(tokens) - held_back


TEXT_REDUCTIONS: dict[str, type[TextReduction]] = {
    "truncate": Truncation,
    "random": RandomReduction,
    "block": BlockReduction,
    "frequency": FrequencyReduction,
}
