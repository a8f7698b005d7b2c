"""Hiding tokens as BERT does: against a loop over tokens, and how often each fate comes."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from aclip import rng
from aclip.masking import hide_tokens

VOCABULARY = 50
SOT, EOT = VOCABULARY - 2, VOCABULARY - 1


def captions(words: list[int], length: int, seed: int = 0) -> Tensor:
    """Return one caption for every count of words: SOT, words, EOT, zeros. Word 0 is a word like any other."""
    noise = torch.Generator().manual_seed(seed)
    tokens = torch.zeros(len(words), length, dtype=torch.int64)
    for row, count in enumerate(words):
        tokens[row, 0], tokens[row, count + 1] = SOT, EOT
        tokens[row, 1 : count + 1] = torch.randint(0, SOT, (count,), generator=noise)
    return tokens


def seeds(count: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 2**62, (count,), generator=torch.Generator().manual_seed(seed))


def literal(
    tokens: Tensor, ratio: float, seeds: Tensor, purpose: str
) -> tuple[list[list[int]], list[list[bool]], list[list[bool]]]:
    """Section 3.1 of BERT, token by token."""
    draws = {name: rng.uniform(seeds, tokens.shape[1], f"{purpose}/{name}").tolist()
             for name in ("hide", "fate", "other")}
    seen, behind, hidden = tokens.tolist(), [], []
    for row, caption in enumerate(tokens.tolist()):
        behind.append([False] * len(caption))
        hidden.append([False] * len(caption))
        for i, token in enumerate(caption):
            if token == EOT:
                break
            if i == 0 or draws["hide"][row][i] >= ratio:
                continue
            hidden[row][i] = True
            if draws["fate"][row][i] < 0.8:
                behind[row][i] = True
            elif draws["fate"][row][i] < 0.9:
                seen[row][i] = int(draws["other"][row][i] * (VOCABULARY - 2))
    return seen, behind, hidden


@settings(max_examples=60, deadline=None)
@given(
    words=st.lists(st.integers(0, 12), min_size=1, max_size=8),
    padding=st.integers(0, 5),
    ratio=st.floats(0, 0.999),
    seed=st.integers(0, 2**31),
)
def test_equals_a_loop_over_tokens(words: list[int], padding: int, ratio: float, seed: int) -> None:
    tokens = captions(words, max(words) + 2 + padding, seed)
    ours = hide_tokens(tokens, ratio, seeds(len(words), seed), VOCABULARY, "text/x")
    seen, behind, hidden = literal(tokens, ratio, seeds(len(words), seed), "text/x")
    assert ours.tokens.tolist() == seen
    assert ours.behind_mask.tolist() == behind
    assert ours.hidden.tolist() == hidden


def test_start_end_and_padding_are_never_hidden() -> None:
    tokens = captions([0, 1, 5, 10] * 200, 14)
    ours = hide_tokens(tokens, 0.999, seeds(800), VOCABULARY, "text")
    place, end = torch.arange(14), tokens.argmax(dim=1, keepdim=True)
    inside = (place > 0) & (place < end)
    assert ours.hidden[inside].float().mean() > 0.99
    assert not ours.hidden[~inside].any()
    assert not (ours.behind_mask & ~ours.hidden).any()
    assert torch.equal(ours.tokens[~inside], tokens[~inside])


@pytest.mark.parametrize("ratio", [0.2, 0.6])
def test_rates_are_berts(ratio: float) -> None:
    tokens = captions([30] * 4000, 32)
    ours = hide_tokens(tokens, ratio, seeds(4000), VOCABULARY, "text")
    hidden = ours.hidden[:, 1:31]
    total = int(hidden.sum())

    def close(count: Tensor, of: int, share: float) -> bool:
        """Within 4 standard deviations of a binomial count; the draws are fixed."""
        return abs(float(count) - of * share) < 4 * (of * share * (1 - share)) ** 0.5

    assert close(hidden.sum(), hidden.numel(), ratio)
    assert all(close(column.sum(), len(column), ratio) for column in hidden.T)
    assert close(ours.behind_mask.sum(), total, 0.8)
    visible = ours.hidden & ~ours.behind_mask
    changed = visible & (ours.tokens != tokens)
    # one random token in VOCABULARY - 2 is by chance the one that stood there
    assert close(changed.sum(), total, 0.1 * (1 - 1 / (VOCABULARY - 2)))
    assert close((visible & ~changed).sum(), total, 0.1 * (1 + 1 / (VOCABULARY - 2)))
    assert torch.equal(ours.tokens[~visible], tokens[~visible])


def test_random_tokens_are_uniform_and_never_start_or_end() -> None:
    tokens = captions([62] * 4000, 64)
    tokens[:, 1:63] = 7
    ours = hide_tokens(tokens, 0.9, seeds(4000), VOCABULARY, "text")
    counts = torch.bincount(ours.tokens[:, 1:63].flatten(), minlength=VOCABULARY)
    assert counts[SOT] == counts[EOT] == 0
    others = torch.cat([counts[:7], counts[8:SOT]]).double()
    assert ((others - others.mean()) ** 2 / others.mean()).sum() < 89  # 46 degrees of freedom: 1 in 10^4


def test_a_row_depends_on_its_own_seed_alone() -> None:
    tokens, drawn = captions([9, 4, 12, 7], 14), seeds(4)
    whole = hide_tokens(tokens, 0.4, drawn, VOCABULARY, "text")
    again = hide_tokens(tokens, 0.4, drawn, VOCABULARY, "text")
    alone = hide_tokens(tokens[[2, 0]], 0.4, drawn[[2, 0]], VOCABULARY, "text")
    longer = hide_tokens(F.pad(tokens, (0, 63)), 0.4, drawn, VOCABULARY, "text")
    for name in ("tokens", "behind_mask", "hidden"):
        expected = getattr(whole, name)
        assert torch.equal(getattr(again, name), expected)
        assert torch.equal(getattr(alone, name), expected[[2, 0]])
        assert torch.equal(getattr(longer, name)[:, :14], expected)
        assert not getattr(longer, name)[:, 14:].any()


def test_purposes_draw_apart_and_the_global_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    tokens = captions([40] * 50, 42)
    a, b = (hide_tokens(tokens, 0.5, seeds(50), VOCABULARY, purpose).hidden for purpose in ("text/a", "text/b"))
    assert not (a == b).all(dim=1).any()
    assert torch.equal(torch.get_rng_state(), before)


def test_a_ratio_of_zero_hides_nothing() -> None:
    tokens = captions([9, 4], 11)
    ours = hide_tokens(tokens, 0.0, seeds(2), VOCABULARY, "text")
    assert torch.equal(ours.tokens, tokens)
    assert not ours.hidden.any()
    assert not ours.behind_mask.any()
