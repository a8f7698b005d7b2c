"""Masking by pixels: gradients, similarities and choices against loops, and images whose answer is known."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aclip import rng
from aclip.errors import ConfigError
from aclip.masking import ClusterMasking, EdgeMasking, MaskingContext, MaskingStrategy
from aclip.masking.base import best_first
from aclip.masking.strategies import patch_similarity

SOBEL = np.array([[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]], dtype=np.float64)


def context_of(images: torch.Tensor, grid: tuple[int, int], first_seed: int = 0) -> MaskingContext:
    seeds = torch.arange(first_seed, first_seed + len(images))
    return MaskingContext(len(images), grid, "cpu", images=images, seeds=seeds)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def edge_scores(images: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    return EdgeMasking().scores(context_of(images, grid))


def slow_scores(image: np.ndarray, grid: tuple[int, int]) -> list[float]:
    """The definition, pixel by pixel, in float64."""
    image = image.astype(np.float64)
    luma = 0.299 * image[0] + 0.587 * image[1] + 0.114 * image[2]
    h, w = luma.shape
    totals = [0.0] * (grid[0] * grid[1])
    for i in range(h):
        for j in range(w):
            x = y = 0.0
            for a in range(3):
                for b in range(3):
                    pixel = luma[min(max(i + a - 1, 0), h - 1), min(max(j + b - 1, 0), w - 1)]
                    x += SOBEL[a, b] * pixel
                    y += SOBEL[b, a] * pixel
            totals[i * grid[0] // h * grid[1] + j * grid[1] // w] += math.hypot(x, y)
    return [total / (h * w / len(totals)) for total in totals]


@pytest.mark.parametrize(("grid", "size"), [((4, 4), (16, 16)), ((2, 5), (6, 20)), ((1, 1), (3, 4)), ((3, 2), (3, 2))])
def test_edge_scores_equal_the_definition(grid: tuple[int, int], size: tuple[int, int]) -> None:
    images = noise(2, 3, *size)
    expected = torch.tensor([slow_scores(image, grid) for image in images.numpy()])
    torch.testing.assert_close(edge_scores(images, grid), expected, rtol=0, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(
    height=st.integers(1, 6), width=st.integers(1, 6), ratio=st.integers(0, 15), side=st.integers(1, 3),
    seed=st.integers(0, 999),
)  # fmt: skip
def test_keeps_the_strongest_blocks(height: int, width: int, ratio: int, side: int, seed: int) -> None:
    images = noise(2, 3, 3 * height, 3 * width, seed=seed)
    keep = EdgeMasking(ratio / 16, block_size=side)(context_of(images, (height, width)))
    block = side if height % side == 0 and width % side == 0 else 1
    grid = (height // block, width // block)
    for kept, image in zip(keep.tolist(), images.numpy(), strict=True):
        scores = slow_scores(image, grid)  # a block is a larger patch
        blocks = {patch // width // block * grid[1] + patch % width // block for patch in kept}
        assert len(blocks) == max(1, math.floor(len(scores) * (1 - ratio / 16) + 0.5))
        assert len(kept) == len(blocks) * block**2
        removed = [scores[b] for b in range(len(scores)) if b not in blocks]
        assert not removed or max(removed) <= min(scores[b] for b in blocks) + 1e-5


def test_the_outline_of_a_square_is_kept() -> None:
    images = torch.zeros(1, 3, 24, 24)
    images[:, :, 4:20, 4:20] = 1.0  # on 6 x 6 patches of 4 pixels its edges lie between patches 0 | 1 and 4 | 5
    seen = edge_scores(images, (6, 6)).reshape(6, 6)
    assert (seen[2:4, 2:4] == 0).all()  # no edges inside
    corners = seen[[0, 0, 5, 5], [0, 5, 0, 5]]
    assert (corners < seen[seen > 0].median()).all()
    keep = EdgeMasking(4 / 36)(context_of(images, (6, 6)))
    assert set(range(36)) - set(keep[0].tolist()) == {14, 15, 20, 21}


def test_a_plain_image_keeps_the_lower_indices() -> None:
    images = torch.tensor([0.3, -1.7, 2.2])[:, None, None].expand(2, 3, 16, 16).contiguous()
    assert (edge_scores(images, (4, 4)) == 0).all()
    assert EdgeMasking(0.5)(context_of(images, (4, 4))).tolist() == [list(range(8))] * 2
    assert EdgeMasking(0.75, block_size=2)(context_of(images, (4, 4))).tolist() == [[0, 1, 4, 5]] * 2


def test_a_ramp_has_eight_times_its_slope() -> None:
    images = (0.5 * torch.arange(12.0)).expand(1, 3, 12, 12)
    scores = edge_scores(images, (4, 4)).reshape(4, 4)
    torch.testing.assert_close(scores[:, 1:3], torch.full((4, 2), 4.0))
    torch.testing.assert_close(scores[:, 0], torch.full((4,), 4.0 * 2.5 / 3))  # half the difference at the border


def test_edge_scores_follow_mirroring_transposing_and_contrast() -> None:
    images = noise(2, 3, 20, 20)
    scores = edge_scores(images, (5, 5)).reshape(2, 5, 5)

    def of(changed: torch.Tensor) -> torch.Tensor:
        return edge_scores(changed, (5, 5)).reshape(2, 5, 5)

    torch.testing.assert_close(of(images.flip(3)), scores.flip(2), rtol=0, atol=1e-5)
    torch.testing.assert_close(of(images.mT), scores.mT, rtol=0, atol=1e-5)
    torch.testing.assert_close(of(2 * images + 3), 2 * scores, rtol=0, atol=1e-4)


def from_patches(patches: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Lay (B, N, 3, p, q) patches out as (B, 3, h, w) images."""
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
def test_cluster_equals_the_slow_definition(
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
        # kept blocks are less similar than removed ones, to the precision of float32
        assert not others or max(nearness[b] for b in blocks) <= min(others) + 2e-6


def test_a_whole_texture_is_removed_with_its_anchor() -> None:
    # two textures on 4 x 4 patches, each patch brighter or darker and with its own contrast
    places = torch.stack([torch.randperm(16, generator=torch.Generator().manual_seed(s)) < 8 for s in range(40)])
    textures = noise(2, 3, 4, 4)
    patches = textures[places.long()] * (1 + noise(40, 16, 1, 1, 1, seed=1).abs()) + noise(40, 16, 1, 1, 1, seed=2)
    keep = ClusterMasking(0.5)(context_of(from_patches(patches, (4, 4)), (4, 4)))  # 3 % of 16: one anchor
    kept_textures = places.gather(1, keep)
    assert (kept_textures.all(dim=1) | ~kept_textures.any(dim=1)).all()
    assert kept_textures.any()
    assert not kept_textures.all()


def test_equal_patches_are_removed_at_random() -> None:
    images = noise(1, 3, 4, 4).tile(4000, 1, 2, 3)
    keep = ClusterMasking(0.5)(context_of(images, (2, 3)))  # 3 of 6 equal patches
    counts = torch.bincount(keep.flatten(), minlength=6)
    assert ((counts - 2000.0) ** 2 / 2000).sum() < 26  # 5 degrees of freedom: 1 in 10^4; the draws are fixed


@pytest.mark.parametrize(("mask_ratio", "removed"), [(0.01, 2), (0.0, 0)])
def test_no_more_anchors_than_removed_patches(mask_ratio: float, removed: int) -> None:
    context = context_of(noise(5, 3, 28, 28), (14, 14))
    keep = ClusterMasking(mask_ratio)(context)
    random_ones = best_first(context.uniform(196))[:, :removed]
    assert torch.equal(torch.cat([keep, random_ones], dim=1).sort(dim=1).values, torch.arange(196).expand(5, 196))


def test_patches_without_contrast_are_similar_to_none() -> None:
    images = noise(1, 3, 8, 8)
    images[:, :, :4] = 0.7
    similarity = patch_similarity(images, (2, 2), torch.arange(4)[None])
    torch.testing.assert_close(similarity[0, :2], torch.zeros(2, 4), rtol=0, atol=1e-5)
    torch.testing.assert_close(similarity[0, 2:, 2:].diagonal(), torch.ones(2), rtol=0, atol=1e-5)


@pytest.mark.parametrize("strategy", [EdgeMasking(0.5), ClusterMasking(0.5)])
def test_autocast_changes_nothing(strategy: MaskingStrategy) -> None:
    context = context_of(noise(8, 3, 28, 28), (7, 7))
    plain = strategy(context)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(strategy(context), plain)


@pytest.mark.parametrize("strategy", [EdgeMasking(0.5), ClusterMasking(0.5)])
def test_needs_images(strategy: MaskingStrategy) -> None:
    with pytest.raises(ConfigError, match="reads pixels"):
        strategy(MaskingContext(2, (4, 4), "cpu"))
