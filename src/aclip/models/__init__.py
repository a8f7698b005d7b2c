"""The two towers: open_clip's models, with what they lack added from outside.

A forward pass over kept patches, the class token's attention scores, positions at another resolution, and
text cut after the longest caption. The modules stay open_clip's own (and timm's, in it) and so do their state dicts.
"""

from aclip.models.loaded import LoadedModel, load
from aclip.models.models import ImageTower, create_model, preprocess_config, visual_of
from aclip.models.shapes import shape_of
from aclip.models.sources import Tokenizer, list_models, model_config, tokenizer_of
from aclip.models.text import can_cut, cut_after_eot, encode_hidden_text, encode_text, logit_scale_of
from aclip.models.vision import attention_pool_of, encode_image, patch_embedding_of

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
