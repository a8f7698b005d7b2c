"""Small models to export: unlike open_clip's defaults in every size, with weights away from zeros and ones."""

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import open_clip
import torch
from torch import nn

from aclip import models
from aclip.data import CaptionTokenizer

TINY: dict[str, Any] = {
    "embed_dim": 24, "quick_gelu": True,
    "vision_cfg": {"image_size": 24, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8, "mlp_ratio": 3.0,
                   "ls_init_value": 0.5},
    "text_cfg": {"context_length": 20, "vocab_size": 49408, "width": 48, "heads": 3, "layers": 2},
}


def changed(half: str | None = None, **values: Any) -> dict[str, Any]:
    """Return the tiny model's config with other values, in one half or at the top."""
    config = deepcopy(TINY)
    (config if half is None else config[half]).update(values)
    return config


def tiny_model(config: Mapping[str, Any] = TINY, *, with_text: bool = True) -> models.LoadedModel:
    """Return a fresh model; biases, norms and scales are perturbed, so that leaving one out shows."""
    torch.manual_seed(0)
    cls = open_clip.CustomTextCLIP if config.get("custom_text") else open_clip.CLIP
    model: nn.Module = cls(**{key: value for key, value in config.items() if key != "custom_text"})
    open_clip.model.set_model_preprocess_cfg(model, {
        "size": config["vision_cfg"]["image_size"], "mode": "RGB", "mean": (0.4, 0.5, 0.6), "std": (0.3, 0.2, 0.25),
        "interpolation": "bicubic", "resize_mode": "shortest", "fill_color": 0})
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim <= 1:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    if not with_text:
        model = models.ImageTower(model.visual)
    return models.LoadedModel(model.eval(), CaptionTokenizer(models.tokenizer_of(config)))


def with_shifted(model: models.LoadedModel, name: str) -> models.LoadedModel:
    """Return a copy of a model with one weight tensor moved a little."""
    copy = deepcopy(model)
    with torch.no_grad():
        dict(copy.model.named_parameters())[name].add_(0.01)
    return copy
