"""transformers' `SiglipModel` and `Siglip2Model`, without transformers: their configs, and their weights in open_clip.

SigLIP (arXiv 2303.15343), and SigLIP 2 (arXiv 2502.14786), whose checkpoints of a fixed size are `SiglipModel` too. In
open_clip the image tower is timm's:

    SiglipModel                                          open_clip
    vision_model.embeddings.*                            visual.trunk.patch_embed.proj, .pos_embed
    vision_model.encoder.layers.I: q_proj, k_proj, ...   visual.trunk.blocks.I: qkv, stacked
    vision_model.head.probe, .attention.in_proj (3C, C)  visual.trunk.attn_pool.latent, .q (C, C), .kv (2C, C)
    text_model.head                                      text.text_projection

`Siglip2Model` (NaFlex) takes images of any aspect; here it is the tower of square images of as many patches as it has
positions. Its patches are (row, column, channel) rows of a matrix, timm's (channel, row, column).
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor

from aclip.errors import UnsupportedModelError

# transformers leaves out of a config.json what equals its defaults
_COMMON = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
           "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6}
_VISION = {**_COMMON, "image_size": 224, "patch_size": 16, "num_patches": 256, "vision_use_head": True}
_TEXT = {**_COMMON, "vocab_size": 32000, "max_position_embeddings": 64}

_SIZES = {(768, 12, 12, 3072): "base", (1024, 24, 16, 4096): "large", (1152, 27, 16, 4304): "so400m",
          (1536, 40, 16, 6144): "giantopt"}
"""(width, layers, heads, MLP width) of an image tower -> its size in timm's names."""


def open_clip_config(config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return the open_clip config of a `SiglipModel`'s or `Siglip2Model`'s; KeyError, TypeError if it is none.

    `vision_cfg.act_kwargs` is this package's: timm's own SigLIP towers below the giant have the exact GELU, the models
    were trained with its tanh approximation.

    Raises:
        UnsupportedModelError: an image tower that timm has no name for, or other activations.
    """
    vision, text = {**_VISION, **config["vision_config"]}, {**_TEXT, **config["text_config"]}
    side = vision["patch_size"]
    image_size = math.isqrt(vision["num_patches"]) * side if config["model_type"] == "siglip2" else vision["image_size"]
    image_size -= image_size % side  # one has patches of 14 in 384 pixels, whose last 6 its convolution leaves out
    size = tuple(vision[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads",
                                           "intermediate_size"))
    names = timm.list_models(f"vit_{_SIZES[size]}_patch{side}_siglip_[0-9]*") if size in _SIZES else []
    acts = {vision["hidden_act"], text["hidden_act"]}
    if not names or acts != {"gelu_pytorch_tanh"} or not vision["vision_use_head"]:
        raise UnsupportedModelError(
            f"'{folder}' holds a {config['model_type']} model of width, layers, heads, MLP width {size}, patches of "
            f"{side} pixels, activations {', '.join(sorted(acts))} and {'a' if vision['vision_use_head'] else 'no'} "
            f"pooling head: open_clip can build {', '.join(map(str, _SIZES))} with patches of 14, 16 or 32, "
            "gelu_pytorch_tanh and a pooling head")
    exact = [name for name in names if name.endswith(f"_{image_size}")]
    of_siglip_2 = text["vocab_size"] == 256_000
    own = any(folder.glob("tokenizer*")) or any(folder.glob("spiece.model"))
    hub = "timm/ViT-B-16-SigLIP2" if of_siglip_2 else "timm/ViT-B-16-SigLIP"
    return {
        "embed_dim": vision["hidden_size"],
        "custom_text": True,
        "init_logit_bias": -10,
        "vision_cfg": {"timm_model_name": (exact or names)[0], "timm_model_pretrained": False, "timm_pool": "map",
                       "timm_proj": "none", "image_size": image_size, "act_kwargs": {"approximate": "tanh"}},
        "text_cfg": {
            "context_length": text["max_position_embeddings"], "vocab_size": text["vocab_size"],
            "width": text["hidden_size"], "heads": text["num_attention_heads"], "layers": text["num_hidden_layers"],
            "mlp_ratio": mlp_ratio(text), "no_causal_mask": True, "proj_bias": True, "pool_type": "last",
            "norm_kwargs": {"eps": text["layer_norm_eps"]}, "act_kwargs": {"approximate": "tanh"},
            "hf_tokenizer_name": str(folder) if own else hub, "tokenizer_kwargs": {"clean": "canonicalize"}},
    }


def mlp_ratio(tower: Mapping[str, Any]) -> float:
    """Return open_clip's `mlp_ratio` of a tower in transformers' names; open_clip rounds width x ratio down."""
    hidden, width = tower["intermediate_size"], tower["hidden_size"]
    return float(hidden / width if int(width * (hidden / width)) == hidden else (hidden + 0.5) / width)


_NAMES = (
    (r"vision_model\.embeddings\.patch_embedding", "visual.trunk.patch_embed.proj"),
    (r"vision_model\.embeddings\.position_embedding\.weight", "visual.trunk.pos_embed"),
    (r"vision_model\.encoder\.layers\.(\d+)\.layer_norm", r"visual.trunk.blocks.\1.norm"),
    (r"vision_model\.encoder\.layers\.(\d+)\.self_attn\.out_proj", r"visual.trunk.blocks.\1.attn.proj"),
    (r"vision_model\.encoder\.layers\.(\d+)\.self_attn\.qkv\.", r"visual.trunk.blocks.\1.attn.qkv."),
    (r"vision_model\.encoder\.layers\.(\d+)\.", r"visual.trunk.blocks.\1."),
    (r"vision_model\.post_layernorm", "visual.trunk.norm"),
    (r"vision_model\.head\.probe", "visual.trunk.attn_pool.latent"),
    (r"vision_model\.head\.attention\.(q|kv)\.", r"visual.trunk.attn_pool.\1."),
    (r"vision_model\.head\.attention\.out_proj", "visual.trunk.attn_pool.proj"),
    (r"vision_model\.head\.layernorm", "visual.trunk.attn_pool.norm"),
    (r"vision_model\.head\.mlp", "visual.trunk.attn_pool.mlp"),
    (r"text_model\.embeddings\.token_embedding", "text.token_embedding"),
    (r"text_model\.embeddings\.position_embedding\.weight", "text.positional_embedding"),
    (r"text_model\.encoder\.layers\.(\d+)\.layer_norm", r"text.transformer.resblocks.\1.ln_"),
    (r"text_model\.encoder\.layers\.(\d+)\.self_attn\.out_proj", r"text.transformer.resblocks.\1.attn.out_proj"),
    (r"text_model\.encoder\.layers\.(\d+)\.self_attn\.qkv\.", r"text.transformer.resblocks.\1.attn.in_proj_"),
    (r"text_model\.encoder\.layers\.(\d+)\.mlp\.fc1", r"text.transformer.resblocks.\1.mlp.c_fc"),
    (r"text_model\.encoder\.layers\.(\d+)\.mlp\.fc2", r"text.transformer.resblocks.\1.mlp.c_proj"),
    (r"text_model\.final_layer_norm", "text.ln_final"),
    (r"text_model\.head", "text.text_projection"),
)


def to_open_clip(state: Mapping[str, Tensor], patch_size: int) -> dict[str, Tensor]:
    """Return the state dict of a `SiglipModel` or `Siglip2Model` under open_clip's names.

    Names that they do not have are passed on unchanged, for `load_state_dict` to report.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if ".self_attn.q_proj." in name:
            thirds = [state[name.replace("q_proj", f"{letter}_proj")] for letter in "qkv"]
            found[name.replace("q_proj", "qkv")] = torch.cat(thirds)
        elif match := re.fullmatch(r"(vision_model\.head\.attention\.)in_proj_(weight|bias)", name):
            third = tensor.shape[0] // 3
            found[f"{match[1]}q.{match[2]}"], found[f"{match[1]}kv.{match[2]}"] = tensor[:third], tensor[third:]
        elif name == "vision_model.embeddings.patch_embedding.weight" and tensor.ndim == 2:
            found[name] = tensor.unflatten(1, (patch_size, patch_size, -1)).permute(0, 3, 1, 2)
        elif name == "vision_model.embeddings.position_embedding.weight":
            found[name] = tensor[None]
        elif ".self_attn.k_proj." not in name and ".self_attn.v_proj." not in name and "position_ids" not in name:
            found[name] = tensor
    return {_renamed(name): tensor for name, tensor in found.items()}


def _renamed(name: str) -> str:
    for pattern, ours in _NAMES:
        renamed, found = re.subn(f"^{pattern}", ours, name)
        if found:
            return renamed
    return name
