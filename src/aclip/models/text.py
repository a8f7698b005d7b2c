"""The text tower: open_clip's, run only as far as the longest caption of the batch."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from open_clip.model import CLIPTextCfg
from open_clip.transformer import ResidualAttentionBlock
from torch import Tensor, nn

from aclip.errors import UnsupportedModelError
from aclip.models.blocks import Packing, run_blocks


def encode_text(model: nn.Module, tokens: Int[Tensor, "B T"]) -> Float[Tensor, "B D"]:
    """Encode captions with the text tower of an open_clip model and its own weights.

    Where the tower can be cut (see `can_cut`), T may be anything from the longest caption to the context
    length, and the features do not depend on it: a causal tower's EOT token sees nothing that comes after
    it. Other towers run as open_clip runs them, at full context.

    Args:
        model: `open_clip.CLIP` or `open_clip.CustomTextCLIP`.
        tokens: (B, T) int64 token ids, each row with its EOT (the highest id).

    Returns:
        (B, D) projected features, not normalised; equal to `model.encode_text` at full context.

    Raises:
        UnsupportedModelError: the model has no text tower.
        ValueError: T is longer than the context, or shorter where the tower cannot be cut.
    """
    tower = text_tower_of(model)
    context, length = int(tower.context_length), tokens.shape[1]
    if not can_cut(model):
        if length != context:
            raise ValueError(f"this text tower reads exactly {context} tokens, not {length}: it is not "
                             "causal and EOT-pooled, so it cannot be cut")
        features: Tensor = model.encode_text(tokens)  # type: ignore[operator]
        return features
    if length > context:
        raise ValueError(f"{length} tokens are more than the text tower's context of {context}")
    eot = tokens.argmax(dim=-1)
    if packs(tokens):
        packing = Packing.of(eot + 1, length)
        x = tower.token_embedding(tokens.flatten()[packing.places])
        x = x + F.embedding(packing.places % length, tower.positional_embedding)
    else:
        packing = None
        x = tower.token_embedding(tokens) + tower.positional_embedding[:length]
    x, _ = run_blocks(tower.transformer, x, eot, causal=True, packing=packing)
    pooled: Tensor = tower.ln_final(x[:, 0])
    projection = tower.text_projection
    if projection is not None:
        pooled = projection(pooled) if isinstance(projection, nn.Linear) else pooled @ projection
    return pooled


def encode_hidden_text(
    model: nn.Module, tokens: Int[Tensor, "B T"], hidden: Bool[Tensor, "B T"], mask_token: Float[Tensor, " C"]
) -> Float[Tensor, "B T C"]:
    """Return every token's state after the final norm, where some tokens are hidden behind a mask token.

    Args:
        model: as in `encode_text`; the tower must be one that can be cut.
        tokens: (B, T) int64 token ids.
        hidden: (B, T) bool, where `mask_token` takes the place of the token's embedding.
        mask_token: (C,) learned embedding.

    Raises:
        UnsupportedModelError: a tower that is not causal and EOT-pooled.
    """
    if not can_cut(model):
        raise UnsupportedModelError("tokens can be hidden in causal, EOT-pooled text towers only: choose a recipe "
                                    "without masked language modelling, or a model such as ViT-B-16")
    tower = text_tower_of(model)
    x = torch.where(hidden[:, :, None], mask_token, tower.token_embedding(tokens))
    x = x + tower.positional_embedding[: tokens.shape[1]]
    x, _ = run_blocks(tower.transformer, x, causal=True)
    states: Tensor = tower.ln_final(x)
    return states


def packs(tokens: Int[Tensor, "B T"]) -> bool:
    """Whether captions are run without their padding, `blocks.Packing`: on a CPU, where lengths are known at once.

    On an accelerator the number of tokens would have to be read back to the host in every step, and a graph that is
    traced must not depend on it.
    """
    return tokens.device.type == "cpu" and not torch.compiler.is_compiling()


def can_cut(model: nn.Module | Mapping[str, Any]) -> bool:
    """Whether text may be cut after the longest EOT without changing any feature.

    True for causal towers of plain blocks that pool at the EOT token, found as the highest id ("argmax").

    Args:
        model: an open_clip model, or its config (`model_config`).

    Raises:
        UnsupportedModelError: a model without a text tower.
    """
    if isinstance(model, Mapping):
        return _config_can_cut(model)
    tower = text_tower_of(model)
    pool_type = getattr(tower, "text_pool_type", None) or getattr(tower, "pool_type", None)
    return bool(
        pool_type == "argmax"
        and getattr(tower, "attn_mask", None) is not None
        and getattr(tower, "cls_emb", None) is None
        and isinstance(tower.transformer.resblocks[0], ResidualAttentionBlock)
    )


def _config_can_cut(config: Mapping[str, Any]) -> bool:
    values = dict(config["text_cfg"])
    if values.get("hf_model_name"):
        return False
    text = CLIPTextCfg(**values)
    custom = (text.block_type == "custom" or text.qk_norm or text.scaled_cosine_attn or text.scale_heads
              or text.scale_attn_inner or text.scale_attn or text.scale_fc)
    return text.pool_type == "argmax" and not (text.no_causal_mask or text.embed_cls or custom)


def cut_after_eot(tokens: Int[Tensor, "B T"]) -> Int[Tensor, "B S"]:
    """Return the tokens up to and including the longest row's EOT, the first occurrence of its highest id.

    For the loader, on tokens in host memory: the new length is read back to the host.

    Args:
        tokens: (B, T) integer token ids, padded with ids below the EOT's.

    Returns:
        (B, S) a view of the first S columns, S <= T.
    """
    longest = int(tokens.argmax(dim=1).max()) + 1
    return tokens[:, :longest]


def text_tower_of(model: nn.Module) -> Any:
    """Return the module that holds the text tower's parts: `model.text`, or the model itself.

    Raises:
        UnsupportedModelError: it has none.
    """
    tower = getattr(model, "text", model)
    if not hasattr(tower, "context_length"):
        raise UnsupportedModelError("this model has an image tower only: train a recipe with a contrastive "
                                    "objective, or name a model with text, to encode captions")
    return tower


def stack_of_open_clip(model: nn.Module) -> nn.Module | None:
    """Return the blocks that open_clip runs itself, as their own modules: those of text that cannot be cut, if any."""
    tower = getattr(model, "text", model)
    if not hasattr(tower, "context_length") or can_cut(model):
        return None
    stack: nn.Module | None = getattr(tower, "transformer", None)
    return stack


def logit_scale_of(model: nn.Module) -> nn.Parameter:
    """Return `model.logit_scale`, the logarithm of the multiplier, as in open_clip.

    Raises:
        UnsupportedModelError: the model has no text tower and therefore no scale.
    """
    text_tower_of(model)
    scale = model.logit_scale
    assert isinstance(scale, nn.Parameter)
    return scale
