"""Shorter captions: each reduction against a literal loop, and a contract over the table."""

from itertools import combinations

import numpy as np
import open_clip
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode

from aclip import rng
from aclip.errors import ConfigError
from aclip.masking import TEXT_REDUCTIONS, TextReductionContext

START, END = 998, 999


def captions_of(lengths: list[int], context: int, seed: int = 0) -> torch.Tensor:
    """Return rows of start, words with ids from 0 on, end, zeros."""
    noise = torch.Generator().manual_seed(seed)
    rows = torch.zeros(len(lengths), context, dtype=torch.int64)
    for row, length in zip(rows, lengths, strict=True):
        row[0] = START
        row[1 : length + 1] = torch.randint(0, 990, (length,), generator=noise)
        row[length + 1] = END
    return rows


def made_frequencies(seed: int = 0) -> torch.Tensor:
    """From 1e-8 to 1e-2, and every tenth id never seen."""
    frequencies = 10.0 ** (-8 + 6 * torch.rand(1000, generator=torch.Generator().manual_seed(seed)))
    frequencies[::10] = 0.0
    return frequencies


def context_of(batch_size: int, first_seed: int = 0) -> TextReductionContext:
    return TextReductionContext(torch.arange(first_seed, first_seed + batch_size), made_frequencies())


def slow_choice(name: str, words: list[int], draws: list[float], num_keep: int) -> list[int]:
    """Return which of one caption's words stay, by place; draws[0] belongs to the start token."""
    if len(words) <= num_keep:
        return list(range(len(words)))
    if name == "truncate":
        return list(range(num_keep))
    if name == "block":
        first = int(np.floor(np.float32(draws[0]) * np.float32(len(words) - num_keep + 1)))
        return list(range(first, first + num_keep))
    scores = []
    for word, draw in zip(words, draws[1:], strict=False):
        held_back = np.float32(0)
        if name == "frequency":
            f = made_frequencies()[word].numpy()
            if f > 0:
                held_back = max(np.float32(0), np.float32(1) - np.sqrt(np.float32(1e-6) / f))
        scores.append(np.float32(draw) - held_back)
    return sorted(sorted(range(len(words)), key=lambda place: -scores[place])[:num_keep])


every_reduction = pytest.mark.parametrize("name", TEXT_REDUCTIONS)
lengths = st.lists(st.integers(0, 18), min_size=1, max_size=6)


@every_reduction
@settings(max_examples=40, deadline=None)
@given(lengths=lengths, num_keep=st.integers(1, 20), spare=st.integers(0, 4), seed=st.integers(0, 999))
def test_equals_a_literal_loop(name: str, lengths: list[int], num_keep: int, spare: int, seed: int) -> None:
    tokens = captions_of(lengths, max(lengths) + 2 + spare, seed)
    reduced = TEXT_REDUCTIONS[name](num_keep)(tokens, context_of(len(lengths), seed))
    width = min(tokens.shape[1], num_keep + 2)
    assert reduced.dtype == torch.int64
    assert reduced.shape == (len(lengths), width)
    draws = rng.uniform(torch.arange(seed, seed + len(lengths)), tokens.shape[1], "text").tolist()
    for ours, row, length, row_draws in zip(reduced.tolist(), tokens.tolist(), lengths, draws, strict=True):
        words = row[1 : length + 1]
        kept = [words[place] for place in slow_choice(name, words, row_draws, num_keep)]
        expected = [START, *kept, END]
        assert ours == expected + [0] * (width - len(expected))


@every_reduction
def test_short_captions_are_unchanged(name: str) -> None:
    tokens = captions_of([0, 1, 5, 6], 20)
    reduced = TEXT_REDUCTIONS[name](6)(tokens, context_of(4))
    assert torch.equal(reduced, tokens[:, :8])
    short = tokens[:, :8]
    assert torch.equal(TEXT_REDUCTIONS[name](6)(short, context_of(4)), short)


@every_reduction
def test_a_row_depends_on_its_seed_alone(name: str) -> None:
    tokens = captions_of([18, 12, 9, 17, 3], 20)
    context = context_of(5)
    reduce = TEXT_REDUCTIONS[name](6)
    whole = reduce(tokens, context)
    assert torch.equal(reduce(tokens, context), whole)
    order = [3, 1, 1]
    part = TextReductionContext(context.seeds[order], context.frequencies)
    assert torch.equal(reduce(tokens[order], part), whole[order])
    padded = torch.nn.functional.pad(tokens, (0, 57))
    assert torch.equal(reduce(padded, context), whole)
    other = reduce(tokens, context_of(5, first_seed=100))
    assert torch.equal(other, whole) == (name == "truncate")


@every_reduction
def test_generator_is_used_without_seeds(name: str) -> None:
    tokens = captions_of([18] * 8, 20)
    before = torch.get_rng_state()
    first, again, other = (
        TEXT_REDUCTIONS[name](6)(
            tokens, TextReductionContext(None, made_frequencies(), torch.Generator().manual_seed(s))
        )
        for s in (1, 1, 2)
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, again)
    assert torch.equal(first, other) == (name == "truncate")


@every_reduction
def test_reads_no_value_back_to_the_host(name: str) -> None:
    with FakeTensorMode():  # tensors without values: what asks for one raises
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


def test_every_subset_and_every_block_is_as_likely() -> None:
    row = torch.tensor([START, 1, 2, 3, 4, 5, END, 0])
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
    tokens = torch.tensor([START, 7, 8, END]).expand(count, 4)
    kept = TEXT_REDUCTIONS["frequency"](1)(tokens, TextReductionContext(torch.arange(count), frequencies))
    share = (kept[:, 1] == 8).double().mean().item()
    assert abs(share - expected) < 4 * (0.25 / count) ** 0.5  # four standard deviations; the draws are fixed


def test_frequency_needs_frequencies() -> None:
    assert {name for name, reduction in TEXT_REDUCTIONS.items() if reduction.needs_frequencies} == {"frequency"}
    for context_length in (20, 4):
        with pytest.raises(ValueError, match="needs token frequencies"):
            TEXT_REDUCTIONS["frequency"](3)(captions_of([2], context_length), TextReductionContext(torch.arange(1)))


@every_reduction
def test_refuses_to_keep_nothing(name: str) -> None:
    with pytest.raises(ConfigError, match="at least 1, not 0"):
        TEXT_REDUCTIONS[name](0)
