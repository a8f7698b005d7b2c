"""The light decoder that predicts removed patches, from MAE (He et al., arXiv 2111.06377, section 3)."""

import torch
from jaxtyping import Bool, Float, Int
from open_clip.transformer import Transformer
from torch import Tensor, nn

from aclip.errors import ConfigError
from aclip.models.blocks import run_blocks
from aclip.objectives.base import block_macs

HEAD_WIDTH = 32  # MAE's decoder: 512 wide with 16 heads


class PatchDecoder(nn.Module):
    """Decodes kept patch tokens into tokens of all patches, a mask token in the place of each removed one.

        x = embed(tokens), a learned mask token where a patch was removed, + fixed sine-cosine positions
        return norm(blocks([cls; x])) without cls

    As in MAE, the class token goes through the same embedding and has no position. Unlike MAE, weights have the default
    initialisation of open_clip's blocks and torch's linear layers.

    Args:
        in_width: width C of the encoder.
        width: W of the decoder, a multiple of `HEAD_WIDTH`, or of 4 below it (one head).
        layers: number of blocks, at least 1.

    Raises:
        ConfigError: another width.
    """

    def __init__(self, in_width: int, width: int, layers: int) -> None:
        super().__init__()
        if width < 4 or width % (HEAD_WIDTH if width >= HEAD_WIDTH else 4):
            raise ConfigError(f"a patch decoder's width is a multiple of {HEAD_WIDTH}, or of 4 below that, not {width}")
        self.width, self.layers = width, layers
        self.embed = nn.Linear(in_width, width)
        self.mask_token = nn.Parameter(torch.randn(width) * 0.02)
        self.transformer = Transformer(width, layers, max(1, width // HEAD_WIDTH))
        self.norm = nn.LayerNorm(width)

    def forward(
        self,
        cls: Float[Tensor, "B C"],
        patches: Float[Tensor, "B K C"],
        keep_indices: Int[Tensor, "B K"],
        grid_size: tuple[int, int],
    ) -> Float[Tensor, "B N W"]:
        """Decode.

        Args:
            cls: (B, C) the class token after the encoder's final norm.
            patches: (B, K, C) the kept patches after it.
            keep_indices: (B, K) int64, their positions, without repeats. With all N kept, the mask token has a gradient
                of 0, not None.
            grid_size: patches (down, across), N = down * across.

        Returns:
            (B, N, W) patches row by row.
        """
        x = self.embed(patches)
        missing = self.mask_token.to(x.dtype).expand(len(x), grid_size[0] * grid_size[1], -1)
        x = missing.scatter(1, keep_indices[:, :, None].expand_as(x), x)
        # in the precision of the parameters: under autocast the sum is float32, as in the encoder
        x = x + sine_cosine(self.width, grid_size, x.device).to(self.mask_token.dtype)
        x = torch.cat([self.embed(cls)[:, None].to(x.dtype), x], dim=1)
        x, _ = run_blocks(self.transformer, x)
        decoded: Tensor = self.norm(x[:, 1:])
        return decoded

    def macs(self, num_patches: int) -> float:
        """Return multiply-accumulates of one image's forward pass through the blocks."""
        return self.layers * block_macs(num_patches + 1, self.width, 4 * self.width)


def missing_patches(keep_indices: Int[Tensor, "*B K"], num_patches: int) -> Bool[Tensor, "*B N"]:
    """Return which patches were removed: (..., N) bool, for `keep_indices` (..., K) int64 of N patches."""
    missing = torch.ones(*keep_indices.shape[:-1], num_patches, dtype=torch.bool, device=keep_indices.device)
    return missing.scatter(-1, keep_indices, False)


def sine_cosine(width: int, grid_size: tuple[int, int], device: torch.device) -> Float[Tensor, "N W"]:
    """Return MAE's fixed positions: sines and cosines of the column in the first half, of the row in the second.

        p(i, j) = [sin(j w), cos(j w), sin(i w), cos(i w)],  w_k = 10000^(-4 k / width), k < width / 4

    Equal to open_clip's `get_2d_sincos_pos_embed` on square grids, but computed on the device. On other grids, rows and
    columns have the same units.

    Args:
        width: W, a multiple of 4.
        grid_size: patches (down, across), N = down * across.
        device: of the result.

    Returns:
        (N, W) float32, patches row by row.
    """
    frequencies = 10000.0 ** (torch.arange(width // 4, device=device) * (-4.0 / width))
    down, across = (torch.arange(side, device=device)[:, None] * frequencies for side in grid_size)
    columns = torch.cat([across.sin(), across.cos()], dim=1).expand(grid_size[0], -1, -1)
    rows = torch.cat([down.sin(), down.cos()], dim=1)[:, None].expand(-1, grid_size[1], -1)
    return torch.cat([columns, rows], dim=2).flatten(0, 1)
