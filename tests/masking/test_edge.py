"""Edge masking: gradients against loops, and pictures whose edges are known."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode

from aclip.masking import EdgeMasking, MaskingContext
from aclip.masking.edge import edge_scores

SOBEL = np.array([[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]], dtype=np.float64)


def context_of(images: torch.Tensor, grid: tuple[int, int]) -> MaskingContext:
    return MaskingContext(len(images), grid, "cpu", images=images)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


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
def test_scores_equal_the_definition(grid: tuple[int, int], size: tuple[int, int]) -> None:
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
    assert (seen[2:4, 2:4] == 0).all()  # a plain inside
    corners = seen[[0, 0, 5, 5], [0, 5, 0, 5]]
    assert (corners < seen[seen > 0].median()).all()
    keep = EdgeMasking(4 / 36)(context_of(images, (6, 6)))
    assert set(range(36)) - set(keep[0].tolist()) == {14, 15, 20, 21}


def test_a_plain_picture_keeps_the_lower_indices() -> None:
    images = torch.tensor([0.3, -1.7, 2.2])[:, None, None].expand(2, 3, 16, 16).contiguous()
    assert (edge_scores(images, (4, 4)) == 0).all()
    assert EdgeMasking(0.5)(context_of(images, (4, 4))).tolist() == [list(range(8))] * 2
    assert EdgeMasking(0.75, block_size=2)(context_of(images, (4, 4))).tolist() == [[0, 1, 4, 5]] * 2


def test_a_ramp_has_eight_times_its_slope() -> None:
    images = (0.5 * torch.arange(12.0)).expand(1, 3, 12, 12)
    scores = edge_scores(images, (4, 4)).reshape(4, 4)
    torch.testing.assert_close(scores[:, 1:3], torch.full((4, 2), 4.0))
    torch.testing.assert_close(scores[:, 0], torch.full((4,), 4.0 * 2.5 / 3))  # half the difference at the border


def test_mirrored_turned_and_brighter_pictures() -> None:
    images = noise(2, 3, 20, 20)
    scores = edge_scores(images, (5, 5)).reshape(2, 5, 5)

    def of(changed: torch.Tensor) -> torch.Tensor:
        return edge_scores(changed, (5, 5)).reshape(2, 5, 5)

    torch.testing.assert_close(of(images.flip(3)), scores.flip(2), rtol=0, atol=1e-5)
    torch.testing.assert_close(of(images.mT), scores.mT, rtol=0, atol=1e-5)
    torch.testing.assert_close(of(2 * images + 3), 2 * scores, rtol=0, atol=1e-4)


def test_autocast_changes_nothing() -> None:
    images = noise(4, 3, 28, 28)
    plain = edge_scores(images, (7, 7))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(edge_scores(images, (7, 7)), plain)


def test_reads_no_value_back_to_the_host() -> None:
    with FakeTensorMode():  # tensors without values: what asks for one raises
        assert EdgeMasking(0.5)(context_of(torch.empty(4, 3, 28, 28), (7, 7))).shape == (4, 25)


def test_needs_images_that_the_grid_divides() -> None:
    with pytest.raises(ValueError, match="looks at pixels"):
        EdgeMasking(0.5)(MaskingContext(2, (4, 4), "cpu"))
    with pytest.raises(ValueError, match=r"\(30, 32\) pixels do not divide into the grid \(4, 4\)"):
        EdgeMasking(0.5)(context_of(noise(1, 3, 30, 32), (4, 4)))
