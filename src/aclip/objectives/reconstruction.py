"""The pixels of removed patches, predicted from the others: MAE with a decoder, SimMIM with one linear layer."""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from aclip.config import Count, Natural, Pass
from aclip.errors import ConfigError
from aclip.objectives.base import Objective
from aclip.objectives.decoder import HEAD_WIDTH, PatchDecoder, missing_patches
from aclip.structs import StepContext, TowerShape

_ERRORS = {"mse": F.mse_loss, "l1": F.l1_loss}


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
        reads, shape: see `Objective`.
        decoder_layers: blocks of the decoder; 0 is SimMIM's linear layer alone.
        decoder_width: of the decoder, see `PatchDecoder`; None is `fitting_width`. Ignored without a decoder.
        normalize: whether the pixels of each patch are normalised.
        loss: "mse" or "l1".

    Raises:
        ConfigError: a decoder for a pass that fills, or none for a pass that does not.
    """

    needs_patches = True
    needs_pixels = True
    needs_masking = True

    def __init__(
        self,
        reads: Mapping[str, Pass],
        shape: TowerShape,
        decoder_layers: Natural = 8,
        decoder_width: Count | None = None,
        normalize: bool = True,
        loss: Literal["mse", "l1"] = "mse",
    ) -> None:
        super().__init__(reads, shape)
        (name, seen), = reads.items()
        if seen.fill and decoder_layers != 0:
            raise ConfigError(f"objective 'reconstruction' has mask tokens in its decoder, but pass '{name}' fills: "
                              "set fill to false, or decoder_layers to 0 (SimMIM)")
        if not seen.fill and decoder_layers == 0:
            raise ConfigError(f"objective 'reconstruction' without a decoder reads mask tokens, but pass '{name}' does "
                              "not fill: set fill to true, or decoder_layers to 8 (MAE)")
        self.normalize, self.loss = normalize, loss
        self.needs_pooled = decoder_layers > 0
        width = decoder_width or fitting_width(shape.width)
        self.decoder = PatchDecoder(shape.width, width, decoder_layers) if decoder_layers else None
        self.head = nn.Linear(width if decoder_layers else shape.width, 3 * shape.patch_size[0] * shape.patch_size[1])

    def forward(self, context: StepContext) -> Float[Tensor, ""]:
        """Read the patch tokens of the pass, its pixels, and which patches it kept."""
        seen = context.passes[self.reads[0]]
        assert seen.patches is not None
        assert seen.pixels is not None
        target = patch_pixels(seen.pixels, seen.grid_size)
        views, samples, num_patches, _ = target.shape
        keep = seen.keep_indices
        if keep is None:  # explicit, so that every parameter is part of the graph in every step
            keep = torch.arange(num_patches, device=target.device).expand(views, samples, -1)

        tokens = seen.patches.flatten(0, 1)
        if self.decoder is not None:
            tokens = self.decoder(seen.cls.flatten(0, 1), tokens, keep.flatten(0, 1), seen.grid_size)
        predicted = self.head(tokens).unflatten(0, (views, samples)).float()
        if self.normalize:
            target = (target - target.mean(dim=-1, keepdim=True)) / (target.var(dim=-1, keepdim=True) + 1e-6).sqrt()
        error = _ERRORS[self.loss](predicted, target, reduction="none").mean(dim=-1)
        removed = views * samples * (num_patches - keep.shape[-1])
        return error.masked_fill(~missing_patches(keep, num_patches), 0.0).sum() / max(1, removed)

    def decoder_macs(self, images: Sequence[tuple[int, int, int]], text_tokens: float) -> float:
        """See `Objective.decoder_macs`; the linear layer is not counted."""
        views, num_patches, _ = images[0]
        return views * self.decoder.macs(num_patches) if self.decoder is not None else 0.0


def fitting_width(width: int) -> int:
    """Return the decoder's width for an encoder's: MAE's 512 from 768 on, two thirds below, in whole heads."""
    return min(512, max(1, round(width * 2 / 3 / HEAD_WIDTH)) * HEAD_WIDTH)


def patch_pixels(
    pixels: Float[Tensor, "V B 3 h w"], grid_size: tuple[int, int]
) -> Float[Tensor, "V B N pixels"]:
    """Return the pixels of every patch, float32, patches row by row.

    Args:
        pixels: (V, B, 3, h, w) whole views.
        grid_size: patches (down, across), N = down * across.

    Returns:
        (V, B, N, 3 * h/down * w/across), ordered (channel, row, column) within a patch.
    """
    cells: Tensor = pixels.float().unflatten(4, (grid_size[1], -1)).unflatten(3, (grid_size[0], -1))
    return cells.permute(0, 1, 3, 5, 2, 4, 6).flatten(4).flatten(2, 3)
