"""Transformer blocks of open_clip and timm, run with their own weights, without computing what is never read."""

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from aclip.models.attention import attention, first_row


class Packing(NamedTuple):
    """The layout of sequences of different lengths, so that nothing is computed for padding.

    Everything but attention acts on each token alone: there, the tokens of all samples stand one after the other,
    (S, C). Attention sees them as (B, L, C), padded with zeros that a causal tower never looks at.

    Attributes:
        present: True for tokens, False for padding.
        places: positions of the tokens in the flattened (B * L) layout.
        ends: position of each sample's last token among the S.
    """

    present: Bool[Tensor, "B L"]
    places: Int[Tensor, " S"]
    ends: Int[Tensor, " B"]

    @classmethod
    def of(cls, lengths: Int[Tensor, " B"], longest: int) -> "Packing":
        """Return the packing of sequences of 1 to `longest` tokens; synchronises with the device."""
        present = torch.arange(longest, device=lengths.device) < lengths[:, None]
        return cls(present, present.flatten().nonzero()[:, 0], lengths.cumsum(0) - 1)

    def pack(self, x: Float[Tensor, "B L C"]) -> Float[Tensor, "S C"]:
        """Drop the padding."""
        return x.flatten(0, 1).index_select(0, self.places)

    def unpack(self, x: Float[Tensor, "S C"]) -> Float[Tensor, "B L C"]:
        """Pad with zeros."""
        whole = x.new_zeros(self.present.numel(), x.shape[1]).index_copy(0, self.places, x)
        return whole.view(*self.present.shape, x.shape[1])


def run_blocks(
    transformer: Any,
    x: Float[Tensor, "B L C"] | Float[Tensor, "S C"],
    read: Int[Tensor, " B"] | None = None,
    *,
    causal: bool = False,
    visible: Bool[Tensor, "B L"] | None = None,
    with_scores: bool = False,
    packing: Packing | None = None,
) -> tuple[Float[Tensor, "B M C"], Float[Tensor, "B N"] | None]:
    """Run all blocks of an open_clip `Transformer` or a timm ViT: plain pre-norm blocks.

        x <- x + ls_1(attn(ln_1(x)));  x <- x + ls_2(mlp(ln_2(x)))

    If only one token of each sample is read afterwards, the last block computes that token alone: its query against
    all keys, its output projection, its MLP. Results and gradients are the same, with 10 / (12 n) fewer
    multiplications in n blocks (7 % in 12). Honours `transformer.grad_checkpointing`.

    Args:
        transformer: `open_clip.transformer.Transformer` of `ResidualAttentionBlock`, or
            `timm.models.VisionTransformer` of `Block`, which is never causal.
        x: (B, L, C) embedded tokens.
        read: (B,) int64 position of the one token of each sample that is read, or None for all.
        causal: token i sees tokens 0..i only.
        visible: (B, L) bool, the tokens of each sample that can be attended to, at least one; None for all. Outputs
            at the others are undefined. Not together with `causal` or `with_scores`.
        with_scores: also return the attention of token 0 to the others, averaged over blocks and heads.
        packing: layout of `x`, which then is (S, C); `read`, if given, is each sample's last token. Only with
            `causal`, without `visible` and `with_scores`.

    Returns:
        The tokens, shaped like `x` or, with `read`, (B, 1, C); and the scores, (B, L - 1) float32, or None.
    """
    recompute = transformer.grad_checkpointing and torch.is_grad_enabled()
    rows: list[Tensor] = []
    blocks = blocks_of(transformer)
    for index, block in enumerate(blocks):
        run = block if "forward" in vars(block) else partial(run_block, block)
        arguments = (x, read if index == len(blocks) - 1 else None, causal, visible, with_scores, packing)
        x, row = checkpoint(run, *arguments, use_reentrant=False) if recompute else run(*arguments)
        if row is not None:
            rows.append(row)
    return x, torch.stack(rows).mean(dim=0) if with_scores else None


def call_as_modules(transformer: Any) -> None:
    """Make `run_blocks` call every block as a module, so that its hooks (sharding) and compiled form act.

    Replaces the blocks' own `forward`: for models in training, not for those handed to users.
    """
    for block in blocks_of(transformer):
        block.forward = partial(run_block, block)


def stacks_of(module: nn.Module) -> Iterator[Any]:
    """Yield every stack of blocks in a module, of towers, their EMA copies and decoders alike."""
    from open_clip.transformer import Transformer
    from timm.models.vision_transformer import VisionTransformer

    return (part for part in module.modules() if isinstance(part, Transformer | VisionTransformer))


def blocks_of(transformer: Any) -> Any:
    """Return the blocks of a stack: open_clip's `resblocks`, timm's `blocks`."""
    return transformer.resblocks if hasattr(transformer, "resblocks") else transformer.blocks


def run_block(
    block: Any,
    x: Float[Tensor, "B L C"] | Float[Tensor, "S C"],
    read: Int[Tensor, " B"] | None,
    causal: bool,
    visible: Bool[Tensor, "B L"] | None,
    with_scores: bool,
    packing: Packing | None,
) -> tuple[Float[Tensor, "B M C"] | Float[Tensor, "S C"], Float[Tensor, "B N"] | None]:
    """Run one block; arguments and results as in `run_blocks`.

    Dropout and stochastic depth are not applied: a step that is recomputed, or done in parts, must give the same
    result.
    """
    attn = block.attn
    if is_timm := hasattr(block, "norm1"):
        norm_1, scale_1, norm_2, scale_2, project = block.norm1, block.ls1, block.norm2, block.ls2, attn.proj
    else:
        norm_1, scale_1, norm_2, scale_2, project = block.ln_1, block.ls_1, block.ln_2, block.ls_2, attn.out_proj
    normed = norm_1(x)
    queried = normed if read is None else _row(normed, read, packing)
    q, k, v = _heads_of(attn, normed, None if read is None else queried, packing)
    if read is not None:
        x = _row(x, read, packing)
        if causal:
            visible = torch.arange(k.shape[2], device=x.device) <= read[:, None]
            causal = False
    scores = first_row(q, k)[:, 1:] if with_scores else None
    keys = None if visible is None else visible[:, None, None]
    mixed = attention(q, k, v, causal=causal, visible=keys).transpose(1, 2).flatten(2)
    if packing is not None and read is None:
        mixed = packing.pack(mixed)
    if is_timm:
        mixed = attn.norm(mixed)
        if getattr(attn, "gate", None) is not None:
            mixed = mixed * attn.gate(queried).sigmoid()
    x = x + scale_1(project(mixed))
    x = x + scale_2(block.mlp(norm_2(x)))
    return x, scores


def _heads_of(
    attn: Any, x: Tensor, queried: Float[Tensor, "B 1 C"] | None, packing: Packing | None
) -> tuple[Float[Tensor, "B H M d"], Float[Tensor, "B H L d"], Float[Tensor, "B H L d"]]:
    """Apply the stacked projection of an attention module: queries of `queried` (None: of all), keys and values."""
    is_timm = hasattr(attn, "qkv")
    weight, bias = (attn.qkv.weight, attn.qkv.bias) if is_timm else (attn.in_proj_weight, attn.in_proj_bias)

    def split(projected: Tensor, parts: int) -> tuple[Tensor, ...]:
        if projected.ndim == 2 and packing is not None:
            projected = packing.unpack(projected)
        heads: int = attn.num_heads
        return projected.unflatten(-1, (parts, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)

    if queried is None:
        q, k, v = split(F.linear(x, weight, bias), 3)
    else:
        sizes = [weight.shape[0] // 3, 2 * weight.shape[0] // 3]
        q_weight, kv_weight = torch.split(weight, sizes)
        q_bias, kv_bias = (None, None) if bias is None else torch.split(bias, sizes)
        (q,) = split(F.linear(queried, q_weight, q_bias), 1)
        k, v = split(F.linear(x, kv_weight, kv_bias), 2)
    return (attn.q_norm(q), attn.k_norm(k), v) if is_timm else (q, k, v)


def _row(x: Tensor, read: Int[Tensor, " B"], packing: Packing | None) -> Float[Tensor, "B 1 C"]:
    if packing is not None:
        return x.index_select(0, packing.ends)[:, None]
    # take_along_dim would fix B and L when compiled or exported
    return x.gather(1, read[:, None, None].expand(-1, 1, x.shape[2]))
