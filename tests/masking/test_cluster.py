"""Cluster masking: similarities and choices against loops, and clusters that are seen to go."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode

from aclip import rng
from aclip.errors import ConfigError
from aclip.masking import ClusterMasking, MaskingContext
from aclip.masking.base import best_first
from aclip.masking.cluster import patch_similarity


def context_of(images: torch.Tensor, grid: tuple[int, int], first_seed: int = 0) -> MaskingContext:
    seeds = torch.arange(first_seed, first_seed + len(images))
    return MaskingContext(len(images), grid, "cpu", images=images, seeds=seeds)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def from_patches(patches: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """(B, N, 3, p, q) patches laid out as (B, 3, h, w) images."""
    rows = patches.unflatten(1, grid)
    return rows.permute(0, 3, 1, 4, 2, 5).flatten(2, 3).flatten(3)


def slow_patches(image: np.ndarray, grid: tuple[int, int]) -> list[np.ndarray]:
    """Cut a (3, h, w) image into patches of mean 0 and variance 1, row by row, in float64."""
    p, q = image.shape[1] // grid[0], image.shape[2] // grid[1]
    patches = []
    for i in range(grid[0]):
        for j in range(grid[1]):
            values = image[:, i * p : (i + 1) * p, j * q : (j + 1) * q].astype(np.float64)
            patches.append((values - values.mean()) / np.sqrt(values.var() + 1e-6))
    return patches


def slow_cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float((a * b).sum() / (np.linalg.norm(a) * np.linalg.norm(b)))


@pytest.mark.parametrize(
    ("grid", "size"), [((4, 4), (32, 32)), ((3, 5), (12, 30)), ((1, 1), (7, 5)), ((14, 14), (56, 56))]
)
def test_similarity_equals_the_cosine_of_normalised_patches(grid: tuple[int, int], size: tuple[int, int]) -> None:
    images = 3 * noise(2, 3, *size) + noise(2, 3, 1, 1, seed=1)
    count = grid[0] * grid[1]
    everything = torch.arange(count).expand(2, count)
    ours = patch_similarity(images, grid, everything)
    for similarity, image in zip(ours, images.numpy(), strict=True):
        patches = slow_patches(image, grid)
        expected = torch.tensor([[slow_cosine(a, b) for b in patches] for a in patches], dtype=torch.float32)
        torch.testing.assert_close(similarity, expected, rtol=0, atol=2e-6)


@settings(max_examples=40, deadline=None)
@given(
    height=st.integers(1, 8), width=st.integers(1, 8), ratio=st.integers(0, 15), side=st.integers(1, 2),
    anchor_ratio=st.sampled_from([0.03, 0.1, 0.5, 1.0]), seed=st.integers(0, 999),
)  # fmt: skip
def test_equals_the_slow_definition(
    height: int, width: int, ratio: int, side: int, anchor_ratio: float, seed: int
) -> None:
    images = noise(3, 3, 2 * height, 2 * width, seed=seed)
    context = context_of(images, (height, width), seed)
    strategy = ClusterMasking(ratio / 16, block_size=side, anchor_ratio=anchor_ratio)
    block = side if height % side == 0 and width % side == 0 else 1
    grid = (height // block, width // block)
    count = grid[0] * grid[1]
    kept_count = max(1, math.floor(count * (1 - ratio / 16) + 0.5))
    anchor_count = max(1, min(count - kept_count, math.floor(count * anchor_ratio + 0.5)))
    all_draws = rng.uniform(context.seeds, count, "mask").tolist()
    for kept, image, draws in zip(strategy(context).tolist(), images.numpy(), all_draws, strict=True):
        blocks = sorted({patch // width // block * grid[1] + patch % width // block for patch in kept})
        assert len(kept) == len(blocks) * block**2
        assert len(blocks) == kept_count
        patches = slow_patches(image, grid)
        anchors = sorted(range(count), key=lambda b: -draws[b])[:anchor_count]
        dropped = set(range(count)) - set(blocks)
        assert not dropped or set(anchors) <= dropped
        nearness = [max((patches[a] * patches[b]).mean() for a in anchors) + draws[b] / 1024 for b in range(count)]
        others = [nearness[b] for b in dropped - set(anchors)]
        # what stays is less near than what goes, to the precision of float32
        assert not others or max(nearness[b] for b in blocks) <= min(others) + 2e-6


def test_a_whole_texture_goes_with_its_anchor() -> None:
    # two textures on 4 x 4 patches, each patch brighter or darker and with its own contrast
    places = torch.stack([torch.randperm(16, generator=torch.Generator().manual_seed(s)) < 8 for s in range(40)])
    textures = noise(2, 3, 4, 4)
    patches = textures[places.long()] * (1 + noise(40, 16, 1, 1, 1, seed=1).abs()) + noise(40, 16, 1, 1, 1, seed=2)
    keep = ClusterMasking(0.5)(context_of(from_patches(patches, (4, 4)), (4, 4)))  # 3 % of 16: one anchor
    kept_textures = places.gather(1, keep)
    assert (kept_textures.all(dim=1) | ~kept_textures.any(dim=1)).all()
    assert kept_textures.any()
    assert not kept_textures.all()


def test_equal_patches_go_at_random() -> None:
    images = noise(1, 3, 4, 4).tile(4000, 1, 2, 3)
    keep = ClusterMasking(0.5)(context_of(images, (2, 3)))  # 3 of 6 equal patches
    counts = torch.bincount(keep.flatten(), minlength=6)
    assert ((counts - 2000.0) ** 2 / 2000).sum() < 26  # 5 degrees of freedom: 1 in 10^4; the draws are fixed


@pytest.mark.parametrize(("mask_ratio", "removed"), [(0.01, 2), (0.0, 0)])
def test_fewer_go_than_there_would_be_anchors(mask_ratio: float, removed: int) -> None:
    context = context_of(noise(5, 3, 28, 28), (14, 14))
    keep = ClusterMasking(mask_ratio)(context)
    random_ones = best_first(context.uniform(196))[:, :removed]
    assert torch.equal(torch.cat([keep, random_ones], dim=1).sort(dim=1).values, torch.arange(196).expand(5, 196))


@pytest.mark.parametrize(
    ("count", "removed", "anchors"), [(196, 98, 6), (196, 2, 2), (16, 8, 1), (1, 0, 1), (576, 300, 17)]
)
def test_three_percent_are_anchors(count: int, removed: int, anchors: int) -> None:
    assert ClusterMasking(0.5).num_anchors(count, removed) == anchors


def test_patches_without_contrast_are_similar_to_none() -> None:
    images = noise(1, 3, 8, 8)
    images[:, :, :4] = 0.7
    similarity = patch_similarity(images, (2, 2), torch.arange(4)[None])
    torch.testing.assert_close(similarity[0, :2], torch.zeros(2, 4), rtol=0, atol=1e-5)
    torch.testing.assert_close(similarity[0, 2:, 2:].diagonal(), torch.ones(2), rtol=0, atol=1e-5)


def test_autocast_changes_nothing() -> None:
    context = context_of(noise(8, 3, 28, 28), (7, 7))
    plain = ClusterMasking(0.5)(context)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ClusterMasking(0.5)(context), plain)


def test_reads_no_value_back_to_the_host() -> None:
    with FakeTensorMode():  # tensors without values: what asks for one raises
        context = MaskingContext(4, (7, 7), "cpu", images=torch.empty(4, 3, 28, 28), seeds=torch.arange(4))
        assert ClusterMasking(0.5)(context).shape == (4, 25)


def test_needs_images_that_the_grid_divides() -> None:
    with pytest.raises(ValueError, match="compares pixels"):
        ClusterMasking(0.5)(MaskingContext(2, (4, 4), "cpu"))
    with pytest.raises(ValueError, match=r"\(30, 32\) pixels do not divide into the grid \(4, 4\)"):
        ClusterMasking(0.5)(context_of(noise(1, 3, 30, 32), (4, 4)))


@pytest.mark.parametrize("anchor_ratio", [0.0, -0.1, 1.1, math.nan])
def test_refuses_other_anchor_ratios(anchor_ratio: float) -> None:
    with pytest.raises(ConfigError, match="0 < ratio <= 1"):
        ClusterMasking(0.5, anchor_ratio=anchor_ratio)
