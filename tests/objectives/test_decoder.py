"""The decoder of removed patches against a loop over patches, and its positions against the formula."""

import math

import pytest
import torch
from open_clip.pos_embed import get_2d_sincos_pos_embed
from torch import Tensor, nn

from aclip.errors import ConfigError
from aclip.objectives.reconstruction import PatchDecoder, missing_patches, sine_cosine

IN_WIDTH, B = 12, 3
GRIDS = [(4, 4), (2, 3), (5, 2), (1, 4), (3, 1)]


def synthetic(grid: tuple[int, int], kept: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return cls, patches and keep_indices of a few images."""
    noise = torch.Generator().manual_seed(grid[0] * 10 + grid[1])
    order = torch.rand(B, grid[0] * grid[1], generator=noise).argsort(dim=1)
    return (
        torch.randn(B, IN_WIDTH, generator=noise),
        torch.randn(B, kept, IN_WIDTH, generator=noise),
        order[:, :kept].sort(dim=1).values,
    )


def build(width: int = 32, layers: int = 2) -> PatchDecoder:
    torch.manual_seed(0)
    return PatchDecoder(IN_WIDTH, width, layers)


def literal_position(width: int, row: int, column: int) -> list[float]:
    """Vaswani et al., arXiv 1706.03762, section 3.5, once for the column and once for the row, sines first."""
    quarter = width // 4
    angles = [[place / 10000 ** (k / quarter) for k in range(quarter)] for place in (column, row)]
    return [f(a) for coordinate in angles for f in (math.sin, math.cos) for a in coordinate]


def literal_decode(decoder: PatchDecoder, cls: Tensor, patches: Tensor, keep: Tensor, grid: tuple[int, int]) -> Tensor:
    """MAE, section 3: patch by patch, then open_clip's own blocks."""
    images = []
    for b in range(len(cls)):
        kept = {int(patch): i for i, patch in enumerate(keep[b])}
        tokens = [decoder.embed(cls[b])]
        for row in range(grid[0]):
            for column in range(grid[1]):
                number = row * grid[1] + column
                token = decoder.embed(patches[b, kept[number]]) if number in kept else decoder.mask_token
                tokens.append(token + torch.tensor(literal_position(decoder.width, row, column)))
        decoded = decoder.norm(decoder.transformer(torch.stack(tokens)[None]))[0]
        images.append(decoded[1:])
    return torch.stack(images)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
@pytest.mark.parametrize("width", [8, 64])
def test_is_the_loop_over_patches(grid: tuple[int, int], share: float, width: int) -> None:
    decoder = build(width)
    cls, patches, keep = synthetic(grid, max(1, int(grid[0] * grid[1] * share)))
    decoded, literal = decoder(cls, patches, keep, grid), literal_decode(decoder, cls, patches, keep, grid)
    torch.testing.assert_close(decoded, literal, rtol=0, atol=1e-5)

    direction = torch.randn(decoded.shape, generator=torch.Generator().manual_seed(1))
    gradients = [
        torch.autograd.grad((x * direction).sum(), list(decoder.parameters()), materialize_grads=True)
        for x in (decoded, literal)
    ]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * max(1.0, float(theirs.abs().max())))


@pytest.mark.parametrize("grid", [*GRIDS, (14, 14), (24, 12)])
@pytest.mark.parametrize("width", [4, 32, 512])
def test_positions_are_the_formula(grid: tuple[int, int], width: int) -> None:
    positions = sine_cosine(width, grid, torch.device("cpu"))
    literal = [literal_position(width, row, column) for row in range(grid[0]) for column in range(grid[1])]
    assert positions.dtype == torch.float32
    torch.testing.assert_close(positions, torch.tensor(literal), rtol=0, atol=5e-6)


@pytest.mark.parametrize("side", [1, 4, 16])
def test_positions_of_a_square_are_open_clips(side: int) -> None:
    theirs = torch.from_numpy(get_2d_sincos_pos_embed(64, side)).float()
    torch.testing.assert_close(sine_cosine(64, (side, side), torch.device("cpu")), theirs, rtol=0, atol=5e-6)


def test_the_order_of_kept_patches_does_not_matter() -> None:
    decoder = build()
    cls, patches, keep = synthetic((4, 4), 6)
    shuffled = torch.randperm(6, generator=torch.Generator().manual_seed(2))
    decoded = decoder(cls, patches[:, shuffled], keep[:, shuffled], (4, 4))
    torch.testing.assert_close(decoded, decoder(cls, patches, keep, (4, 4)), rtol=0, atol=1e-5)


def test_every_parameter_learns_and_the_mask_token_has_0_where_nothing_is_missing() -> None:
    for kept in (6, 16):
        decoder = build()
        decoder(*synthetic((4, 4), kept), (4, 4)).square().sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in decoder.parameters())
        assert bool(decoder.mask_token.grad.any()) == (kept < 16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_runs_under_autocast_with_tokens_of_any_precision(dtype: torch.dtype) -> None:
    decoder = build()
    cls, patches, keep = synthetic((2, 3), 2)
    expected = decoder(cls, patches, keep, (2, 3))
    with torch.autocast("cpu", torch.bfloat16):
        decoded = decoder(cls.to(dtype), patches.to(dtype), keep, (2, 3))
    decoded.float().sum().backward()
    # bfloat16 has 8 significant bits; a token after the norm is of size 1, and some ten roundings lead to it
    torch.testing.assert_close(decoded.float(), expected, rtol=0, atol=10 * 2**-8)


def test_runs_in_half_precision_altogether() -> None:
    decoder = build().bfloat16()
    cls, patches, keep = synthetic((2, 3), 2)
    assert decoder(cls.bfloat16(), patches.bfloat16(), keep, (2, 3)).dtype == torch.bfloat16


def test_compiles_into_one_graph(without_type_checks: None) -> None:
    decoder = build()
    compiled = torch.compile(decoder, backend="eager", fullgraph=True)
    arguments = (*synthetic((2, 3), 2), (2, 3))
    torch.testing.assert_close(compiled(*arguments), decoder(*arguments))


@pytest.mark.parametrize("views", [(), (2,)])
def test_missing_patches_are_those_not_kept(views: tuple[int, ...]) -> None:
    keep = torch.tensor([[0, 3], [1, 2], [4, 5]]).expand(*views, -1, -1)
    missing = missing_patches(keep, 6)
    assert missing.shape == (*views, 3, 6)
    for index in torch.cartesian_prod(*(torch.arange(n) for n in missing.shape)).tolist():
        assert bool(missing[tuple(index)]) == (index[-1] not in keep[tuple(index[:-1])].tolist())
    assert not missing_patches(torch.arange(6)[None], 6).any()


def test_macs_are_weights_times_tokens_and_two_products_of_all_pairs() -> None:
    decoder = build(width=64, layers=3)
    matrices = sum(p.numel() for p in decoder.transformer.parameters() if p.ndim == 2)
    assert decoder.macs(196) == 197 * matrices + 3 * 2 * 197**2 * 64


def test_has_heads_of_32() -> None:
    for width, heads in ((512, 16), (32, 1), (28, 1)):
        block = build(width, 1).transformer.resblocks[0]
        assert isinstance(block.attn, nn.MultiheadAttention)
        assert block.attn.num_heads == heads


@pytest.mark.parametrize(
    ("width", "message"),
    [
        (100, "width is a multiple of 32, or of 4 below that, not 100"),
        (30, "or of 4 below that, not 30"),
        (0, "not 0"),
    ],
)
def test_refuses_widths_without_whole_heads(width: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PatchDecoder(IN_WIDTH, width, 1)
