"""Transformer blocks of open_clip and timm, run with their own weights and without what nobody reads."""

from collections.abc import Iterator
from functools import partial
from itertools import islice
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from open_clip.transformer import Transformer
from timm.models.vision_transformer import Block as TimmBlock
from timm.models.vision_transformer import VisionTransformer as TimmTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from aclip.models.attention import attention, cls_attention
from aclip.models.timm_block import run_timm_block


class Packing(NamedTuple):
    """Where the tokens of sequences of different lengths lie, so that nothing is computed for padding.

    Between the attentions, everything acts on each token alone: the tokens of all samples stand one after the other,
    (S, C). Attention sees them laid out as (B, L, C) again, with zeros in the gaps, which nobody after a gap may see.

    Attributes:
        present: (B, L) bool, which places hold tokens; a sample's first ones.
        places: (S,) int64, the numbers of these places, row by row.
        ends: (B,) int64, where each sample's last token stands among the S.
    """

    present: Bool[Tensor, "B L"]
    places: Int[Tensor, " S"]
    ends: Int[Tensor, " B"]

    @classmethod
    def of(cls, lengths: Int[Tensor, " B"], longest: int) -> "Packing":
        """Return the packing of sequences of these lengths, 1 to `longest`; their sum is read on the host."""
        present = torch.arange(longest, device=lengths.device) < lengths[:, None]
        return cls(present, present.flatten().nonzero()[:, 0], lengths.cumsum(0) - 1)

    def pack(self, x: Float[Tensor, "B L C"]) -> Float[Tensor, "S C"]:
        """Take the tokens out of the layout."""
        return x.flatten(0, 1).index_select(0, self.places)

    def unpack(self, x: Float[Tensor, "S C"]) -> Float[Tensor, "B L C"]:
        """Lay the tokens out, zeros in the gaps."""
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
    score_layers: int | None = None,
    scores_only: bool = False,
    packing: Packing | None = None,
) -> tuple[Float[Tensor, "B M C"], Float[Tensor, "B N"] | None]:
    """Run all blocks of an open_clip `Transformer`, or of a ViT of timm's: plain pre-norm blocks.

        x <- x + ls_1(attn(ln_1(x)));  x <- x + ls_2(mlp(ln_2(x)))

    Where only one token of each sample is read afterwards, the last block computes that token alone: its
    query against all keys, its output projection, its MLP. Result and gradients are the same, for
    10 / (12 n) fewer multiplications in n blocks (7 % in 12).

    Honours `transformer.grad_checkpointing` (open_clip's `set_grad_checkpointing`).

    Args:
        transformer: `open_clip.transformer.Transformer` of `ResidualAttentionBlock`, or
            `timm.models.VisionTransformer` of `Block`, which is never causal.
        x: (B, L, C) embedded tokens.
        read: (B,) int64 position of the token of each sample that is read, or None for all.
        causal: token i sees tokens 0..i only.
        visible: (B, L) bool, the tokens of each sample that are seen, at least one; None for all. What comes out at
            the others means nothing. Not together with `causal` or `with_scores`.
        with_scores: also return the attention of token 0 to the others, averaged over blocks.
        score_layers: average the scores over so many blocks, the first ones; None for all.
        scores_only: stop when the scores are known; what the tokens are then is of no use.
        packing: of `x`, which is (S, C); `read`, if given, is each sample's last token. Together with `causal`,
            without `visible` and `with_scores`.

    Returns:
        The tokens, shaped like `x` or, with `read`, (B, 1, C); and the scores, (B, L - 1) float32, or None.
    """
    recompute = transformer.grad_checkpointing and torch.is_grad_enabled()
    rows: list[Tensor] = []
    blocks = blocks_of(transformer)
    last = len(blocks) - 1
    scored = last + 1 if score_layers is None else min(score_layers, last + 1)
    for index, block in enumerate(islice(blocks, scored - 1 if scores_only else None)):
        run = block if "forward" in vars(block) else partial(run_block, block)
        arguments = (x, read if index == last else None, causal, visible, with_scores and index < scored, packing)
        if recompute:
            x, row = checkpoint(run, *arguments, use_reentrant=False)
        else:
            x, row = run(*arguments)
        if row is not None:
            rows.append(row)
    if scores_only:
        block = blocks[scored - 1]
        if "forward" in vars(block):  # its weights may be sharded, and come together in a call alone
            rows.append(block(x, read, causal, visible, True)[1])
        elif isinstance(block, TimmBlock):
            rows.append(cast(Tensor, run_timm_block(block, x, read, visible, True)[1]))
        else:
            rows.append(score_block(block, x))
    return x, torch.stack(rows).mean(dim=0) if with_scores else None


def call_as_modules(transformer: Any) -> None:
    """Have `run_blocks` call every block as a module, so that hooks on it (sharding) and its compiled form act.

    A block's own `forward`, open_clip's, is hidden by that: this is for a copy that is trained, not handed out.
    """
    for block in blocks_of(transformer):
        block.forward = partial(run_block, block)


def stacks_of(module: nn.Module) -> Iterator[Any]:
    """Yield every stack of blocks in a module, open_clip's and timm's: of towers, averages and decoders."""
    return (part for part in module.modules() if isinstance(part, Transformer | TimmTransformer))


def blocks_of(transformer: Any) -> Any:
    """Return the blocks of a stack that `run_blocks` takes: open_clip's `resblocks`, timm's `blocks`."""
    return transformer.resblocks if hasattr(transformer, "resblocks") else transformer.blocks


def run_block(
    block: Any,
    x: Float[Tensor, "B L C"],
    read: Int[Tensor, " B"] | None,
    causal: bool,
    visible: Bool[Tensor, "B L"] | None,
    with_scores: bool,
    packing: Packing | None = None,
) -> tuple[Float[Tensor, "B M C"], Float[Tensor, "B N"] | None]:
    """Run one block; arguments and results as in `run_blocks`."""
    if isinstance(block, TimmBlock):
        return run_timm_block(block, x, read, visible, with_scores)
    normed = block.ln_1(x)
    if read is None:
        q, k, v = project(block.attn, normed, packing=packing)
    else:
        q, k, v = project(block.attn, normed, _row(normed, read, packing), packing)
        x = _row(x, read, packing)
        if causal:
            visible = torch.arange(k.shape[2], device=x.device) <= read[:, None]
            causal = False
    scores = cls_attention(q, k) if with_scores else None
    keys = None if visible is None else visible[:, None, None]
    mixed = attention(q, k, v, causal=causal, visible=keys).transpose(1, 2).flatten(2)
    if packing is not None and read is None:
        mixed = packing.pack(mixed)
    x = x + block.ls_1(block.attn.out_proj(mixed))
    x = x + block.ls_2(block.mlp(block.ln_2(x)))
    return x, scores


def score_block(block: Any, x: Float[Tensor, "B L C"]) -> Float[Tensor, "B N"]:
    """Return how much a block's token 0 attends to the others, and compute nothing else of the block."""
    normed = block.ln_1(x)
    weight, bias = block.attn.in_proj_weight, block.attn.in_proj_bias
    sizes = [block.attn.embed_dim] * 3
    (q_weight, k_weight, _), (q_bias, k_bias, _) = torch.split(weight, sizes), torch.split(bias, sizes)
    (q,) = _heads(F.linear(normed[:, :1], q_weight, q_bias), 1, block.attn.num_heads)
    (k,) = _heads(F.linear(normed, k_weight, k_bias), 1, block.attn.num_heads)
    return cls_attention(q, k)


def project(
    attn: nn.MultiheadAttention,
    x: Float[Tensor, "B L C"] | Float[Tensor, "S C"],
    asking: Float[Tensor, "B M C"] | None = None,
    packing: Packing | None = None,
) -> tuple[Float[Tensor, "B H M d"], Float[Tensor, "B H L d"], Float[Tensor, "B H L d"]]:
    """Return queries, keys and values from the stacked projection of `nn.MultiheadAttention`.

    Args:
        attn: its weights.
        x: (B, L, C) normed tokens.
        asking: (B, M, C) those of them that have a query; None for all.
        packing: of `x`, if it is packed.
    """
    weight, bias = attn.in_proj_weight, attn.in_proj_bias

    def laid_out(projected: Tensor) -> Tensor:
        return projected if packing is None else packing.unpack(projected)

    if asking is None:
        q, k, v = _heads(laid_out(F.linear(x, weight, bias)), 3, attn.num_heads)
        return q, k, v
    sizes = [attn.embed_dim, 2 * attn.embed_dim]
    (q_weight, kv_weight), (q_bias, kv_bias) = torch.split(weight, sizes), torch.split(bias, sizes)
    (q,) = _heads(F.linear(asking, q_weight, q_bias), 1, attn.num_heads)
    k, v = _heads(laid_out(F.linear(x, kv_weight, kv_bias)), 2, attn.num_heads)
    return q, k, v


def _heads(x: Float[Tensor, "B L parts_C"], parts: int, heads: int) -> tuple[Tensor, ...]:
    """Split stacked projections into `parts` tensors of (B, H, L, d)."""
    return x.view(*x.shape[:2], parts, heads, -1).permute(2, 0, 3, 1, 4).unbind(0)


def _row(x: Tensor, read: Int[Tensor, " B"], packing: Packing | None) -> Float[Tensor, "B 1 C"]:
    if packing is not None:
        return x.index_select(0, packing.ends)[:, None]
    # not take_along_dim, under which B and L are fixed when it is compiled or exported
    return x.gather(1, read[:, None, None].expand(-1, 1, x.shape[2]))
