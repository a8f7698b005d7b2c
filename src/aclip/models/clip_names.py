"""The names of a CLIP model's weights in open_clip and in transformers' `CLIPModel`, in both directions.

Both libraries compute the same function of the same numbers; they name and stack them differently:

    open_clip                                   CLIPModel
    attn.in_proj_weight (3C, C)                 self_attn.q_proj, k_proj, v_proj (C, C) each
    visual.proj (C, D), text_projection (C, D)  visual_projection (D, C), text_projection (D, C)
    ls_1.gamma, ls_2.gamma (C,)                 none: multiplied into the linear layer before them

    x + s * (W y + b) = x + (s W) y + s b
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from aclip.errors import UnsupportedModelError

_OUTSIDE_BLOCKS = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",  # the misspelling is part of the format
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "logit_scale": "logit_scale",
}
_TRANSPOSED = {"visual.proj": "visual_projection.weight", "text_projection": "text_projection.weight"}
_IN_BLOCKS = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2",
              "attn.out_proj": "self_attn.out_proj"}
_SCALES = {"attn.out_proj": "ls_1.gamma", "mlp.c_proj": "ls_2.gamma"}
"""Linear layer -> the LayerScale after it."""

_OPEN_CLIP_BLOCK = re.compile(r"((visual\.)?transformer\.resblocks\.(\d+)\.)(.+)[._](weight|bias|gamma)")
_CLIP_MODEL_BLOCK = re.compile(r"(vision|text)_model\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)")


def to_open_clip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the state dict of a `CLIPModel` under open_clip's names: q, k, v stacked, projections transposed.

    Names that `CLIPModel` does not have are passed on unchanged, for `load_state_dict` to report.
    """
    inside, outside, transposed = (
        {theirs: ours for ours, theirs in names.items()} for names in (_IN_BLOCKS, _OUTSIDE_BLOCKS, _TRANSPOSED))
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        block = _CLIP_MODEL_BLOCK.fullmatch(name)
        if block:
            tower, number, module, kind = block.groups()
            prefix = f"{'visual.' if tower == 'vision' else ''}transformer.resblocks.{number}"
            if module == "self_attn.q_proj":
                thirds = (name.replace(module, f"self_attn.{letter}_proj") for letter in "qkv")
                stacked = [state[third] for third in thirds if third in state]
                renamed[f"{prefix}.attn.in_proj_{kind}"] = torch.cat(stacked)
            elif module not in ("self_attn.k_proj", "self_attn.v_proj"):
                renamed[f"{prefix}.{inside.get(module, module)}.{kind}"] = tensor
        elif name in transposed:
            renamed[transposed[name]] = tensor.T
        elif not name.endswith("position_ids"):  # a constant that older versions saved
            renamed[outside.get(name, name)] = tensor
    return renamed


def to_hugging_face(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the state dict of an open_clip ViT, or of its image tower alone, under `CLIPModel`'s names.

    LayerScale is multiplied into the layer before it. Tensors may share memory with `state`.

    Raises:
        UnsupportedModelError: a tensor that `CLIPModel` has no place for.
    """
    state = {name.removeprefix("text."): tensor for name, tensor in state.items()}
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        block = _OPEN_CLIP_BLOCK.fullmatch(name)
        prefix, visual, number, module, kind = block.groups() if block else ("",) * 5
        layer = f"{'vision' if visual else 'text'}_model.encoder.layers.{number}"
        if module == "attn.in_proj":
            for letter, third in zip("qkv", tensor.chunk(3), strict=True):
                renamed[f"{layer}.self_attn.{letter}_proj.{kind}"] = third
        elif module in _IN_BLOCKS:
            scale = state.get(prefix + _SCALES[module]) if module in _SCALES else None
            if scale is not None:
                tensor = tensor * (scale[:, None] if kind == "weight" else scale)
            renamed[f"{layer}.{_IN_BLOCKS[module]}.{kind}"] = tensor
        elif name in _TRANSPOSED:
            renamed[_TRANSPOSED[name]] = tensor.T
        elif name == "text_projection.weight":  # a linear layer, already (D, C)
            renamed[name] = tensor
        elif name in _OUTSIDE_BLOCKS:
            renamed[_OUTSIDE_BLOCKS[name]] = tensor
        elif kind != "gamma":
            raise UnsupportedModelError(f"transformers' CLIPModel has no place for the tensor {name}")
    return renamed
