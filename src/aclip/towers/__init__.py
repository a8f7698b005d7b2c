"""The two towers: open_clip's models, with what they lack added from outside.

A forward pass over kept patches, the class token's attention scores, positions at another resolution, and
text cut after the longest caption. The modules stay open_clip's own (and timm's, in it) and so do their state dicts.
"""

from aclip.towers.loaded import LoadedModel, load
from aclip.towers.models import ImageTower, create_model, preprocess_config, visual_of
from aclip.towers.shapes import shape_of
from aclip.towers.sources import Tokenizer, list_models, model_config, tokenizer_of
from aclip.towers.text import can_cut, cut_after_eot, encode_hidden_text, encode_text, logit_scale_of
from aclip.towers.vision import attention_pool_of, encode_image, patch_embedding_of

__all__ = [
    "ImageTower",
    "LoadedModel",
    "Tokenizer",
    "attention_pool_of",
    "can_cut",
    "create_model",
    "cut_after_eot",
    "encode_hidden_text",
    "encode_image",
    "encode_text",
    "list_models",
    "load",
    "logit_scale_of",
    "model_config",
    "patch_embedding_of",
    "preprocess_config",
    "shape_of",
    "tokenizer_of",
    "visual_of",
]
