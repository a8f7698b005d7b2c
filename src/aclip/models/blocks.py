"""Transformer blocks of open_clip and timm, run with their own weights, without computing what is never read.

Below them, attention on projected heads, and the single row of it that scores patches.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

LONGEST_PLAIN = 577
"""Longest sequence for which plain attention replaces the fused kernel, see `attention`."""

HAS_AMX: bool = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()
"""Whether this CPU multiplies bf16 matrices in tiles; torch has no public name for it."""


class Packing(NamedTuple):
    """The layout of sequences of different lengths, so that nothing is computed for padding.

    Outside of attention, the tokens of all samples stand one after the other, (S, C). Attention sees (B, L, C), padded
    with zeros that a causal tower never looks at.

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
        return x.flatten(0, 1).index_select(0, self.places)

    def unpack(self, x: Float[Tensor, "S C"]) -> Float[Tensor, "B L C"]:
        whole = x.new_zeros(self.present.numel(), x.shape[1]).index_copy(0, self.places, x)
        return whole.view(*self.present.shape, x.shape[1])


Score = Callable[[Tensor, Tensor], Tensor]
"""Queries (B, H, M, d) and keys (B, H, L, d) of a block -> (B, L) float32 scores of its tokens."""


def run_blocks(
    transformer: Any,
    x: Float[Tensor, "B L C"] | Float[Tensor, "S C"],
    read: Int[Tensor, " B"] | None = None,
    *,
    causal: bool = False,
    visible: Bool[Tensor, "B L"] | None = None,
    score: Score | None = None,
    rotary: Sequence[Tensor] | None = None,
    packing: Packing | None = None,
) -> tuple[Float[Tensor, "B M C"], Float[Tensor, "B L"] | None]:
    """Run all blocks of an open_clip `Transformer`, a timm ViT or a timm `Eva`: plain pre-norm or post-norm blocks.

        x <- x + ls_1(attn(ln_1(x)));  x <- x + ls_2(mlp(ln_2(x)))        pre-norm
        x <- x + ln_1(attn(x));        x <- x + ln_2(mlp(x))              post-norm

    If only one token of each sample is read afterwards, the last block computes that token alone, with 10 / (12 n)
    fewer multiplications in n blocks (7 % in 12). Honours `transformer.grad_checkpointing`.

    Args:
        transformer: `open_clip.transformer.Transformer` of `ResidualAttentionBlock`, or timm's `VisionTransformer` or
            `Eva`, which are never causal.
        x: (B, L, C) embedded tokens.
        read: (B,) int64 position of the one token of each sample that is read, or None for all.
        causal: token i sees tokens 0..i only.
        visible: (B, L) bool, the tokens of each sample that can be attended to, at least one; None for all. Outputs
            at the others are undefined. Not together with `causal` or `score`.
        score: queries and keys of a block -> (B, L) scores of its tokens (`first_row`, `mean_row`), to be averaged over
            blocks.
        rotary: of each block, timm's table of sines and cosines (B or 1, H or 1, R, 2 d), by which queries and keys of
            the last R tokens are rotated; None rotates nothing. The token of `read` is not among the R.
        packing: layout of `x`, which then is (S, C); `read`, if given, is each sample's last token. Only with
            `causal`, without `visible` and `score`.

    Returns:
        The tokens, shaped like `x` or, with `read`, (B, 1, C); and the scores, (B, L) float32, or None.
    """
    recompute = transformer.grad_checkpointing and torch.is_grad_enabled()
    rows: list[Tensor] = []
    blocks = blocks_of(transformer)
    for index, block in enumerate(blocks):
        run = block if "forward" in vars(block) else partial(run_block, block)
        last = index == len(blocks) - 1
        arguments = (x, read if last else None, causal, visible, score, rotary[index] if rotary else None, packing)
        if recompute:  # nothing is drawn in a block
            x, row = checkpoint(run, *arguments, use_reentrant=False, preserve_rng_state=False)
        else:
            x, row = run(*arguments)
        if row is not None:
            rows.append(row)
    return x, torch.stack(rows).mean(dim=0) if rows else None


def call_as_modules(transformer: Any) -> None:
    """Make `run_blocks` call every block as a module, so that its hooks (sharding) and compiled form act.

    Replaces the blocks' own `forward`: for models in training, not for those handed to users.
    """
    for block in blocks_of(transformer):
        block.forward = partial(run_block, block)


def stacks_of(module: nn.Module) -> Iterator[Any]:
    """Yield every stack of blocks in a module, of towers, their EMA copies and decoders alike."""
    from open_clip.transformer import Transformer
    from timm.models.eva import Eva
    from timm.models.vision_transformer import VisionTransformer

    return (part for part in module.modules() if isinstance(part, Transformer | VisionTransformer | Eva))


def blocks_of(transformer: Any) -> Any:
    """Return the blocks of a stack: open_clip's `resblocks`, timm's `blocks`."""
    return transformer.resblocks if hasattr(transformer, "resblocks") else transformer.blocks


def run_block(
    block: Any,
    x: Float[Tensor, "B L C"] | Float[Tensor, "S C"],
    read: Int[Tensor, " B"] | None = None,
    causal: bool = False,
    visible: Bool[Tensor, "B L"] | None = None,
    score: Score | None = None,
    rotary: Float[Tensor, "b h R e"] | None = None,
    packing: Packing | None = None,
) -> tuple[Float[Tensor, "B M C"] | Float[Tensor, "S C"], Float[Tensor, "B L"] | None]:
    """Run one block, as `run_blocks`; without dropout, as a step that is run again must give the same result."""
    attn = block.attn
    norm_1, scale_1, norm_2, scale_2 = _norms_and_scales(block)
    normed = norm_1(x)
    queried = normed if read is None else _row(normed, read, packing)
    q, k, v = _heads_of(attn, normed, None if read is None else queried, packing)
    if rotary is not None:
        half = getattr(attn, "rotate_half", False)  # since timm 1.0.20
        q, k = q if read is not None else _rotate(q, rotary, half), _rotate(k, rotary, half)
    if read is not None:
        x = _row(x, read, packing)
        if causal:
            visible = torch.arange(k.shape[2], device=x.device) <= read[:, None]
            causal = False
    scores = score(q, k) if score is not None else None
    keys = None if visible is None else visible[:, None, None]
    mixed = attention(q, k, v, causal=causal, visible=keys).transpose(1, 2).flatten(2)
    if packing is not None and read is None:
        mixed = packing.pack(mixed)
    if hasattr(attn, "q_norm"):
        mixed = attn.norm(mixed)
        if getattr(attn, "gate", None) is not None:
            mixed = mixed * attn.gate(queried).sigmoid()
    x = x + scale_1((attn.proj if hasattr(attn, "proj") else attn.out_proj)(mixed))
    x = x + scale_2(block.mlp(norm_2(x)))
    return x, scores


def _norms_and_scales(block: Any) -> tuple[Callable[[Tensor], Tensor], ...]:
    """Return norm and scale around attention, then around the MLP: x + scale(f(norm(x)))."""
    if hasattr(block, "ln_1"):  # open_clip's
        return block.ln_1, block.ls_1, block.ln_2, block.ls_2
    if hasattr(block, "ls1"):  # timm's ViT
        return block.norm1, block.ls1, block.norm2, block.ls2
    if hasattr(block, "gamma_1"):  # Eva
        return block.norm1, partial(_scaled, block.gamma_1), block.norm2, partial(_scaled, block.gamma_2)
    return partial(_scaled, None), block.norm1, partial(_scaled, None), block.norm2  # Eva, post-norm


def _scaled(gamma: Float[Tensor, " C"] | None, x: Tensor) -> Tensor:
    return x if gamma is None else gamma * x


def _heads_of(
    attn: Any, x: Tensor, queried: Float[Tensor, "B 1 C"] | None, packing: Packing | None
) -> tuple[Float[Tensor, "B H M d"], Float[Tensor, "B H L d"], Float[Tensor, "B H L d"]]:
    """Apply the projections of an attention module: queries of `queried` (None: of all), keys and values."""
    low_rank: Any = getattr(getattr(attn, "qkv", attn), "low_rank", None)  # of `models.lora`
    up = None if low_rank is None else low_rank.up

    def project(x: Tensor, weight: Tensor, bias: Tensor | None, up: Tensor | None) -> Tensor:
        y = F.linear(x, weight, bias)
        return y if up is None else y + F.linear(F.linear(x, low_rank.down), up)

    def split(x: Tensor, parts: int) -> tuple[Tensor, ...]:
        if packing is not None and x.ndim == 2:
            x = packing.unpack(x)
        heads: Tensor = x.unflatten(-1, (parts, attn.num_heads, -1))
        return heads.permute(2, 0, 3, 1, 4).unbind(0)

    if getattr(attn, "q_proj", None) is not None:  # Eva's, not stacked
        (q,), (k,), (v,) = (split(projection(tokens), 1) for projection, tokens in (
            (attn.q_proj, x if queried is None else queried), (attn.k_proj, x), (attn.v_proj, x)))
    else:
        weight, bias = _stacked(attn)
        if queried is None:
            q, k, v = split(project(x, weight, bias, up), 3)
        else:
            sizes = [weight.shape[0] // 3, 2 * weight.shape[0] // 3]
            q_weight, kv_weight = torch.split(weight, sizes)
            q_bias, kv_bias = (None, None) if bias is None else torch.split(bias, sizes)
            q_up, kv_up = (None, None) if up is None else torch.split(up, sizes)
            (q,) = split(project(queried, q_weight, q_bias, q_up), 1)
            k, v = split(project(x, kv_weight, kv_bias, kv_up), 2)
    return (attn.q_norm(q), attn.k_norm(k), v) if hasattr(attn, "q_norm") else (q, k, v)


def _stacked(attn: Any) -> tuple[Float[Tensor, "E C"], Float[Tensor, " E"] | None]:
    """Return weight and bias of the stacked projection to queries, keys and values."""
    if hasattr(attn, "in_proj_weight"):
        return attn.in_proj_weight, attn.in_proj_bias
    if getattr(attn, "q_bias", None) is not None:  # Eva's, whose keys have none
        return attn.qkv.weight, torch.cat([attn.q_bias, attn.k_bias, attn.v_bias])
    return attn.qkv.weight, attn.qkv.bias


def _rotate(x: Float[Tensor, "B H L d"], table: Float[Tensor, "b h R e"], half: bool) -> Float[Tensor, "B H L d"]:
    """Rotate the last R tokens (RoPE, arXiv 2104.09864); the others, class token and registers, have no position."""
    from timm.layers import apply_rot_embed_cat

    first = x.shape[2] - table.shape[2]
    return torch.cat([x[:, :, :first], apply_rot_embed_cat(x[:, :, first:], table, half=half)], dim=2)


def _row(x: Tensor, read: Int[Tensor, " B"], packing: Packing | None) -> Float[Tensor, "B 1 C"]:
    if packing is not None:
        return x.index_select(0, packing.ends)[:, None]
    # take_along_dim would fix B and L when compiled or exported
    return x.gather(1, read[:, None, None].expand(-1, 1, x.shape[2]))


def attention(
    q: Float[Tensor, "B H M d"],
    k: Float[Tensor, "B H L d"],
    v: Float[Tensor, "B H L d"],
    *,
    causal: bool = False,
    visible: Bool[Tensor, "B 1 1 L"] | None = None,
) -> Float[Tensor, "B H M d"]:
    """Return softmax(q k^T / sqrt(d)) v (Vaswani et al., arXiv 1706.03762).

    By `scaled_dot_product_attention`, except on a CPU in half precision with at most `LONGEST_PLAIN` keys, if gradients
    are needed or there is no AMX: there, plain matrix products are faster. Forward and backward of one layer in bf16,
    milliseconds on one core (AMX: torch 2.15, 8,000 tokens; AVX512-BF16: torch 2.14, 1,600 tokens):

        tokens x heads      17x3  65x3  257x3  577x3  1025x3        tokens x heads     17x2  65x3  197x6  577x12  1025x3
        AMX, fused           118   100     71    132     105        no AMX, fused        11    28     41     145      80
        AMX, plain            20    19     35     62     141        no AMX, plain         2     6     17      60      40

    Args:
        q, k, v: queries, keys and values.
        causal: query i sees keys 0..i only; needs M = L.
        visible: the keys that the queries of a sample see; not together with `causal`.
    """
    plain_is_faster = (
        q.device.type == "cpu"
        and q.dtype in (torch.bfloat16, torch.float16)
        and k.shape[-2] <= LONGEST_PLAIN
        and (q.requires_grad or not HAS_AMX)
    )
    if not plain_is_faster:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, is_causal=causal)
    logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    if causal:
        length = k.shape[-2]
        visible = torch.ones(length, length, dtype=torch.bool, device=q.device).tril()
    if visible is not None:
        logits = logits.masked_fill(~visible, float("-inf"))
    return torch.softmax(logits, dim=-1) @ v


def first_row(q: Float[Tensor, "B H M d"], k: Float[Tensor, "B H L d"]) -> Float[Tensor, "B L"]:
    """Return the attention of the first query to all keys, averaged over heads.

        1/H sum_h softmax(q_h[0] . k_h / sqrt(d))    (A-CLIP, arXiv 2212.08653)

    One row of each attention map, in fp32 under any autocast, without gradient.

    Returns:
        (B, L) float32 in [0, 1]; rows sum to 1.
    """
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        logits = q[:, :, :1].float() @ k.float().transpose(-2, -1) * q.shape[-1] ** -0.5
        row: Tensor = logits.softmax(dim=-1)[:, :, 0].mean(dim=1)
    return row


def mean_row(q: Float[Tensor, "B H M d"], k: Float[Tensor, "B H L d"], first: int) -> Float[Tensor, "B L"]:
    """Return the attention of all queries from `first` on to each key, averaged over them and over heads.

        1/(H (M - first)) sum_hm softmax(q_h[m] . k_h / sqrt(d))

    Of whole attention maps, head by head so that no more than (B, M, L) is held, otherwise as `first_row`.
    """
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        scale = q.shape[-1] ** -0.5
        rows = [(a.float() @ b.float().mT * scale).softmax(dim=-1).mean(dim=1)
                for a, b in zip(q[:, :, first:].unbind(1), k.unbind(1), strict=True)]
        row: Tensor = torch.stack(rows).mean(dim=0)
    return row
