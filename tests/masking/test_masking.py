"""The number of kept patches, what every strategy of the table must hold, and a user's own strategy."""

import math
from dataclasses import replace
from fractions import Fraction
from textwrap import dedent

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode

import aclip.masking
from aclip import plan
from aclip.errors import ConfigError
from aclip.masking import MASKING, TEXT_REDUCTIONS, MaskingContext, MaskingStrategy, fitting_block_size, num_keep

GRIDS = [(14, 14), (7, 7), (5, 9), (1, 1), (4, 6), (1, 8)]


@pytest.mark.parametrize(
    ("ratio", "grid", "block", "expected"),
    [
        (0.5, 14, 2, 100),  # 25 of 49 blocks, as A-CLIP
        (0.7, 14, 2, 60),  # 15 of 49
        (0.5, 14, 1, 98),
        (0.75, 14, 1, 49),
        (0.0, 14, 2, 196),
        (0.5, (5, 9), 1, 23),  # 22.5 rounds up
        (0.5, (5, 9), 2, 23),  # blocks do not tile: single patches
        (0.5, 7, 2, 25),
        (0.5, (4, 6), 2, 12),
        (0.99, (4, 6), 2, 4),  # at least one block
        (0.99, 1, 1, 1),
        (0.5, 12, 3, 72),
        (0.9, (3, 5), 1, 2),  # 1.5 rounds up, though 15 * (1 - 0.9) is less in binary
        (0.9, 5, 1, 3),
        (0.9, 15, 1, 23),
        (1 - 0.1, 5, 1, 3),  # a computed ratio
        (5 / 6, 3, 1, 2),  # 1.5, of a ratio that is no decimal
        (1 / 3, 14, 1, 131),
        (2 / 3, 14, 1, 65),
    ],
)
def test_counts(ratio: float, grid: int | tuple[int, int], block: int, expected: int) -> None:
    assert num_keep(ratio, grid, block) == expected


@given(ratio=st.fractions(0, Fraction(9999, 10000), max_denominator=10000), height=st.integers(1, 40),
       width=st.integers(1, 40), block=st.integers(1, 4))
def test_equals_the_formula_in_exact_fractions(ratio: Fraction, height: int, width: int, block: int) -> None:
    tiles = height % block == 0 and width % block == 0
    side = block if tiles else 1
    assert fitting_block_size(block, (height, width)) == side
    blocks = Fraction(height * width, side**2)
    kept = max(1, math.floor(blocks * (1 - ratio) + Fraction(1, 2)))
    assert num_keep(float(ratio), (height, width), block) == kept * side**2
    assert num_keep(1 - float(1 - ratio), (height, width), block) == kept * side**2


@given(tie=st.integers(0, 199), count=st.integers(1, 400))
def test_halves_round_up(tie: int, count: int) -> None:
    """K + 1/2 of a count, where rounding errors of a binary ratio show."""
    kept = tie % count
    assert num_keep(float(1 - (kept + Fraction(1, 2)) / count), (1, count)) == kept + 1


@given(ratio=st.floats(0, 1, exclude_max=True), height=st.integers(1, 40), width=st.integers(1, 40))
def test_any_ratio_keeps_something_and_no_more_than_there_is(ratio: float, height: int, width: int) -> None:
    assert 1 <= num_keep(ratio, (height, width), 2) <= height * width


@pytest.mark.parametrize("ratio", [1.0, 1.5, -0.1, math.nan, math.inf])
def test_refuses_other_ratios(ratio: float) -> None:
    with pytest.raises(ConfigError, match="0 <= ratio < 1"):
        num_keep(ratio, 14)


@pytest.mark.parametrize("block", [0, -1])
def test_refuses_empty_blocks(block: int) -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        num_keep(0.5, 14, block)


def build(name: str, ratio: float) -> MaskingStrategy:
    return MASKING[name](0.0 if name == "none" else ratio)


def context_for(grid: tuple[int, int], batch_size: int = 6, seed: int = 0) -> MaskingContext:
    """Return a context with everything that a strategy may read."""
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


@pytest.mark.parametrize("name", MASKING)
def test_does_not_synchronise_with_the_host(name: str) -> None:
    with FakeTensorMode():  # tensors without values: reading one raises
        context = MaskingContext(4, (7, 7), "cpu", scores=torch.rand(4, 49), images=torch.rand(4, 3, 28, 28),
                                 seeds=torch.arange(4))
        assert build(name, 0.5)(context).shape == (4, 49 if name == "none" else 25)


def test_generator_is_used_without_seeds() -> None:
    contexts = [MaskingContext(4, (7, 7), "cpu", generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    first, again, other = (build("uniform", 0.5)(context) for context in contexts)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_strategy_of_the_users_own() -> None:
    """The example in the package's docstring, executed."""
    example = dedent(aclip.masking.__doc__.split("script:\n")[1].split("\nA pass")[0])
    definition = example[example.index("class") : example.index("MASKING[")].strip()
    assert len(definition.splitlines()) <= 8
    try:
        exec(example, {})
        keep = MASKING["centre"](0.75, block_size=2)(context_for((8, 8)))
    finally:
        MASKING.pop("centre", None)
    assert keep.tolist() == [[18, 19, 20, 21, 26, 27, 28, 29, 34, 35, 36, 37, 42, 43, 44, 45]] * 6


class Dark(MaskingStrategy):
    def __init__(self, mask_ratio: float = 0.5, block_size: int = 1, channel: int = 0) -> None:
        super().__init__(mask_ratio, block_size)
        self.channel = channel

    def scores(self, context: MaskingContext) -> torch.Tensor:
        return -torch.nn.functional.adaptive_avg_pool2d(context.images[:, self.channel], context.grid_size).flatten(1)


def test_options_of_a_users_own_strategy_are_constructor_arguments() -> None:
    context = context_for((2, 4))
    for channel in (0, 2):
        pooled = context.images[:, channel].reshape(6, 2, 4, 4, 4).mean(dim=(2, 4)).flatten(1)
        expected = pooled.argsort(dim=1)[:, :4].sort(dim=1).values
        assert torch.equal(Dark(0.5, channel=channel)(context), expected)


@pytest.mark.parametrize(("cls", "options"), [
    (MASKING["gaussian"], {"variance": 0.0}), (MASKING["gaussian"], {"variance": math.inf}),
    (MASKING["cluster"], {"anchor_ratio": 1.1}), (TEXT_REDUCTIONS["truncate"], {"num_keep": 0})])
def test_options_out_of_range_are_refused(cls: type, options: dict[str, float]) -> None:
    (name,) = options
    with pytest.raises(ConfigError, match=f"it: {name}"):
        plan.build(cls, {}, options, "it")
