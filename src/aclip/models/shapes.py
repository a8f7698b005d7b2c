"""What an open_clip model config says, without building the model."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from open_clip.model import CLIPTextCfg, CLIPVisionCfg
from open_clip.timm_model import TimmModel

from aclip.errors import ConfigError, UnsupportedModelError
from aclip.models.text import can_cut
from aclip.models.timm_vit import TimmVit, obstacle, obstacle_by_name, outline
from aclip.models.vision import SUPPORTED, grid_of
from aclip.structs import TowerShape


def shape_of(config: Mapping[str, Any]) -> TowerShape:
    """Return the sizes of a model from its open_clip config (`model_config`) alone.

    Raises:
        UnsupportedModelError: towers that this package cannot run, see `check_config`.
        ConfigError: an image size that is not a whole number of patches.
    """
    vision, text = check_config(config)
    image_size, patch_size = pair(vision.image_size), patch_size_of(config)
    grid_of(image_size, patch_size)
    image = _timm_sizes(config) if vision.timm_model_name else {
        "width": vision.width,
        "layers": vision.layers,
        "heads": vision.width // vision.head_width,
        "mlp_width": int(vision.width * vision.mlp_ratio),
        "num_prefix_tokens": 1,
        "scored": vision.pool_type == "tok",
    }
    return TowerShape(
        image_size=image_size,
        patch_size=patch_size,
        joint_dim=config["embed_dim"],
        text_width=text.width,
        text_layers=text.layers,
        text_mlp_width=int(text.width * text.mlp_ratio),
        context_length=text.context_length,
        vocab_size=text.vocab_size,
        text_cut=can_cut(config),
        **image,
    )


def check_config(config: Mapping[str, Any]) -> tuple[CLIPVisionCfg, CLIPTextCfg]:
    """Return both halves of a model config with open_clip's defaults filled in, if both towers can be run.

    Of a tower of timm's, its name is looked at; what else it may be made of shows when its outline is built
    (`patch_size_of`, `shape_of`).

    Raises:
        UnsupportedModelError: a ResNet, a model of timm's that is no plain ViT, attentional pooling, custom attention
            blocks, a Hugging Face text tower, or CoCa.
        ConfigError: not an open_clip config, or one with fields that open_clip does not know.
    """
    halves = []
    for key, cls in (("vision_cfg", CLIPVisionCfg), ("text_cfg", CLIPTextCfg)):
        values = config.get(key) if isinstance(config, Mapping) else None
        if not isinstance(values, Mapping) or "embed_dim" not in config:
            raise ConfigError(f"this is not an open_clip model config: {key} or embed_dim is missing")
        unknown = set(values) - {field.name for field in dataclasses.fields(cls)}
        if unknown:
            raise ConfigError(f"{key} of this model config has fields that the installed open_clip does not "
                              f"know: {', '.join(sorted(unknown))}")
        halves.append(cls(**values))
        _check_positive(key, values)
    vision, text = halves
    what = _unsupported(config, vision, text)
    if what:
        raise UnsupportedModelError(f"this model has {what}, which cannot be trained here: {SUPPORTED}")
    return vision, text


def _check_positive(half: str, values: Mapping[str, Any]) -> None:
    """Refuse a half of a config that counts something below 1.

    Raises:
        ConfigError: names the field.
    """
    for field in ("image_size", "patch_size", "width", "layers", "head_width", "heads", "context_length", "vocab_size"):
        found = values.get(field, 1)
        for number in found if isinstance(found, list | tuple) else (found,):
            if isinstance(number, int | float) and not number >= 1:
                raise ConfigError(f"{field} of this model config's {half} is {number}, and must be at least 1")


def patch_size_of(config: Mapping[str, Any]) -> tuple[int, int]:
    """Return the patch size (height, width) of a config; a name of timm's says it by building its outline.

    Raises:
        As `check_config`.
    """
    vision, _ = check_config(config)
    return TimmVit(timm_outline(config)).patch_size if vision.timm_model_name else pair(vision.patch_size)


def timm_outline(config: Mapping[str, Any]) -> TimmModel:
    """Return the image tower of a config that names one of timm's, without weights, if it can be run.

    Raises:
        UnsupportedModelError: not a plain ViT, or settings that timm refuses.
    """
    name = config["vision_cfg"]["timm_model_name"]
    try:
        visual = outline(config["vision_cfg"], config["embed_dim"])
    except (RuntimeError, AssertionError, TypeError, ValueError) as error:
        raise UnsupportedModelError(f"timm's image tower {name} cannot be built with this config: {error}") from error
    what = obstacle(visual)
    if what:
        raise UnsupportedModelError(f"this model has {what}, which cannot be trained here: {SUPPORTED}")
    return visual


def pair(size: Any) -> tuple[int, int]:
    """Return (height, width) from one number or two.

    Raises:
        ConfigError: anything else.
    """
    sides = size if isinstance(size, list | tuple) else (size, size)
    if len(sides) != 2 or not all(type(side) is int for side in sides):
        raise ConfigError(f"a size is a whole number of pixels, or two of them (height, width), not {size!r}")
    height, width = sides
    return height, width


def _timm_sizes(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the sizes that only the tower itself knows."""
    vit = TimmVit(timm_outline(config))
    block, pool, width = vit.trunk.blocks[0], vit.trunk.attn_pool, vit.trunk.embed_dim
    weights = sum(p.numel() for p in block.mlp.parameters() if p.ndim == 2)
    return {
        "width": width,
        "layers": len(vit.trunk.blocks),
        "heads": block.attn.num_heads,
        "mlp_width": round(weights / (2 * width)),
        "num_prefix_tokens": vit.num_prefix_tokens,
        "scored": vit.asker is not None,
        "pool_mlp_width": 0 if pool is None else pool.mlp.fc1.out_features,
    }


def _unsupported(config: Mapping[str, Any], vision: CLIPVisionCfg, text: CLIPTextCfg) -> str | None:
    """Name what is not supported, if anything."""
    if "multimodal_cfg" in config:
        return "a captioning decoder (CoCa)"
    if text.hf_model_name:
        return f"the Hugging Face text tower {text.hf_model_name}"
    if vision.timm_model_name:
        return obstacle_by_name(vision.timm_model_name)
    if not isinstance(vision.layers, int):
        return "a ResNet image tower"
    if vision.attentional_pool or vision.pool_type not in ("tok", "avg"):
        return "an image tower that pools by attention or not at all"
    if (vision.block_type == "custom" or vision.qk_norm or vision.scaled_cosine_attn or vision.scale_heads
            or vision.scale_attn_inner or vision.scale_attn or vision.scale_fc):
        return "custom attention blocks in the image tower"
    return None
