"""Attentive masking against the release's numbers and a slow transcription of the definition."""

import itertools
import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aclip.errors import ConfigError
from aclip.masking import AttentiveMasking, MaskingContext, num_keep
from golden_numbers import Golden


def context_of(scores: torch.Tensor, grid: tuple[int, int]) -> MaskingContext:
    return MaskingContext(len(scores), grid, "cpu", scores=scores, seeds=torch.arange(len(scores)))


def whole_scores(batch_size: int, count: int, highest: int, seed: int) -> torch.Tensor:
    """Return whole numbers, so that sums are exact; a small `highest` makes many ties."""
    noise = torch.Generator().manual_seed(seed)
    return torch.randint(0, highest + 1, (batch_size, count), generator=noise).float()


def slow_blocks(scores: list[float], grid: tuple[int, int], side: int) -> list[tuple[float, list[int]]]:
    """Return (summed score, patches) of every block, row by row."""
    height, width = grid
    if height % side or width % side:
        side = 1
    blocks = []
    for top in range(0, height, side):
        for left in range(0, width, side):
            patches = [(top + i) * width + left + j for i in range(side) for j in range(side)]
            blocks.append((sum(scores[p] for p in patches), patches))
    return blocks


def slow_choice(
    scores: list[float], grid: tuple[int, int], ratio: float, side: int, lowest: bool = False
) -> list[int]:
    """Return the kept patches of one sample: best blocks first, ties to the lower index."""
    blocks = slow_blocks(scores, grid, side)
    order = sorted(range(len(blocks)), key=lambda b: (blocks[b][0] if lowest else -blocks[b][0], b))
    kept = max(1, math.floor(len(blocks) * (1 - ratio) + 0.5))
    return sorted(patch for b in order[:kept] for patch in blocks[b][1])


@pytest.mark.parametrize(
    ("ratio", "removed"), [(0.5, "select/removed_keep50"), (0.7, "select/removed_keep30")]
)
def test_golden_selection(golden: Golden, ratio: float, removed: str) -> None:
    keep = AttentiveMasking(ratio)(context_of(golden["select/attention"], (14, 14)))
    mask = torch.ones(16, 196, dtype=torch.bool).scatter(1, keep, False)
    golden.check(removed, mask, tolerance=0.0)


@settings(max_examples=60, deadline=None)
@given(
    height=st.integers(1, 10),
    width=st.integers(1, 10),
    ratio=st.integers(0, 15),
    side=st.integers(1, 3),
    highest=st.sampled_from([0, 2, 1000]),
    keep=st.sampled_from(["highest", "lowest"]),
    seed=st.integers(0, 999),
)
def test_equals_the_slow_definition(
    height: int, width: int, ratio: int, side: int, highest: int, keep: str, seed: int
) -> None:
    grid, share = (height, width), ratio / 16
    scores = whole_scores(3, height * width, highest, seed)
    ours = AttentiveMasking(share, block_size=side, keep=keep)(context_of(scores, grid))
    assert ours.tolist() == [slow_choice(row, grid, share, side, keep == "lowest") for row in scores.tolist()]


@pytest.mark.parametrize("keep", ["highest", "lowest"])
def test_ties_go_to_the_lower_index(keep: str) -> None:
    constant = torch.full((2, 16), 0.3)
    assert AttentiveMasking(0.5, 1, keep)(context_of(constant, (4, 4))).tolist() == [list(range(8))] * 2
    # blocks of two rows: the upper two blocks
    assert AttentiveMasking(0.5, 2, keep)(context_of(constant, (4, 4))).tolist() == [list(range(8))] * 2
    tied = torch.tensor([[1.0, 5.0, 3.0, 3.0, 3.0]])
    expected = {"highest": [1, 2, 3], "lowest": [0, 2, 3]}
    assert AttentiveMasking(0.4, 1, keep)(context_of(tied, (1, 5))).tolist() == [expected[keep]]


def test_lowest_and_highest_are_complements_where_scores_differ() -> None:
    scores = torch.stack(
        [torch.randperm(64, generator=torch.Generator().manual_seed(s)) for s in range(4)]
    ).float()
    highest, lowest = (
        AttentiveMasking(0.5, 1, keep)(context_of(scores, (8, 8))) for keep in ("highest", "lowest")
    )
    assert torch.equal(torch.cat([highest, lowest], dim=1).sort(dim=1).values, torch.arange(64).expand(4, 64))


@pytest.mark.parametrize(("grid", "ratio"), [((14, 14), 0.5), ((5, 9), 0.7), ((1, 1), 0.5), ((4, 4), 0.0)])
def test_mixed_keeps_half_by_score(grid: tuple[int, int], ratio: float) -> None:
    scores = whole_scores(40, grid[0] * grid[1], 1000, seed=1)
    keep = AttentiveMasking(ratio, 2, "mixed")(context_of(scores, grid))
    for kept, row in zip(keep.tolist(), scores.tolist(), strict=True):
        blocks = slow_blocks(row, grid, 2)
        count = max(1, math.floor(len(blocks) * (1 - ratio) + 0.5))
        order = sorted(range(len(blocks)), key=lambda b: (-blocks[b][0], b))
        best = {patch for b in order[: math.ceil(count / 2)] for patch in blocks[b][1]}
        chosen = [b for b in range(len(blocks)) if set(blocks[b][1]) <= set(kept)]
        assert best <= set(kept)
        assert len(chosen) == count
        assert len(kept) == count * len(blocks[0][1])


def test_mixed_draws_the_rest_uniformly_and_per_sample() -> None:
    scores = torch.arange(10.0).flip(0).expand(6000, 10).contiguous()
    keep = AttentiveMasking(0.6, 1, "mixed")(context_of(scores, (1, 10)))  # 2 by score, 2 of the other 8
    counts = torch.bincount(keep.flatten(), minlength=10)
    assert counts[:2].tolist() == [6000, 6000]
    assert (
        (counts[2:] - 1500) ** 2 / 1500
    ).sum() < 29  # 7 degrees of freedom: 1 in 10^4; the draws are fixed
    other = replace(context_of(scores, (1, 10)), purpose="other")
    assert not torch.equal(AttentiveMasking(0.6, 1, "mixed")(other), keep)


def test_sampled_draws_in_proportion_to_the_scores_without_replacement() -> None:
    weights = (0.1, 0.2, 0.3, 0.4)
    keep = AttentiveMasking(0.5, 1, "sampled")(context_of(torch.tensor(weights).expand(20_000, 4), (1, 4)))
    drawn = Counter(map(tuple, keep.tolist()))
    for pair in itertools.combinations(range(4), 2):  # either of the two first, then the other among those left
        first, second = (weights[i] for i in pair)
        expected = first * second / (1 - first) + second * first / (1 - second)
        assert drawn[pair] / 20_000 == pytest.approx(expected, abs=4 * math.sqrt(expected / 20_000))
    assert sum(drawn.values()) == 20_000


def test_sampled_takes_what_scores_nothing_last() -> None:
    scores = torch.tensor([0.0, 1e-6, 0.0, 1.0]).expand(1000, 4)
    assert AttentiveMasking(0.5, 1, "sampled")(context_of(scores, (1, 4))).unique(dim=0).tolist() == [[1, 3]]


@pytest.mark.parametrize(
    ("ratio", "grid", "nearest", "released"),
    [
        (0.5, (14, 14), 25, 25),  # 24.5: both say 25
        (0.7, (14, 14), 15, 15),  # 14.7
        (0.25, (14, 14), 37, 37),  # 36.75
        (0.5, (4, 4), 2, 3),  # a whole number: the release keeps one more
        (0.6875, (8, 8), 5, 6),
        (0.9375, (2, 16), 1, 1),
        (0.9, (4, 10), 1, 2),  # a whole number, of which 10 * (1 - 0.9) falls short in binary
        (0.0, (14, 14), 49, 49),  # never more than there are
    ],
)
def test_released_rounding(ratio: float, grid: tuple[int, int], nearest: int, released: int) -> None:
    for rounding, blocks in (("nearest", nearest), ("released", released)):
        strategy = AttentiveMasking(ratio, rounding=rounding)
        assert strategy.num_keep(grid) == 4 * blocks
        scores = torch.rand(2, grid[0] * grid[1], generator=torch.Generator().manual_seed(0))
        assert strategy(context_of(scores, grid)).shape == (2, 4 * blocks)


def test_blocks_that_do_not_tile_become_single_patches() -> None:
    scores = whole_scores(4, 49, 1000, seed=2)
    in_blocks, single = (AttentiveMasking(0.5, side)(context_of(scores, (7, 7))) for side in (2, 1))
    assert torch.equal(in_blocks, single)
    assert in_blocks.shape[1] == num_keep(0.5, 7, 2) == 25


def test_half_precision_scores_are_pooled_in_full() -> None:
    # in float16 both block sums round to the same number
    scores = torch.tensor([[2048.0, 0, 2048.0, 1.0], [0, 0, 0, 0]]).reshape(1, 8).half()
    assert AttentiveMasking(0.5)(context_of(scores, (2, 4))).tolist() == [[2, 3, 6, 7]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"keep": "high"},
            "unknown value for keep 'high': did you mean 'highest'. There are: highest, lowest, mixed, sampled",
        ),
        ({"rounding": "up"}, "unknown value for rounding 'up'"),
        ({"block_size": 0}, "at least 1"),
    ],
)
@pytest.mark.usefixtures("without_type_checks")
def test_refuses(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        AttentiveMasking(0.5, **options)


def test_needs_scores_of_its_own_grid() -> None:
    assert AttentiveMasking.needs_scores
    with pytest.raises(ValueError, match="needs scores"):
        AttentiveMasking(0.5)(MaskingContext(2, (4, 4), "cpu"))
    with pytest.raises(ValueError, match=r"16 scores do not fit the grid \(7, 7\)"):
        AttentiveMasking(0.5)(MaskingContext(2, (7, 7), "cpu", scores=torch.rand(2, 16)))
