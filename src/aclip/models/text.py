"""The text tower of open_clip, run only as far as the longest caption of the batch."""

from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from aclip.errors import UnsupportedModelError
from aclip.models.blocks import Packing, run_blocks

INTO_JOINT_SPACE = ("visual.proj", "visual.head.", "text_projection", "text.proj.", "logit_scale", "logit_bias")
"""In the names of what open_clip's own towers, timm's and Hugging Face's have between the pooled token and the loss."""


def encode_text(model: nn.Module, tokens: Int[Tensor, "B T"]) -> Float[Tensor, "B D"]:
    """Encode captions with the text tower of an open_clip model and its own weights.

    Args:
        model: `open_clip.CLIP` or `open_clip.CustomTextCLIP`.
        tokens: (B, T) int64 token ids, each row with its EOT (the highest id); T is the context length or, if the
            tower can be cut (see `can_cut`), anything from the longest caption on.

    Returns:
        (B, D) projected features, not normalised; equal to `model.encode_text` at full context.

    Raises:
        UnsupportedModelError: the model has no text tower.
        ValueError: T is longer than the context, or shorter although the tower cannot be cut.
    """
    tower = text_tower_of(model)
    context, length = int(tower.context_length), tokens.shape[1]
    if not can_cut(model):
        if length != context:
            raise ValueError(f"this text tower reads exactly {context} tokens, not {length}: it is not "
                             "causal and EOT-pooled, so it cannot be cut")
        if is_hugging_face(tower):
            tower.transformer.eval()  # without dropout, as all towers
        return cast(Any, model).encode_text(tokens)  # type: ignore[no-any-return]
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
    """Return every token's state after the final norm; `mask_token` replaces the embeddings of `hidden` tokens.

    Raises:
        UnsupportedModelError: a tower that cannot be cut.
    """
    if not can_cut(model):
        raise UnsupportedModelError("masked language modelling needs a causal, EOT-pooled text tower: choose a recipe "
                                    "without it, or a model such as ViT-B-16")
    tower = text_tower_of(model)
    x = torch.where(hidden[:, :, None], mask_token, tower.token_embedding(tokens))
    x = x + tower.positional_embedding[: tokens.shape[1]]
    x, _ = run_blocks(tower.transformer, x, causal=True)
    states: Tensor = tower.ln_final(x)
    return states


def packs(tokens: Int[Tensor, "B T"]) -> bool:
    """Whether captions run without their padding: on a CPU, outside of tracing, as the token count must be read."""
    return tokens.device.type == "cpu" and not torch.compiler.is_compiling()


def can_cut(model: nn.Module) -> bool:
    """Whether text may be cut after the longest EOT: in causal towers of plain blocks that pool at the highest id."""
    from open_clip.transformer import ResidualAttentionBlock

    tower = text_tower_of(model)
    pool_type = getattr(tower, "text_pool_type", None) or getattr(tower, "pool_type", None)
    return bool(
        pool_type == "argmax"
        and getattr(tower, "attn_mask", None) is not None
        and getattr(tower, "cls_emb", None) is None
        and isinstance(tower.transformer.resblocks[0], ResidualAttentionBlock)
    )


def cut_after_eot(tokens: Int[Tensor, "B T"]) -> Int[Tensor, "B S"]:
    """Return a view of the tokens up to the longest row's EOT, the first occurrence of its highest id; synchronises."""
    return tokens[:, : int(tokens.argmax(dim=1).max()) + 1]


def is_hugging_face(tower: nn.Module) -> bool:
    """Whether a text tower is transformers' inside open_clip's `HFTextEncoder`."""
    from open_clip.hf_model import HFTextEncoder

    return isinstance(tower, HFTextEncoder)


def text_blocks_of(tower: Any) -> Any:
    """Return the transformer blocks of a text tower."""
    if not is_hugging_face(tower):
        return tower.transformer.resblocks
    return max((m for m in tower.transformer.modules() if isinstance(m, nn.ModuleList)), key=len)


def text_tower_of(model: nn.Module) -> Any:
    """Return the module that holds the text tower: `model.text` or the model; UnsupportedModelError without one."""
    tower = getattr(model, "text", model)
    if not hasattr(tower, "context_length"):
        raise UnsupportedModelError("this model has an image tower only: to encode captions, name a model with a text "
                                    "tower, or train a recipe with a contrastive objective")
    return tower


def stack_of_open_clip(model: nn.Module) -> nn.Module | None:
    """Return the stack of blocks that open_clip itself runs, that of a text tower that cannot be cut, or None."""
    tower = getattr(model, "text", model)
    return getattr(tower, "transformer", None) if hasattr(tower, "context_length") and not can_cut(model) else None


def logit_scale_of(model: nn.Module) -> nn.Parameter:
    """Return `model.logit_scale`, the logarithm of the multiplier; UnsupportedModelError without a text tower."""
    text_tower_of(model)
    return cast(nn.Parameter, model.logit_scale)
