"""What every strategy of the table must hold."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aclip.errors import ConfigError
from aclip.masking import MASKING, MaskingContext, MaskingStrategy, num_keep

GRIDS = [(14, 14), (7, 7), (5, 9), (1, 1), (4, 6), (1, 8)]


def build(name: str, ratio: float) -> MaskingStrategy:
    return MASKING[name](0.0 if name == "none" else ratio)


def context_for(grid: tuple[int, int], batch_size: int = 6, seed: int = 0) -> MaskingContext:
    """Return a context with everything that a strategy may look at."""
    noise = torch.Generator().manual_seed(seed)
    return MaskingContext(
        batch_size=batch_size,
        grid_size=grid,
        device="cpu",
        scores=torch.rand(batch_size, grid[0] * grid[1], generator=noise),
        images=torch.randn(batch_size, 3, 4 * grid[0], 4 * grid[1], generator=noise),
        seeds=torch.randint(0, 2**62, (batch_size,), generator=noise),
    )


def rows(context: MaskingContext, order: list[int]) -> MaskingContext:
    assert context.scores is not None
    assert context.images is not None
    assert context.seeds is not None
    return replace(
        context,
        batch_size=len(order),
        scores=context.scores[order],
        images=context.images[order],
        seeds=context.seeds[order],
    )


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(sorted(MASKING)),
    ratio=st.floats(0, 0.999),
    height=st.integers(1, 16),
    width=st.integers(1, 16),
    seed=st.integers(0, 2**31),
)
def test_keeps_exactly_k_distinct_patches_in_ascending_order(
    name: str, ratio: float, height: int, width: int, seed: int
) -> None:
    strategy = build(name, ratio)
    keep = strategy(context_for((height, width), seed=seed))
    assert keep.dtype == torch.int64
    assert keep.shape == (6, strategy.num_keep((height, width)))
    assert keep.min() >= 0
    assert keep.max() < height * width
    assert (keep.diff(dim=1) > 0).all()


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("name", MASKING)
def test_counts_as_num_keep_does(name: str, grid: tuple[int, int]) -> None:
    for ratio in (0.0, 0.3, 0.5, 0.75):
        strategy = build(name, ratio)
        expected = num_keep(strategy.mask_ratio, grid, strategy.block_size)
        assert strategy(context_for(grid)).shape[1] == strategy.num_keep(grid) == expected


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("name", MASKING)
def test_a_row_does_not_depend_on_the_others(name: str, grid: tuple[int, int]) -> None:
    strategy, context = build(name, 0.5), context_for(grid)
    keep = strategy(context)
    assert torch.equal(strategy(context), keep)
    for order in ([5, 2, 0], [3], [0, 0, 1, 2, 3, 4, 5]):
        assert torch.equal(strategy(rows(context, order)), keep[order])


@pytest.mark.parametrize("name", MASKING)
def test_a_ratio_of_zero_keeps_everything(name: str) -> None:
    assert torch.equal(build(name, 0.0)(context_for((5, 9))), torch.arange(45).expand(6, 45))


@pytest.mark.parametrize("name", MASKING)
def test_the_global_generator_is_left_alone(name: str) -> None:
    before = torch.get_rng_state()
    build(name, 0.5)(context_for((7, 7)))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", MASKING)
def test_refuses_a_ratio_that_removes_everything(name: str) -> None:
    with pytest.raises(ConfigError, match="mask_ratio"):
        MASKING[name](1.0)


def test_none_refuses_to_ignore_a_ratio() -> None:
    with pytest.raises(ConfigError, match=r"mask_ratio must be 0, not 0\.5"):
        MASKING["none"](0.5)
