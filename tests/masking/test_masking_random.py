"""Uniform masking draws every subset equally often; the Gaussian's density and choice equal a slow transcription."""

import math
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aclip import rng
from aclip.masking import GaussianMasking, MaskingContext, UniformMasking
from aclip.masking.strategies import centre_density


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


def test_views_and_samples_draw_independently() -> None:
    a, b = (UniformMasking(0.5)(seeded(50, (7, 7), purpose)) for purpose in ("mask/a", "mask/b"))
    assert not (a == b).all(dim=1).any()
    assert len({tuple(row) for row in a.tolist()}) == 50


def slow_density(grid: tuple[int, int], variance: float) -> list[float]:
    """The bivariate normal density with covariance variance * I, patch by patch."""
    covariance = np.diag([variance, variance])
    result = []
    for i in range(grid[0]):
        for j in range(grid[1]):
            indices = zip((i, j), grid, strict=True)
            position = np.array([2 * index / (count - 1) - 1 if count > 1 else 0.0 for index, count in indices])
            exponent = -0.5 * position @ np.linalg.inv(covariance) @ position
            result.append(math.exp(exponent) / (2 * math.pi * math.sqrt(np.linalg.det(covariance))))
    return result


@pytest.mark.parametrize("grid", [(14, 14), (7, 7), (5, 9), (1, 8), (1, 1)])
@pytest.mark.parametrize("variance", [0.1, 0.2, 0.8])
def test_density_equals_the_definition(grid: tuple[int, int], variance: float) -> None:
    expected = torch.tensor(slow_density(grid, variance))
    torch.testing.assert_close(centre_density(grid, variance, "cpu"), expected, rtol=1e-6, atol=1e-7)


def test_density_is_not_scaled_to_one_at_the_centre() -> None:
    density = centre_density((7, 7), 0.2, "cpu").reshape(7, 7)
    assert density.argmax() == 24
    assert density[3, 3].item() == pytest.approx(1 / (0.4 * math.pi))
    assert torch.equal(density, density.T)
    assert torch.equal(density, density.flip(0))


@settings(max_examples=60, deadline=None)
@given(
    height=st.integers(1, 10), width=st.integers(1, 10), ratio=st.integers(0, 15), side=st.integers(1, 3),
    variance=st.sampled_from([0.1, 0.2, 0.8]),
)  # fmt: skip
def test_equals_the_slow_definition(height: int, width: int, ratio: int, side: int, variance: float) -> None:
    grid = (height, width)
    tiles = height % side == 0 and width % side == 0
    block = side if tiles else 1
    across = width // block
    density = slow_density((height // block, across), variance)
    keep = GaussianMasking(ratio / 16, block_size=side, variance=variance)(seeded(3, grid))
    for kept, draws in zip(keep.tolist(), rng.uniform(torch.arange(3), len(density), "mask").tolist(), strict=True):
        scores = [u - (1 - p) for u, p in zip(draws, density, strict=True)]
        order = sorted(range(len(scores)), key=lambda b: -scores[b])
        count = max(1, math.floor(len(scores) * (1 - ratio / 16) + 0.5))
        patches = [
            (b // across * block + i) * width + b % across * block + j
            for b in order[:count] for i in range(block) for j in range(block)
        ]  # fmt: skip
        assert kept == sorted(patches)


def test_nearer_the_centre_is_kept_more_often() -> None:
    keep = GaussianMasking(0.5)(seeded(4000, (5, 5)))
    counts = torch.bincount(keep.flatten(), minlength=25).reshape(5, 5).double()
    offset = torch.arange(-2, 3)
    distance = offset.square()[:, None] + offset.square()
    rings = [counts[distance == d].mean().item() for d in distance.unique()]
    assert rings == sorted(rings, reverse=True)
    assert counts.min() > 0  # still random, even in the corners


def test_a_wide_gaussian_is_uniform_masking() -> None:
    wide = GaussianMasking(0.6, variance=1e6)(seeded(50, (6, 4)))
    # a density of 1.6e-7 everywhere: float32 draws keep their order
    assert torch.equal(wide, UniformMasking(0.6)(seeded(50, (6, 4))))
