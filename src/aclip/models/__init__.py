"""Image and text towers: open_clip's models (and timm's, inside them), with what they lack added from outside.

What needs open_clip, timm or torchvision, which take seconds to import, is imported on first use.
"""

import importlib
from typing import TYPE_CHECKING, Any

from aclip.models.maps import text_maps
from aclip.models.text import (
    INTO_JOINT_SPACE,
    can_cut,
    cut_after_eot,
    encode_hidden_text,
    encode_text,
    logit_scale_of,
    text_tower_of,
)
from aclip.models.vision import (
    NO_ATTENTION_SCORES,
    attention_pool_of,
    encode_image,
    patch_embedding_of,
    resize_images,
    visual_of,
    vit_of,
)

if TYPE_CHECKING:
    from aclip.models.loaded import LoadedModel, load, tokenizer_of
    from aclip.models.loading import (
        ImageTower,
        Tokenizer,
        create_model,
        list_models,
        model_config,
        preprocess_config,
        resolve_source,
        shape_of,
    )

__all__ = ["INTO_JOINT_SPACE", "NO_ATTENTION_SCORES", "ImageTower", "LoadedModel", "Tokenizer", "attention_pool_of",
           "can_cut", "create_model", "cut_after_eot", "encode_hidden_text",
           "encode_image", "encode_text", "list_models", "load", "logit_scale_of", "model_config",
           "patch_embedding_of", "preprocess_config", "resize_images", "resolve_source", "shape_of", "text_maps",
           "text_tower_of", "tokenizer_of", "visual_of", "vit_of"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'aclip.models' has no attribute '{name}'")
    home = "loaded" if name in ("LoadedModel", "load", "tokenizer_of") else "loading"
    return getattr(importlib.import_module(f"aclip.models.{home}"), name)
