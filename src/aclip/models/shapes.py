"""What an open_clip model config says without building the model, and which configs can be trained here."""

from collections.abc import Mapping
from typing import Any

from open_clip.model import CLIPTextCfg, CLIPVisionCfg

from aclip.errors import ConfigError, UnsupportedModelError
from aclip.models.text import can_cut, has_custom_blocks
from aclip.models.timm_vit import TimmVit, obstacle_by_name, timm_outline
from aclip.models.vit import SUPPORTED, grid_of, pair
from aclip.structs import TowerShape


def shape_of(config: Mapping[str, Any]) -> TowerShape:
    """Return the sizes of a model from its open_clip config (`model_config`) alone.

    Raises:
        UnsupportedModelError: a tower that cannot be trained here.
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
    """Return both halves of a model config with open_clip's defaults filled in.

    Raises:
        UnsupportedModelError: a ResNet, a timm model that is not a plain ViT, attentional pooling, custom attention
            blocks, a Hugging Face text tower, or CoCa.
        ConfigError: not an open_clip config, or fields that the installed open_clip does not know.
    """
    try:
        vision, text = CLIPVisionCfg(**config["vision_cfg"]), CLIPTextCfg(**config["text_cfg"])
        config["embed_dim"]
    except (KeyError, TypeError, IndexError) as error:
        raise ConfigError("this is not a model config of the installed open_clip, with embed_dim, vision_cfg and "
                          f"text_cfg: {error}") from error
    what = _unsupported(config, vision, text)
    if what:
        raise UnsupportedModelError(f"this model has {what}, which cannot be trained here: {SUPPORTED}")
    return vision, text


def patch_size_of(config: Mapping[str, Any]) -> tuple[int, int]:
    """Return the patch size (height, width) of a config; of a timm model, from its outline."""
    vision, _ = check_config(config)
    return TimmVit(timm_outline(config)).patch_size if vision.timm_model_name else pair(vision.patch_size)


def _timm_sizes(config: Mapping[str, Any]) -> dict[str, Any]:
    vit = TimmVit(timm_outline(config))
    block, pool, width = vit.trunk.blocks[0], vit.trunk.attn_pool, vit.trunk.embed_dim
    weights = sum(p.numel() for p in block.mlp.parameters() if p.ndim == 2)
    return {
        "width": width,
        "layers": len(vit.trunk.blocks),
        "heads": block.attn.num_heads,
        "mlp_width": round(weights / (2 * width)),
        "num_prefix_tokens": vit.num_prefix_tokens,
        "scored": vit.scored_by is not None,
        "pool_mlp_width": 0 if pool is None else pool.mlp.fc1.out_features,
    }


def _unsupported(config: Mapping[str, Any], vision: CLIPVisionCfg, text: CLIPTextCfg) -> str | None:
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
    return "custom attention blocks in the image tower" if has_custom_blocks(vision) else None
