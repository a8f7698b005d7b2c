"""A model that looks at a part of every picture: what attentive inference costs in accuracy, and saves in time.

Nothing else in an evaluation can mask: `Encoder` has no argument for it, and this wrapper is made by name and on
purpose (`aclip evaluate --keep`).
"""

import time
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from aclip.errors import ConfigError, unknown_name
from aclip.masking import AttentiveMasking, MaskingContext, MaskingStrategy, UniformMasking, crop_scores
from aclip.models import LoadedModel, encode_image, visual_of
from aclip.models.vision import vit_of
from aclip.structs import ImageEncoding

KEPT_BY = {
    "attentive": "the patches that the model's own [CLS] token attends to most, on the whole picture",
    "attentive-half": "likewise, scored on the picture at half its size, which costs a quarter",
    "uniform": "patches at random, the same ones of the same picture in every run",
}


class MaskedEncoder(nn.Module):
    """An `Encoder` whose image tower is given some patches alone; captions are read whole.

    Attributes:
        keep: share of the patches that stay, in (0, 1].
        kept_by: in `KEPT_BY`.
        num_keep: patches that stay, and `num_patches` all; 0 until the first pictures.
        seconds: spent on encoding pictures, scoring them included. pictures: encoded in that time.
    """

    def __init__(self, model: LoadedModel, keep: float, kept_by: str = "attentive", block_size: int = 1) -> None:
        """Wrap `model`.

        Args:
            model: whose tower is run.
            keep: share of the patches that stay, counted as `masking.num_keep` does.
            kept_by: how they are chosen.
            block_size: side in patches of what is kept or removed as a whole; training uses 2.

        Raises:
            ConfigError: a share outside (0, 1], or an unknown way to choose.
        """
        super().__init__()
        if not 0.0 < keep <= 1.0:
            raise ConfigError(f"--keep is the share of patches that the model sees, 0 < share <= 1, not {keep:g}")
        if kept_by not in KEPT_BY:
            raise ConfigError(unknown_name("way to keep patches", kept_by, KEPT_BY))
        self.model, self.keep, self.kept_by, self.block_size = model, keep, kept_by, block_size
        strategy = UniformMasking if kept_by == "uniform" else AttentiveMasking
        self._masking: MaskingStrategy = strategy(1.0 - keep, block_size=block_size)
        self.num_keep = self.num_patches = self.pictures = 0
        self.seconds = 0.0

    @property
    def tokenizer(self) -> Callable[[list[str]], Int[Tensor, "B T"]]:
        """The model's own."""
        return self.model.tokenizer

    @property
    def preprocess(self) -> Callable[[Any], Float[Tensor, "3 h w"]]:
        """The model's own."""
        return self.model.preprocess

    def encode_text(self, tokens: Int[Tensor, "B T"], normalize: bool = True) -> Float[Tensor, "B D"]:
        """See `LoadedModel.encode_text`."""
        return self.model.encode_text(tokens, normalize=normalize)

    def encode_image(self, pixels: Float[Tensor, "B 3 h w"], normalize: bool = True) -> Float[Tensor, "B D"]:
        """Return the features of the kept patches, in the joint space."""
        features = self._encode(pixels).features
        return F.normalize(features, dim=-1) if normalize else features

    def encode_trunk(self, pixels: Float[Tensor, "B 3 h w"]) -> Float[Tensor, "B C"]:
        """Return the pooled token of the kept patches."""
        return self._encode(pixels).cls

    def keep_indices(self, pixels: Float[Tensor, "B 3 h w"]) -> Int[Tensor, "B K"] | None:
        """Return the patches that stay, ascending; None for all."""
        visual = visual_of(self.model.model)
        patch = vit_of(visual).patch_size
        grid = (pixels.shape[-2] // patch[0], pixels.shape[-1] // patch[1])
        self.num_patches = grid[0] * grid[1]
        self.num_keep = self._masking.num_keep(grid)
        if self.num_keep == self.num_patches:
            return None
        scores = None if self.kept_by == "uniform" else self._scores(visual, pixels, grid, patch)
        # a picture's own pixels seed its draw: the same in any batch and on any process
        seeds = pixels.detach().float().contiguous().view(torch.int32).flatten(1).sum(dim=1, dtype=torch.int64)
        return self._masking(MaskingContext(len(pixels), grid, pixels.device, scores=scores, seeds=seeds,
                                            purpose="masked evaluation"))

    def _scores(
        self, visual: nn.Module, pixels: Tensor, grid: tuple[int, int], patch: tuple[int, int]
    ) -> Float[Tensor, "B N"]:
        seen, seen_grid = pixels, grid
        if self.kept_by == "attentive-half":
            seen_grid = (max(1, grid[0] // 2), max(1, grid[1] // 2))
            seen = F.interpolate(pixels, size=(seen_grid[0] * patch[0], seen_grid[1] * patch[1]), mode="bilinear",
                                 antialias=True, align_corners=False)
        scores = encode_image(visual, seen, return_scores=True).scores
        assert scores is not None
        if seen_grid == grid:
            return scores
        whole = torch.tensor([[0.0, 0.0, 1.0, 1.0]], device=pixels.device).expand(len(pixels), -1)
        return crop_scores(scores, seen_grid, whole, whole, grid)

    def _encode(self, pixels: Tensor) -> ImageEncoding:
        start = _now(pixels.device)
        encoded = encode_image(visual_of(self.model.model), pixels, self.keep_indices(pixels))
        self.seconds += _now(pixels.device) - start
        self.pictures += len(pixels)
        return encoded


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
