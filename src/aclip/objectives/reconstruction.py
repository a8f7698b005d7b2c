"""The pixels of removed patches, predicted from the others: MAE with a decoder, SimMIM with one linear layer."""

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from open_clip.transformer import Transformer
from torch import Tensor, nn

from aclip.config import Count, Natural, Pass
from aclip.errors import ConfigError
from aclip.models.blocks import run_blocks
from aclip.objectives.base import Objective, block_macs
from aclip.structs import Encoded, StepContext, TowerShape

HEAD_WIDTH = 32  # MAE's decoder: 512 wide with 16 heads


class Reconstruction(Objective):
    """The mean over the removed patches of the mean error of their pixels.

        L = mean_{k removed} mean_c |x_kc - y_kc|^e,  e = 2 for "mse", 1 for "l1"

    x is linear in a patch token; y are the 3 x height x width values of the patch's pixels, augmented and normalised as
    the encoder's input is. With `normalize`, y <- (y - mean y) / sqrt(var y + 1e-6), over the values of one patch and
    with the unbiased variance.

    - MAE (He et al., arXiv 2111.06377): removed patches left the sequence, and `PatchDecoder` puts mask tokens in their
      places. "mse" on normalised pixels.
    - SimMIM (Xie et al., arXiv 2111.09886): `decoder_layers` 0. Mask tokens went through the encoder (a pass with
      `fill`), whose tokens are read. "l1" on pixels that are not normalised per patch.

    The mean is over all views, samples and removed patches. The same number is removed from every image, so that the
    mean over ranks is the loss of the whole batch. With nothing removed the loss is 0, with a gradient of 0.

    Reads one image pass.

    Args:
        decoder_layers: blocks of the decoder; 0 is SimMIM's linear layer alone.
        decoder_width: see `PatchDecoder`; None is MAE's 512 from an encoder's 768 on, two thirds below, in whole heads.
        normalize: whether the pixels of each patch are normalised.
        loss: mean squared ("mse") or absolute ("l1") error.
    """

    needs_patches = True
    needs_pixels = True
    needs_masking = True

    def __init__(
        self, reads: Mapping[str, Pass], shape: TowerShape, decoder_layers: Natural = 8,
        decoder_width: Count | None = None, normalize: bool = True, loss: Literal["mse", "l1"] = "mse",
    ) -> None:
        super().__init__(reads, shape)
        (name, seen), = reads.items()
        if seen.fill != (decoder_layers == 0):
            raise ConfigError("objective 'reconstruction' needs mask tokens either in its decoder (MAE: decoder_layers "
                              "8, fill false) or in the encoder (SimMIM: decoder_layers 0, fill true), but has "
                              f"{decoder_layers} layers, and fill of pass '{name}' is {str(seen.fill).lower()}")
        self.normalize, self.loss = normalize, loss
        self.needs_pooled = decoder_layers > 0
        width = decoder_width or min(512, max(1, round(shape.width * 2 / 3 / HEAD_WIDTH)) * HEAD_WIDTH)
        self.decoder = PatchDecoder(shape.width, width, decoder_layers) if decoder_layers else None
        self.head = nn.Linear(width if decoder_layers else shape.width, 3 * shape.patch_size[0] * shape.patch_size[1])

    def forward(self, context: StepContext) -> Float[Tensor, ""]:
        seen = context.passes[self.reads[0]]
        assert seen.patches is not None
        assert seen.pixels is not None
        target = patch_pixels(seen.pixels, seen.grid_size)
        views, samples, num_patches, _ = target.shape
        keep = kept_indices(seen)
        tokens = seen.patches.flatten(0, 1)
        if self.decoder is not None:
            tokens = self.decoder(seen.cls.flatten(0, 1), tokens, keep.flatten(0, 1), seen.grid_size)
        predicted = self.head(tokens).unflatten(0, (views, samples)).float()
        if self.normalize:
            target = (target - target.mean(dim=-1, keepdim=True)) / (target.var(dim=-1, keepdim=True) + 1e-6).sqrt()
        error = (F.mse_loss if self.loss == "mse" else F.l1_loss)(predicted, target, reduction="none").mean(dim=-1)
        removed = views * samples * (num_patches - keep.shape[-1])
        return error.masked_fill(~missing_patches(keep, num_patches), 0.0).sum() / max(1, removed)

    def decoder_macs(self, images: Sequence[tuple[int, int, int]], text_tokens: float) -> float:
        views, num_patches, _ = images[0]  # the linear layer is not counted
        return views * self.decoder.macs(num_patches) if self.decoder is not None else 0.0


def patch_pixels(pixels: Float[Tensor, "V B 3 h w"], grid_size: tuple[int, int]) -> Float[Tensor, "V B N pixels"]:
    """Return the pixels of every patch, float32, ordered (channel, row, column); patches row by row."""
    cells: Tensor = pixels.float().unflatten(4, (grid_size[1], -1)).unflatten(3, (grid_size[0], -1))
    return cells.permute(0, 1, 3, 5, 2, 4, 6).flatten(4).flatten(2, 3)


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
        self, cls: Float[Tensor, "B C"], patches: Float[Tensor, "B K C"], keep_indices: Int[Tensor, "B K"],
        grid_size: tuple[int, int],
    ) -> Float[Tensor, "B N W"]:
        """Return all patches, row by row; with all N kept, the mask token has a gradient of 0, not None."""
        x = self.embed(patches)
        missing = self.mask_token.to(x.dtype).expand(len(x), grid_size[0] * grid_size[1], -1)
        x = missing.scatter(1, keep_indices[:, :, None].expand_as(x), x)
        # in the precision of the parameters: under autocast the sum is float32, as in the encoder
        x = x + sine_cosine(self.width, grid_size, x.device).to(self.mask_token.dtype)
        x = torch.cat([self.embed(cls)[:, None].to(x.dtype), x], dim=1)
        x, _ = run_blocks(self.transformer, x)
        return self.norm(x[:, 1:])  # type: ignore[no-any-return]

    def macs(self, num_patches: int) -> float:
        """Return multiply-accumulates of one image's forward pass through the blocks."""
        return self.layers * block_macs(num_patches + 1, self.width, 4 * self.width)


def kept_indices(seen: Encoded) -> Int[Tensor, "V B K"]:
    """Return the patches that a pass kept, explicit if all, so that every parameter is in the graph of every step."""
    if seen.keep_indices is not None:
        return seen.keep_indices
    return torch.arange(math.prod(seen.grid_size), device=seen.cls.device).expand(*seen.cls.shape[:2], -1)


def missing_patches(keep_indices: Int[Tensor, "*B K"], num_patches: int) -> Bool[Tensor, "*B N"]:
    """Return which of N patches were removed."""
    missing = torch.ones(*keep_indices.shape[:-1], num_patches, dtype=torch.bool, device=keep_indices.device)
    return missing.scatter(-1, keep_indices, False)


def sine_cosine(width: int, grid_size: tuple[int, int], device: torch.device) -> Float[Tensor, "N W"]:
    """Return MAE's fixed positions: sines and cosines of the column in the first half, of the row in the second.

        p(i, j) = [sin(j w), cos(j w), sin(i w), cos(i w)],  w_k = 10000^(-4 k / width), k < width / 4

    Equal to open_clip's `get_2d_sincos_pos_embed` on square grids, but computed on the device. On other grids, rows and
    columns have the same units. `width` is a multiple of 4.
    """
    frequencies = 10000.0 ** (torch.arange(width // 4, device=device) * (-4.0 / width))
    down, across = (torch.arange(side, device=device)[:, None] * frequencies for side in grid_size)
    columns = torch.cat([across.sin(), across.cos()], dim=1).expand(grid_size[0], -1, -1)
    rows = torch.cat([down.sin(), down.cos()], dim=1)[:, None].expand(-1, grid_size[1], -1)
    return torch.cat([columns, rows], dim=2).flatten(0, 1)
