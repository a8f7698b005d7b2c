"""Trained models in use: pictures and captions in, features and attention out."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from open_clip.transform import PreprocessCfg, image_transform_v2
from torch import Tensor, nn
from torch.nn import functional as F

from aclip.towers.models import ImageTower, create_model, is_image_only, preprocess_config, visual_of, weight_file
from aclip.towers.sources import Tokenizer, resolve_source, tokenizer_of
from aclip.towers.text import encode_text
from aclip.towers.vision import encode_image

logger = logging.getLogger(__name__)


class LoadedModel(nn.Module):
    """A model as `aclip.load` returns it. It always sees whole pictures: there is nothing here to mask with.

    Attributes:
        model: the open_clip model itself (or `ImageTower`, for a run without text).
        preprocess: PIL image -> (3, h, w) float32, resized, cropped and normalised as the model expects.
        tokenizer: texts -> (B, T) int64 token ids.
    """

    def __init__(self, model: nn.Module, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.preprocess: Callable[[Any], Tensor] = image_transform_v2(
            PreprocessCfg(**preprocess_config(model)), is_train=False)

    @property
    def has_text(self) -> bool:
        """Whether it can encode captions: a run of a recipe without text saves its image tower alone."""
        return not isinstance(self.model, ImageTower)

    def encode_image(self, images: Float[Tensor, "B 3 h w"], normalize: bool = True) -> Float[Tensor, "B D"]:
        """Return image features in the joint space.

        Args:
            images: (B, 3, h, w) normalised pixels, see `preprocess`; any size of whole patches.
            normalize: whether rows have L2 norm 1.
        """
        features = encode_image(visual_of(self.model), images).features
        return F.normalize(features, dim=-1) if normalize else features

    def encode_trunk(self, images: Float[Tensor, "B 3 h w"]) -> Float[Tensor, "B C"]:
        """Return the pooled image token after the final norm, before the projection into the joint space.

        What CLIP's (arXiv 2103.00020, appendix A.3) and SLIP's probes read; also of models without text.

        Args:
            images: as in `encode_image`.

        Returns:
            (B, C), not normalised.
        """
        return encode_image(visual_of(self.model), images).cls

    def encode_text(self, tokens: Int[Tensor, "B T"], normalize: bool = True) -> Float[Tensor, "B D"]:
        """Return text features in the joint space.

        Args:
            tokens: (B, T) int64, see `tokenizer`.
            normalize: whether rows have L2 norm 1.

        Raises:
            UnsupportedModelError: the model has no text tower.
        """
        features = encode_text(self.model, tokens)
        return F.normalize(features, dim=-1) if normalize else features

    @torch.no_grad()
    def attention_scores(self, images: Float[Tensor, "B 3 h w"]) -> Float[Tensor, "B N"]:
        """Return how much the class token attends to each patch, averaged over layers and heads.

        Args:
            images: (B, 3, h, w) normalised pixels.

        Returns:
            (B, N) float32 in [0, 1], patches row by row; see `aclip.towers.encode_image`.
        """
        scores = encode_image(visual_of(self.model), images, return_scores=True).scores
        assert scores is not None
        return scores


def load(source: str | Path, *, checkpoint: str | Path | None = None) -> LoadedModel:
    """Load a model for use, on the CPU, in fp32 and evaluation mode.

    Args:
        source: a run folder (its `final/`), a folder with `open_clip_config.json`, or an open_clip name,
            as in `aclip.towers.sources.resolve_source`.
        checkpoint: a weight file to use in place of the source's own.

    Raises:
        ConfigError, CheckpointError, UnsupportedModelError: as `create_model`.

    Example:
        model = aclip.load("runs/emoji")
        pictures = model.preprocess(Image.open("cat.png"))[None]
        similarity = model.encode_image(pictures) @ model.encode_text(model.tokenizer(["a cat", "a dog"])).T
    """
    found = resolve_source(source)
    if not found.has_weights and checkpoint is None:
        logger.warning("'%s' names an architecture without weights: its features mean nothing yet", source)
    weights = weight_file(found, checkpoint)
    image_only = weights is not None and is_image_only(weights)
    model = create_model(source, checkpoint=checkpoint, with_text=not image_only)
    return LoadedModel(model.eval(), tokenizer_of(source)).eval()
