"""What an open_clip model config says, without building the model."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from open_clip.model import CLIPTextCfg, CLIPVisionCfg

from aclip.errors import ConfigError, UnsupportedModelError
from aclip.structs import TowerShape
from aclip.towers.text import can_cut
from aclip.towers.vision import NUM_PREFIX_TOKENS, SUPPORTED, grid_of


def shape_of(config: Mapping[str, Any]) -> TowerShape:
    """Return the sizes of a model from its open_clip config (`model_config`) alone.

    Raises:
        UnsupportedModelError: towers that this package cannot run, see `check_config`.
        ConfigError: an image size that is not a whole number of patches.
    """
    vision, text = check_config(config)
    image_size, patch_size = pair(vision.image_size), pair(vision.patch_size)
    grid_of(image_size, patch_size)
    return TowerShape(
        image_size=image_size,
        patch_size=patch_size,
        width=vision.width,
        layers=vision.layers,
        heads=vision.width // vision.head_width,
        mlp_width=int(vision.width * vision.mlp_ratio),
        joint_dim=config["embed_dim"],
        num_prefix_tokens=NUM_PREFIX_TOKENS,
        text_width=text.width,
        text_layers=text.layers,
        text_mlp_width=int(text.width * text.mlp_ratio),
        context_length=text.context_length,
        vocab_size=text.vocab_size,
        text_cut=can_cut(config),
    )


def check_config(config: Mapping[str, Any]) -> tuple[CLIPVisionCfg, CLIPTextCfg]:
    """Return both halves of a model config with open_clip's defaults filled in, if both towers can be run.

    Raises:
        UnsupportedModelError: a ResNet, a timm model, attentional pooling, custom attention blocks, a Hugging
            Face text tower, or CoCa.
        ConfigError: not an open_clip config, or one with fields that open_clip does not know.
    """
    halves = []
    for key, cls in (("vision_cfg", CLIPVisionCfg), ("text_cfg", CLIPTextCfg)):
        values = config.get(key)
        if not isinstance(values, Mapping) or "embed_dim" not in config:
            raise ConfigError(f"this is not an open_clip model config: {key} or embed_dim is missing")
        unknown = set(values) - {field.name for field in dataclasses.fields(cls)}
        if unknown:
            raise ConfigError(f"{key} of this model config has fields that the installed open_clip does not "
                              f"know: {', '.join(sorted(unknown))}")
        halves.append(cls(**values))
    vision, text = halves
    what = _unsupported(config, vision, text)
    if what:
        raise UnsupportedModelError(f"this model has {what}, which cannot be trained here: {SUPPORTED}")
    return vision, text


def pair(size: Any) -> tuple[int, int]:
    """Return (height, width) from one number or two."""
    if isinstance(size, int):
        return size, size
    height, width = size
    return int(height), int(width)


def _unsupported(config: Mapping[str, Any], vision: CLIPVisionCfg, text: CLIPTextCfg) -> str | None:
    """Name what is not supported, if anything."""
    if vision.timm_model_name:
        return f"timm's image tower {vision.timm_model_name}"
    if not isinstance(vision.layers, int):
        return "a ResNet image tower"
    if vision.attentional_pool or vision.pool_type not in ("tok", "avg"):
        return "an image tower that pools by attention or not at all"
    if (vision.block_type == "custom" or vision.qk_norm or vision.scaled_cosine_attn or vision.scale_heads
            or vision.scale_attn_inner or vision.scale_attn or vision.scale_fc):
        return "custom attention blocks in the image tower"
    if text.hf_model_name:
        return f"the Hugging Face text tower {text.hf_model_name}"
    if "multimodal_cfg" in config:
        return "a captioning decoder (CoCa)"
    return None
