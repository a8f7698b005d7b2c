"""Text reductions and hidden tokens against literal loops over captions, and their rates."""

from itertools import combinations

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses import FakeTensorMode

from aclip import rng
from aclip.masking import TEXT_REDUCTIONS, TextReduction, TextReductionContext, hide_tokens

SOT, EOT, VOCABULARY = 998, 999, 1000


def captions_of(lengths: list[int], context: int, seed: int = 0) -> Tensor:
    """Return rows of SOT, words with ids from 0 on, EOT, zeros."""
    noise = torch.Generator().manual_seed(seed)
    rows = torch.zeros(len(lengths), context, dtype=torch.int64)
    for row, length in zip(rows, lengths, strict=True):
        row[0] = SOT
        row[1 : length + 1] = torch.randint(0, 990, (length,), generator=noise)
        row[length + 1] = EOT
    return rows


def some_frequencies(seed: int = 0) -> Tensor:
    """Return frequencies from 1e-8 to 1e-2; every tenth id was never seen."""
    frequencies = 10.0 ** (-8 + 6 * torch.rand(1000, generator=torch.Generator().manual_seed(seed)))
    frequencies[::10] = 0.0
    return frequencies


def context_of(batch_size: int, first_seed: int = 0) -> TextReductionContext:
    return TextReductionContext(torch.arange(first_seed, first_seed + batch_size), some_frequencies())


def slow_choice(name: str, words: list[int], draws: list[float], num_keep: int) -> list[int]:
    """Return the positions of the words of one caption that stay; draws[0] belongs to SOT."""
    if len(words) <= num_keep:
        return list(range(len(words)))
    if name == "truncate":
        return list(range(num_keep))
    if name == "block":
        first = int(np.floor(np.float32(draws[0]) * np.float32(len(words) - num_keep + 1)))
        return list(range(first, first + num_keep))
    scores = []
    for word, draw in zip(words, draws[1:], strict=False):
        suppressed = np.float32(0)
        if name == "frequency":
            f = some_frequencies()[word].numpy()
            if f > 0:
                suppressed = max(np.float32(0), np.float32(1) - np.sqrt(np.float32(1e-6) / f))
        scores.append(np.float32(draw) - suppressed)
    return sorted(sorted(range(len(words)), key=lambda i: -scores[i])[:num_keep])


every_reduction = pytest.mark.parametrize("name", TEXT_REDUCTIONS)
lengths = st.lists(st.integers(0, 18), min_size=1, max_size=6)


@every_reduction
@settings(max_examples=40, deadline=None)
@given(lengths=lengths, num_keep=st.integers(1, 20), spare=st.integers(0, 4), seed=st.integers(0, 999))
def test_reduction_equals_a_literal_loop(name: str, lengths: list[int], num_keep: int, spare: int, seed: int) -> None:
    tokens = captions_of(lengths, max(lengths) + 2 + spare, seed)
    reduced = TEXT_REDUCTIONS[name](num_keep)(tokens, context_of(len(lengths), seed))
    width = min(tokens.shape[1], num_keep + 2)
    assert reduced.dtype == torch.int64
    assert reduced.shape == (len(lengths), width)
    draws = rng.uniform(torch.arange(seed, seed + len(lengths)), tokens.shape[1], "text").tolist()
    for ours, row, length, row_draws in zip(reduced.tolist(), tokens.tolist(), lengths, draws, strict=True):
        words = row[1 : length + 1]
        kept = [words[i] for i in slow_choice(name, words, row_draws, num_keep)]
        expected = [SOT, *kept, EOT]
        assert ours == expected + [0] * (width - len(expected))


@every_reduction
def test_short_captions_are_unchanged(name: str) -> None:
    tokens = captions_of([0, 1, 5, 6], 20)
    reduced = TEXT_REDUCTIONS[name](6)(tokens, context_of(4))
    assert torch.equal(reduced, tokens[:, :8])
    short = tokens[:, :8]
    assert torch.equal(TEXT_REDUCTIONS[name](6)(short, context_of(4)), short)


@every_reduction
def test_reduction_of_a_row_depends_on_its_seed_alone(name: str) -> None:
    tokens = captions_of([18, 12, 9, 17, 3], 20)
    context = context_of(5)
    reduce = TEXT_REDUCTIONS[name](6)
    whole = reduce(tokens, context)
    assert torch.equal(reduce(tokens, context), whole)
    order = [3, 1, 1]
    part = TextReductionContext(context.seeds[order], context.frequencies)
    assert torch.equal(reduce(tokens[order], part), whole[order])
    padded = F.pad(tokens, (0, 57))
    assert torch.equal(reduce(padded, context), whole)
    other = reduce(tokens, context_of(5, first_seed=100))
    assert torch.equal(other, whole) == (name == "truncate")


@every_reduction
def test_does_not_synchronise_with_the_host(name: str) -> None:
    with FakeTensorMode():  # tensors without values: reading one raises
        context = TextReductionContext(torch.arange(4), torch.empty(1000))
        assert TEXT_REDUCTIONS[name](6)(torch.empty(4, 20, dtype=torch.int64), context).shape == (4, 8)


@every_reduction
def test_rows_of_open_clip(name: str) -> None:
    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    texts = ["", "a dog!", "two brown dogs run over a wide and snowy field towards their house !!", "dog " * 200]
    tokens = tokenizer(texts)
    context = TextReductionContext(torch.arange(4), torch.full((49408,), 1e-4))
    reduced = TEXT_REDUCTIONS[name](8)(tokens, context)
    assert torch.equal(reduced[:2], tokens[:2, :10])
    assert (reduced[:, 0] == tokenizer.sot_token_id).all()
    assert ((reduced == tokenizer.eot_token_id).sum(dim=1) == 1).all()
    assert (reduced[2:, 9] == tokenizer.eot_token_id).all()


def chi_square(counts: list[int]) -> float:
    mean = sum(counts) / len(counts)
    return sum((count - mean) ** 2 / mean for count in counts)


def test_every_subset_and_every_block_is_equally_likely() -> None:
    row = torch.tensor([SOT, 1, 2, 3, 4, 5, EOT, 0])
    tokens = row.expand(6000, 8)
    drawn = TEXT_REDUCTIONS["random"](2)(tokens, context_of(6000))[:, 1:3]
    subsets = [int((drawn == torch.tensor(pair)).all(dim=1).sum()) for pair in combinations(range(1, 6), 2)]
    assert sum(subsets) == 6000
    assert chi_square(subsets) < 33  # 9 degrees of freedom: 1 in 10^4; the draws are fixed
    first = TEXT_REDUCTIONS["block"](3)(tokens, context_of(6000))[:, 1]
    starts = [int((first == word).sum()) for word in (1, 2, 3)]
    assert sum(starts) == 6000
    assert chi_square(starts) < 18.4  # 2 degrees of freedom


@pytest.mark.parametrize(("rare", "frequent"), [(1e-7, 1e-4), (4e-6, 1e-4), (1e-5, 1.1e-5), (0.0, 0.05)])
def test_rare_words_stay_as_often_as_the_equation_says(rare: float, frequent: float) -> None:
    # one of two words stays; with d the difference of their p, the rare one with probability 1 - (1 - d)^2 / 2
    p_rare, p_frequent = (max(0.0, 1 - (1e-6 / f) ** 0.5) if f else 0.0 for f in (rare, frequent))
    expected = 1 - (1 - (p_frequent - p_rare)) ** 2 / 2
    frequencies = torch.zeros(1000)
    frequencies[7], frequencies[8] = frequent, rare
    count = 20_000
    tokens = torch.tensor([SOT, 7, 8, EOT]).expand(count, 4)
    kept = TEXT_REDUCTIONS["frequency"](1)(tokens, TextReductionContext(torch.arange(count), frequencies))
    share = (kept[:, 1] == 8).double().mean().item()
    assert abs(share - expected) < 4 * (0.25 / count) ** 0.5  # four standard deviations; the draws are fixed


def test_frequency_alone_needs_frequencies() -> None:
    assert {name for name, reduction in TEXT_REDUCTIONS.items() if reduction.needs_frequencies} == {"frequency"}


def test_a_reduction_of_the_users_own() -> None:
    class Last(TextReduction):
        def score(self, tokens: Tensor, context: TextReductionContext) -> Tensor:
            return torch.arange(tokens.shape[1], dtype=torch.float32).expand(tokens.shape)

    tokens = captions_of([5, 2], 9)
    reduced = Last(3)(tokens, context_of(2))
    assert reduced.tolist() == [[SOT, *tokens[0, 3:6].tolist(), EOT], [*tokens[1, :4].tolist(), 0]]


def seeds(count: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 2**62, (count,), generator=torch.Generator().manual_seed(seed))


def literal(
    tokens: Tensor, ratio: float, seeds: Tensor, purpose: str
) -> tuple[list[list[int]], list[list[bool]], list[list[bool]]]:
    """Return (tokens seen, masked, hidden) by section 3.1 of BERT, token by token."""
    draws = {name: rng.uniform(seeds, tokens.shape[1], f"{purpose}/{name}").tolist()
             for name in ("hide", "fate", "other")}
    seen, masked, hidden = tokens.tolist(), [], []
    for row, caption in enumerate(tokens.tolist()):
        masked.append([False] * len(caption))
        hidden.append([False] * len(caption))
        for i, token in enumerate(caption):
            if token == EOT:
                break
            if i == 0 or draws["hide"][row][i] >= ratio:
                continue
            hidden[row][i] = True
            if draws["fate"][row][i] < 0.8:
                masked[row][i] = True
            elif draws["fate"][row][i] < 0.9:
                seen[row][i] = int(draws["other"][row][i] * (VOCABULARY - 2))
    return seen, masked, hidden


@settings(max_examples=60, deadline=None)
@given(
    words=st.lists(st.integers(0, 12), min_size=1, max_size=8),
    padding=st.integers(0, 5),
    ratio=st.floats(0, 0.999),
    seed=st.integers(0, 2**31),
)
def test_equals_a_loop_over_tokens(words: list[int], padding: int, ratio: float, seed: int) -> None:
    tokens = captions_of(words, max(words) + 2 + padding, seed)
    ours = hide_tokens(tokens, ratio, seeds(len(words), seed), VOCABULARY, "text/x")
    seen, masked, hidden = literal(tokens, ratio, seeds(len(words), seed), "text/x")
    assert ours.tokens.tolist() == seen
    assert ours.masked.tolist() == masked
    assert ours.hidden.tolist() == hidden


def test_start_end_and_padding_are_never_hidden() -> None:
    tokens = captions_of([0, 1, 5, 10] * 200, 14)
    ours = hide_tokens(tokens, 0.999, seeds(800), VOCABULARY, "text")
    position, end = torch.arange(14), tokens.argmax(dim=1, keepdim=True)
    inside = (position > 0) & (position < end)
    assert ours.hidden[inside].float().mean() > 0.99
    assert not ours.hidden[~inside].any()
    assert not (ours.masked & ~ours.hidden).any()
    assert torch.equal(ours.tokens[~inside], tokens[~inside])


@pytest.mark.parametrize("ratio", [0.2, 0.6])
def test_rates_are_those_of_bert(ratio: float) -> None:
    tokens = captions_of([30] * 4000, 32)
    ours = hide_tokens(tokens, ratio, seeds(4000), VOCABULARY, "text")
    hidden = ours.hidden[:, 1:31]
    total = int(hidden.sum())

    def close(count: Tensor, of: int, share: float) -> bool:
        """Within 4 standard deviations of a binomial count; the draws are fixed."""
        return abs(float(count) - of * share) < 4 * (of * share * (1 - share)) ** 0.5

    assert close(hidden.sum(), hidden.numel(), ratio)
    assert all(close(column.sum(), len(column), ratio) for column in hidden.T)
    assert close(ours.masked.sum(), total, 0.8)
    visible = ours.hidden & ~ours.masked
    changed = visible & (ours.tokens != tokens)
    # one random token in VOCABULARY - 2 equals the original by chance
    assert close(changed.sum(), total, 0.1 * (1 - 1 / (VOCABULARY - 2)))
    assert close((visible & ~changed).sum(), total, 0.1 * (1 + 1 / (VOCABULARY - 2)))
    assert torch.equal(ours.tokens[~visible], tokens[~visible])


def test_random_tokens_are_uniform_and_never_start_or_end() -> None:
    tokens = captions_of([62] * 4000, 64)
    tokens[:, 1:63] = 7
    ours = hide_tokens(tokens, 0.9, seeds(4000), VOCABULARY, "text")
    counts = torch.bincount(ours.tokens[:, 1:63].flatten(), minlength=VOCABULARY)
    assert counts[SOT] == counts[EOT] == 0
    others = torch.cat([counts[:7], counts[8:SOT]]).double()
    assert ((others - others.mean()) ** 2 / others.mean()).sum() < 1168  # 996 degrees of freedom: 1 in 10^4


def test_a_row_depends_on_its_own_seed_alone() -> None:
    tokens, drawn = captions_of([9, 4, 12, 7], 14), seeds(4)
    whole = hide_tokens(tokens, 0.4, drawn, VOCABULARY, "text")
    again = hide_tokens(tokens, 0.4, drawn, VOCABULARY, "text")
    alone = hide_tokens(tokens[[2, 0]], 0.4, drawn[[2, 0]], VOCABULARY, "text")
    longer = hide_tokens(F.pad(tokens, (0, 63)), 0.4, drawn, VOCABULARY, "text")
    for name in ("tokens", "masked", "hidden"):
        expected = getattr(whole, name)
        assert torch.equal(getattr(again, name), expected)
        assert torch.equal(getattr(alone, name), expected[[2, 0]])
        assert torch.equal(getattr(longer, name)[:, :14], expected)
        assert not getattr(longer, name)[:, 14:].any()


def test_purposes_draw_independently_and_the_global_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    tokens = captions_of([40] * 50, 42)
    a, b = (hide_tokens(tokens, 0.5, seeds(50), VOCABULARY, purpose).hidden for purpose in ("text/a", "text/b"))
    assert not (a == b).all(dim=1).any()
    assert torch.equal(torch.get_rng_state(), before)


def test_a_ratio_of_zero_hides_nothing() -> None:
    tokens = captions_of([9, 4], 11)
    ours = hide_tokens(tokens, 0.0, seeds(2), VOCABULARY, "text")
    assert torch.equal(ours.tokens, tokens)
    assert not ours.hidden.any()
    assert not ours.masked.any()
