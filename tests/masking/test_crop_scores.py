"""Score maps carried from crop to crop: the release's numbers, a slow oracle, and pictures with an answer."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from aclip.masking import crop_scores
from golden_numbers import Golden

Box = tuple[float, float, float, float]


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
                    r_in, c_in = min(max(r, 0), rows - 1), min(max(c, 0), columns - 1)  # the border goes on
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
