"""Attentive masking and score maps: the release's numbers, slow transcriptions of the definitions."""

import itertools
import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from aclip.errors import ConfigError
from aclip.masking import AttentiveMasking, MaskingContext, crop_scores, num_keep
from golden_numbers import Golden

Box = tuple[float, float, float, float]


def context_of(scores: torch.Tensor, grid: tuple[int, int]) -> MaskingContext:
    return MaskingContext(len(scores), grid, "cpu", scores=scores, seeds=torch.arange(len(scores)))


def integer_scores(batch_size: int, count: int, highest: int, seed: int) -> torch.Tensor:
    """Return integers, so that sums are exact; a small `highest` gives many ties."""
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
    scores = integer_scores(3, height * width, highest, seed)
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
    scores = integer_scores(40, grid[0] * grid[1], 1000, seed=1)
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


def test_sampled_takes_patches_of_score_0_last() -> None:
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
    scores = integer_scores(4, 49, 1000, seed=2)
    in_blocks, single = (AttentiveMasking(0.5, side)(context_of(scores, (7, 7))) for side in (2, 1))
    assert torch.equal(in_blocks, single)
    assert in_blocks.shape[1] == num_keep(0.5, 7, 2) == 25


def test_half_precision_scores_are_pooled_in_full() -> None:
    # in float16 both block sums round to the same number
    scores = torch.tensor([[2048.0, 0, 2048.0, 1.0], [0, 0, 0, 0]]).reshape(1, 8).half()
    assert AttentiveMasking(0.5)(context_of(scores, (2, 4))).tolist() == [[2, 3, 6, 7]]


def test_needs_scores_of_its_own_grid() -> None:
    with pytest.raises(ConfigError, match="ranks patches by their scores"):
        AttentiveMasking(0.5)(MaskingContext(2, (4, 4), "cpu"))
    with pytest.raises(ConfigError, match="16 scores do not fit the 7 x 7 grid"):
        AttentiveMasking(0.5)(MaskingContext(2, (7, 7), "cpu", scores=torch.rand(2, 16)))


def slow_crop_scores(
    scores: list[float],
    context_grid: tuple[int, int],
    context: Box,
    view: Box,
    grid: tuple[int, int],
    flipped: bool,
    padding: str,
) -> list[float]:
    """One sample, one patch at a time, from the definition."""
    rows, columns = context_grid
    result = []
    for i in range(grid[0]):
        for j in range(grid[1]):
            column = grid[1] - 1 - j if flipped else j
            y = view[0] + (i + 0.5) / grid[0] * view[2]
            x = view[1] + (column + 0.5) / grid[1] * view[3]
            # position in the map, in patches from the centre of its first patch
            v = (y - context[0]) / context[2] * rows - 0.5
            u = (x - context[1]) / context[3] * columns - 0.5
            total = 0.0
            for r in (math.floor(v), math.floor(v) + 1):
                for c in (math.floor(u), math.floor(u) + 1):
                    weight = (1 - abs(v - r)) * (1 - abs(u - c))
                    r_in, c_in = min(max(r, 0), rows - 1), min(max(c, 0), columns - 1)  # border clamp
                    total += weight * scores[r_in * columns + c_in]
            inside = context[0] <= y <= context[0] + context[2] and context[1] <= x <= context[1] + context[3]
            result.append(total if inside or padding == "border" else 0.0)
    return result


def ranks(values: Tensor) -> Tensor:
    return values.argsort(dim=-1).argsort(dim=-1).double()


def tensor(*boxes: Box) -> Tensor:
    return torch.tensor(boxes, dtype=torch.float32)


def test_golden_scores(golden: Golden) -> None:
    ours = crop_scores(
        golden["crop/scores"],
        (14, 14),
        golden["crop/scored_box_tlhw"].float(),
        golden["crop/view_box_tlhw"].float(),
        (14, 14),
    )
    theirs = golden["crop/view_scores"]
    # the release samples pixels between: 2 % in norm, so elements may be further off than in the other numbers
    golden.check("crop/view_scores", ours, tolerance=0.02)
    for mine, released in zip(ours, theirs, strict=True):
        assert (mine - released).norm() <= 0.02 * released.norm()
        assert torch.corrcoef(torch.stack([ranks(mine), ranks(released)]))[0, 1] > 0.999


boxes = st.tuples(st.integers(-20, 60), st.integers(-20, 60), st.integers(5, 120), st.integers(5, 120))
grids = st.tuples(st.integers(1, 9), st.integers(1, 9))


@settings(max_examples=80, deadline=None)
@given(
    context_grid=grids,
    grid=grids,
    context=st.lists(boxes, min_size=3, max_size=3),
    view=st.lists(boxes, min_size=3, max_size=3),
    flipped=st.lists(st.booleans(), min_size=3, max_size=3),
    seed=st.integers(0, 999),
)
def test_equals_the_slow_definition_with_border_clamp(
    context_grid: tuple[int, int],
    grid: tuple[int, int],
    context: list[Box],
    view: list[Box],
    flipped: list[bool],
    seed: int,
) -> None:
    scores = torch.rand(3, math.prod(context_grid), generator=torch.Generator().manual_seed(seed))
    ours = crop_scores(scores, context_grid, tensor(*context), tensor(*view), grid, torch.tensor(flipped))
    expected = [
        slow_crop_scores(*sample, flip, "border")
        for *sample, flip in zip(
            scores.tolist(), [context_grid] * 3, context, view, [grid] * 3, flipped, strict=True
        )
    ]
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, torch.tensor(expected), rtol=0, atol=2e-5)


def test_zeros_outside_the_scored_box_alone() -> None:
    scores = torch.rand(1, 35, generator=torch.Generator().manual_seed(0)) + 0.1
    context, view = (10.0, 20.0, 63.0, 77.0), (0.0, 0.0, 60.0, 119.0)
    ours = crop_scores(scores, (5, 7), tensor(context), tensor(view), (6, 9), padding="zeros")
    expected = slow_crop_scores(scores[0].tolist(), (5, 7), context, view, (6, 9), False, "zeros")
    torch.testing.assert_close(ours, torch.tensor([expected]), rtol=0, atol=2e-5)
    assert 0 < (ours == 0).sum() < 54
    border = crop_scores(scores, (5, 7), tensor(context), tensor(view), (6, 9))
    assert (border > 0).all()
    assert torch.equal(ours[ours > 0], border[ours > 0])


def test_the_same_box_gives_the_same_scores() -> None:
    scores = torch.rand(2, 40, generator=torch.Generator().manual_seed(0))
    box = tensor((3, 7, 150, 90), (0, 0, 33, 71))
    for padding in ("border", "zeros"):
        same = crop_scores(scores, (5, 8), box, box, (5, 8), padding=padding)
        torch.testing.assert_close(same, scores, rtol=0, atol=1e-5)


def test_a_flipped_view_is_the_mirror_image() -> None:
    scores = torch.rand(2, 49, generator=torch.Generator().manual_seed(0))
    context, view = tensor((0, 0, 100, 100), (5, 5, 60, 80)), tensor((10, 20, 50, 60), (0, 0, 70, 40))
    plain = crop_scores(scores, (7, 7), context, view, (6, 9))
    flipped = crop_scores(scores, (7, 7), context, view, (6, 9), torch.tensor([True, False]))
    torch.testing.assert_close(flipped[0].reshape(6, 9).flip(1), plain[0].reshape(6, 9))
    assert torch.equal(flipped[1], plain[1])
    assert not torch.allclose(flipped[0], plain[0])


@pytest.mark.parametrize("flipped", [False, True])
def test_a_bright_square_is_found_where_the_view_shows_it(flipped: bool) -> None:
    # The source is 160 x 240; source pixels [40, 80) x [120, 160) are bright.
    # The context (0, 0, 160, 240) on 16 x 24 patches: 10 pixels each, rows 4-7, columns 12-15.
    scores = torch.zeros(16, 24)
    scores[4:8, 12:16] = 1.0
    # The view (20, 80, 80, 120) on 8 x 12 patches: 10 pixels each, so rows 2-5, columns 4-7.
    expected = torch.zeros(8, 12)
    expected[2:6, 4:8] = 1.0
    ours = crop_scores(
        scores.reshape(1, -1),
        (16, 24),
        tensor((0, 0, 160, 240)),
        tensor((20, 80, 80, 120)),
        (8, 12),
        torch.tensor([flipped]),
    )
    torch.testing.assert_close(
        ours.reshape(8, 12), expected.flip(1) if flipped else expected, rtol=0, atol=1e-5
    )


def test_a_linear_ramp_is_reproduced_exactly() -> None:
    # bilinear sampling reproduces a ramp, whatever the two grids are
    ramp = ((torch.arange(14) + 0.5) / 14).expand(14, 14).reshape(1, -1)
    ours = crop_scores(ramp, (14, 14), tensor((0, 0, 100, 100)), tensor((20, 20, 60, 60)), (5, 5))
    expected = (0.2 + 0.6 * (torch.arange(5) + 0.5) / 5).expand(5, 5).reshape(1, -1)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)


def test_half_precision_scores_come_back_in_float32() -> None:
    box = tensor((0, 0, 10, 10))
    assert crop_scores(torch.rand(1, 4).bfloat16(), (2, 2), box, box, (3, 3)).dtype == torch.float32
