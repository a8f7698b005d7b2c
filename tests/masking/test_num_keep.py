"""The one place where a ratio becomes a count."""

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aclip.errors import ConfigError
from aclip.masking import fitting_block_size, num_keep


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
        (1 - 0.1, 5, 1, 3),  # a ratio that was computed
        (5 / 6, 3, 1, 2),  # 1.5, of a ratio without a decimal
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
    assert num_keep(1 - float(1 - ratio), (height, width), block) == kept * side**2  # as a share that is kept gives it


@given(tie=st.integers(0, 199), count=st.integers(1, 400))
def test_halves_round_up(tie: int, count: int) -> None:
    """The one place where noise shows: K + 1/2 of a count, which draws seldom hit."""
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
