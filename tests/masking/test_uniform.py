"""Uniform masking: every subset is equally likely, and draws belong to samples."""

from dataclasses import replace
from itertools import combinations

import pytest
import torch

from aclip.masking import MaskingContext, UniformMasking


def seeded(batch_size: int, grid: tuple[int, int], purpose: str = "mask") -> MaskingContext:
    return MaskingContext(batch_size, grid, "cpu", seeds=torch.arange(batch_size), purpose=purpose)


def chi_square(counts: torch.Tensor) -> float:
    expected = counts.double().mean()
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("with_seeds", [True, False])
def test_every_subset_is_equally_likely(with_seeds: bool) -> None:
    context = seeded(6000, (1, 5))
    if not with_seeds:
        context = replace(context, seeds=None, generator=torch.Generator().manual_seed(0))
    keep = UniformMasking(0.6)(context)  # 2 of 5
    counts = torch.tensor(
        [(keep == torch.tensor(subset)).all(dim=1).sum() for subset in combinations(range(5), 2)]
    )
    assert counts.sum() == 6000
    assert chi_square(counts) < 33  # 9 degrees of freedom: 1 in 10^4; the draws are fixed


def test_every_patch_of_a_large_grid_is_kept_equally_often() -> None:
    keep = UniformMasking(0.75)(seeded(4000, (14, 14)))
    counts = torch.bincount(keep.flatten(), minlength=196)
    assert chi_square(counts) < 270 * 0.75  # 195 degrees of freedom; without replacement the variance is 3/4


def test_whole_blocks_are_kept() -> None:
    keep = UniformMasking(0.5, block_size=2)(seeded(200, (6, 4)))
    mask = torch.zeros(200, 24, dtype=torch.bool).scatter(1, keep, True)
    blocks = mask.reshape(200, 3, 2, 2, 2).transpose(2, 3).reshape(200, 6, 4)
    assert (blocks.all(dim=2) == blocks.any(dim=2)).all()
    assert (blocks.all(dim=2).sum(dim=1) == 3).all()
    assert chi_square(blocks.all(dim=2).sum(dim=0)) < 20


def test_views_and_samples_draw_apart() -> None:
    a, b = (UniformMasking(0.5)(seeded(50, (7, 7), purpose)) for purpose in ("mask/a", "mask/b"))
    assert not (a == b).all(dim=1).any()
    assert len({tuple(row) for row in a.tolist()}) == 50


def test_generator_is_used_without_seeds() -> None:
    contexts = [
        MaskingContext(4, (7, 7), "cpu", generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)
    ]
    first, again, other = (UniformMasking(0.5)(context) for context in contexts)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
