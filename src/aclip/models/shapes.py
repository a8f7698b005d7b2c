"""open_clip model configs: the modules that they describe, and their sizes without weights."""

import functools
import json
from collections.abc import Mapping
from typing import Any

import torch
from open_clip.model import CLIP, CustomTextCLIP
from torch import nn

from aclip.errors import ConfigError, UnsupportedModelError
from aclip.models.blocks import blocks_of
from aclip.models.text import can_cut, text_tower_of
from aclip.models.vision import SUPPORTED, attention_pool_of, grid_of, pair, resize_images, visual_of, vit_of
from aclip.structs import TowerShape


def shape_of(config: Mapping[str, Any]) -> TowerShape:
    """Return the sizes of a model from its open_clip config (`model_config`) alone.

    Raises:
        UnsupportedModelError: a tower that cannot be trained here.
        ConfigError: a config that describes no model, or an image size that is not a whole number of patches.
    """
    model = _outline(json.dumps(config))
    vit, text = vit_of(visual_of(model)), text_tower_of(model)
    pool: Any = attention_pool_of(vit.visual)
    image_size = pair(config["vision_cfg"].get("image_size", 224))
    grid_of(image_size, vit.patch_size)
    blocks, text_blocks = blocks_of(vit.stack), blocks_of(text.transformer)
    return TowerShape(
        image_size=image_size,
        patch_size=vit.patch_size,
        width=vit.patch_embedding.out_channels,
        layers=len(blocks),
        heads=blocks[0].attn.num_heads,
        mlp_width=_mlp_width(blocks[0].mlp, vit.patch_embedding.out_channels),
        joint_dim=config["embed_dim"],
        num_prefix_tokens=vit.num_prefix_tokens,
        text_width=text.token_embedding.embedding_dim,
        text_layers=len(text_blocks),
        text_mlp_width=_mlp_width(text_blocks[0].mlp, text.token_embedding.embedding_dim),
        context_length=int(text.context_length),
        vocab_size=text.token_embedding.num_embeddings,
        text_cut=can_cut(model),
        scored=vit.scored_by is not None,
        pool_mlp_width=0 if pool is None else pool.mlp.fc1.out_features,
    )


def patch_size_of(config: Mapping[str, Any]) -> tuple[int, int]:
    """Return the patch size (height, width) of a config; raises as `shape_of`."""
    return vit_of(visual_of(_outline(json.dumps(config)))).patch_size


@functools.lru_cache(maxsize=64)
def _outline(config: str) -> nn.Module:
    """Return the model of a config in JSON on the meta device, without weights; shared, not to be changed."""
    with torch.device("meta"):
        return build_modules(json.loads(config))


def build_modules(config: Mapping[str, Any]) -> nn.Module:
    """Build the modules of a config with fresh weights; raises as `shape_of`."""
    try:
        vision, text = dict(config["vision_cfg"]), config["text_cfg"]
        what = "a captioning decoder (CoCa)" if "multimodal_cfg" in config else (
            f"the Hugging Face text tower {text['hf_model_name']}" if text.get("hf_model_name") else None)
        if what is not None:
            raise UnsupportedModelError(f"it has {what}, which cannot be trained here: {SUPPORTED}")
        if vision.get("timm_model_name"):
            vision["timm_model_pretrained"] = False  # on ImageNet, fetched
        cls = CustomTextCLIP if config.get("custom_text") else CLIP
        rest = {key: value for key, value in config.items() if key != "custom_text"}
        model: nn.Module = cls(**{**rest, "vision_cfg": vision})
    except UnsupportedModelError:
        raise
    except Exception as error:  # whatever open_clip and timm meet in unknown fields and sizes that do not fit
        raise ConfigError(f"its config describes no model that open_clip can build: {error!r}") from error
    visual, size = visual_of(model), pair(vision.get("image_size", 224))
    if vision.get("timm_model_name") and vit_of(visual).grid_size != grid_of(size, vit_of(visual).patch_size):
        resize_images(visual, size)  # timm builds at a size of its own
    return model


def _mlp_width(mlp: nn.Module, width: int) -> int:
    """Return the hidden width of an MLP; of a gated one, that of the plain MLP with as many weights."""
    return round(sum(p.numel() for p in mlp.parameters() if p.ndim == 2) / (2 * width))
