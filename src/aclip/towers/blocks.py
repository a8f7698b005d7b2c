"""open_clip's transformer blocks, run with its own weights and without what nobody reads."""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from aclip.towers.attention import attention, cls_attention


def run_blocks(
    transformer: Any,
    x: Float[Tensor, "B L C"],
    read: Int[Tensor, " B"] | None = None,
    *,
    causal: bool = False,
    visible: Bool[Tensor, "B L"] | None = None,
    with_scores: bool = False,
) -> tuple[Float[Tensor, "B M C"], Float[Tensor, "B N"] | None]:
    """Run all blocks of an open_clip `Transformer` of plain pre-norm blocks.

        x <- x + ls_1(attn(ln_1(x)));  x <- x + ls_2(mlp(ln_2(x)))

    Where only one token of each sample is read afterwards, the last block computes that token alone: its
    query against all keys, its output projection, its MLP. Result and gradients are the same, for
    10 / (12 n) fewer multiplications in n blocks (7 % in 12).

    Honours `transformer.grad_checkpointing` (open_clip's `set_grad_checkpointing`).

    Args:
        transformer: `open_clip.transformer.Transformer` of `ResidualAttentionBlock`.
        x: (B, L, C) embedded tokens.
        read: (B,) int64 position of the token of each sample that is read, or None for all.
        causal: token i sees tokens 0..i only.
        visible: (B, L) bool, the tokens of each sample that are seen, at least one; None for all. What comes out at
            the others means nothing. Not together with `causal` or `with_scores`.
        with_scores: also return the attention of token 0 to the others, averaged over blocks.

    Returns:
        The tokens, (B, L, C) or, with `read`, (B, 1, C); and the scores, (B, L - 1) float32, or None.
    """
    recompute = transformer.grad_checkpointing and torch.is_grad_enabled()
    rows: list[Tensor] = []
    last = len(transformer.resblocks) - 1
    for index, block in enumerate(transformer.resblocks):
        run = block if "forward" in vars(block) else partial(run_block, block)
        arguments = (x, read if index == last else None, causal, visible, with_scores)
        if recompute:
            x, row = checkpoint(run, *arguments, use_reentrant=False)
        else:
            x, row = run(*arguments)
        if row is not None:
            rows.append(row)
    return x, torch.stack(rows).mean(dim=0) if with_scores else None


def call_as_modules(transformer: Any) -> None:
    """Have `run_blocks` call every block as a module, so that hooks on it (sharding) and its compiled form act.

    A block's own `forward`, open_clip's, is hidden by that: this is for a copy that is trained, not handed out.
    """
    for block in transformer.resblocks:
        block.forward = partial(run_block, block)


def run_block(
    block: Any,
    x: Float[Tensor, "B L C"],
    read: Int[Tensor, " B"] | None,
    causal: bool,
    visible: Bool[Tensor, "B L"] | None,
    with_scores: bool,
) -> tuple[Float[Tensor, "B M C"], Float[Tensor, "B N"] | None]:
    """Run one block; arguments and results as in `run_blocks`."""
    normed = block.ln_1(x)
    if read is None:
        q, k, v = project(block.attn, normed)
    else:
        q, k, v = project(block.attn, normed, _row(normed, read))
        x = _row(x, read)
        if causal:
            visible = torch.arange(normed.shape[1], device=x.device) <= read[:, None]
            causal = False
    scores = cls_attention(q, k) if with_scores else None
    keys = None if visible is None else visible[:, None, None]
    mixed = attention(q, k, v, causal=causal, visible=keys).transpose(1, 2).flatten(2)
    x = x + block.ls_1(block.attn.out_proj(mixed))
    x = x + block.ls_2(block.mlp(block.ln_2(x)))
    return x, scores


def project(
    attn: nn.MultiheadAttention, x: Float[Tensor, "B L C"], asking: Float[Tensor, "B M C"] | None = None
) -> tuple[Float[Tensor, "B H M d"], Float[Tensor, "B H L d"], Float[Tensor, "B H L d"]]:
    """Return queries, keys and values from the stacked projection of `nn.MultiheadAttention`.

    Args:
        attn: its weights.
        x: (B, L, C) normed tokens.
        asking: (B, M, C) those of them that have a query; None for all.
    """
    weight, bias = attn.in_proj_weight, attn.in_proj_bias
    if asking is None:
        q, k, v = _heads(F.linear(x, weight, bias), 3, attn.num_heads)
        return q, k, v
    sizes = [attn.embed_dim, 2 * attn.embed_dim]
    (q_weight, kv_weight), (q_bias, kv_bias) = torch.split(weight, sizes), torch.split(bias, sizes)
    (q,) = _heads(F.linear(asking, q_weight, q_bias), 1, attn.num_heads)
    k, v = _heads(F.linear(x, kv_weight, kv_bias), 2, attn.num_heads)
    return q, k, v


def _heads(x: Float[Tensor, "B L parts_C"], parts: int, heads: int) -> tuple[Tensor, ...]:
    """Split stacked projections into `parts` tensors of (B, H, L, d)."""
    return x.view(*x.shape[:2], parts, heads, -1).permute(2, 0, 3, 1, 4).unbind(0)


def _row(x: Float[Tensor, "B L C"], read: Int[Tensor, " B"]) -> Float[Tensor, "B 1 C"]:
    # not take_along_dim, which compiled code would compile anew for every length
    return x.gather(1, read[:, None, None].expand(-1, -1, x.shape[2]))
