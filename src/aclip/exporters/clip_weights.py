"""open_clip's weights under the names of transformers' `CLIPModel`, and what that class cannot represent.

Both libraries compute the same function of the same numbers; they name and stack them differently:

    open_clip                                   CLIPModel
    attn.in_proj_weight (3C, C)                 self_attn.q_proj, k_proj, v_proj (C, C) each
    mlp.c_fc, mlp.c_proj, ln_1, ln_2            mlp.fc1, mlp.fc2, layer_norm1, layer_norm2
    visual.proj (C, D), text_projection (C, D)  visual_projection (D, C), text_projection (D, C)

LayerScale has no place there, and needs none: x + s * (W y + b) = x + (s W) y + s b.
"""

from typing import Any

from open_clip.transformer import LayerScale, QuickGELU, ResidualAttentionBlock, VisionTransformer
from torch import Tensor, nn

from aclip.models import can_cut

SPECIAL_VOCABULARY = 49408
"""Entries of the vocabulary that open_clip bundles."""


def vision_obstacle(visual: Any) -> str | None:
    """Return what of an image tower the class cannot represent, or None.

    CLIPVisionModel is a ViT with a class token that is pooled, square pictures and patches, a norm before and after
    plain blocks.
    """
    if not isinstance(visual, VisionTransformer):
        return f"an image tower that is not open_clip's own ViT ({type(visual).__name__})"
    obstacles = {
        "pooling by attention": visual.attn_pool is not None,
        f"pooling '{visual.pool_type}', not the class token": visual.pool_type != "tok",
        "no norm before its blocks": not isinstance(visual.ln_pre, nn.LayerNorm),
        "pictures that are not square": visual.image_size[0] != visual.image_size[1],
        "patches that are not square": visual.patch_size[0] != visual.patch_size[1],
    }
    return next((what for what, there in obstacles.items() if there), None) or _block_obstacle(visual, "image")


def text_obstacle(model: nn.Module, tower: Any) -> str | None:
    """Return what of a text tower the class cannot represent, or None."""
    if not can_cut(model):
        return "a text tower that is not causal, or does not pool at the end of the text"
    if tower.token_embedding.weight.shape[0] != SPECIAL_VOCABULARY:
        return f"a vocabulary of {tower.token_embedding.weight.shape[0]} entries, not CLIP's {SPECIAL_VOCABULARY}"
    projection = tower.text_projection
    if projection is None:
        return "a text tower without projection"
    if isinstance(projection, nn.Linear) and projection.bias is not None:
        return "a text projection with a bias"
    return _block_obstacle(tower, "text")


def _block_obstacle(tower: Any, which: str) -> str | None:
    blocks = list(tower.transformer.resblocks)
    if not all(isinstance(block, ResidualAttentionBlock) for block in blocks):
        return f"custom attention blocks in the {which} tower (such as query-key norm)"
    if activation(blocks[0]) is None:
        return f"an activation that transformers does not know in the {which} tower ({blocks[0].mlp.gelu})"
    return None


def activation(block: Any) -> str | None:
    """Return transformers' name of a block's activation (`hidden_act`), or None for one that it lacks."""
    gelu = block.mlp.gelu
    if isinstance(gelu, QuickGELU):
        return "quick_gelu"
    if isinstance(gelu, nn.GELU):
        return "gelu" if gelu.approximate == "none" else "gelu_pytorch_tanh"
    return None


def vision_weights(visual: Any) -> dict[str, Tensor]:
    """Return the image tower's weights by CLIPModel's names, below `vision_model.`."""
    start = "vision_model."
    return {
        f"{start}embeddings.class_embedding": visual.class_embedding,
        f"{start}embeddings.position_embedding.weight": visual.positional_embedding,
        f"{start}embeddings.patch_embedding.weight": visual.conv1.weight,
        **_module(f"{start}pre_layrnorm", visual.ln_pre),  # its misspelling is part of the format
        **_blocks(f"{start}encoder", visual.transformer),
        **_module(f"{start}post_layernorm", visual.ln_post),
    }


def text_weights(tower: Any) -> dict[str, Tensor]:
    """Return the text tower's weights by CLIPModel's names, below `text_model.`, and its projection."""
    start = "text_model."
    projection = tower.text_projection
    matrix = projection.weight if isinstance(projection, nn.Linear) else projection.T
    return {
        f"{start}embeddings.token_embedding.weight": tower.token_embedding.weight,
        f"{start}embeddings.position_embedding.weight": tower.positional_embedding,
        **_blocks(f"{start}encoder", tower.transformer),
        **_module(f"{start}final_layer_norm", tower.ln_final),
        "text_projection.weight": matrix,
    }


def _blocks(start: str, transformer: Any) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = {}
    for number, block in enumerate(transformer.resblocks):
        layer = f"{start}.layers.{number}"
        for name, weight, bias in zip("qkv", block.attn.in_proj_weight.chunk(3), block.attn.in_proj_bias.chunk(3),
                                      strict=True):
            weights[f"{layer}.self_attn.{name}_proj.weight"] = weight
            weights[f"{layer}.self_attn.{name}_proj.bias"] = bias
        weights |= _scaled(f"{layer}.self_attn.out_proj", block.attn.out_proj, block.ls_1)
        weights |= _module(f"{layer}.layer_norm1", block.ln_1) | _module(f"{layer}.layer_norm2", block.ln_2)
        weights |= _module(f"{layer}.mlp.fc1", block.mlp.c_fc)
        weights |= _scaled(f"{layer}.mlp.fc2", block.mlp.c_proj, block.ls_2)
    return weights


def _module(name: str, module: Any) -> dict[str, Tensor]:
    return {f"{name}.weight": module.weight, f"{name}.bias": module.bias}


def _scaled(name: str, linear: Any, scale: Any) -> dict[str, Tensor]:
    """Return a linear layer with the LayerScale after it, if there is one, multiplied in."""
    if not isinstance(scale, LayerScale):
        return _module(name, linear)
    return {f"{name}.weight": scale.gamma[:, None] * linear.weight, f"{name}.bias": scale.gamma * linear.bias}
