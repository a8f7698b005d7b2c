"""Attention on projected heads: which kernel computes it, and the one row that scores patches."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

LONGEST_PLAIN = 577
"""Longest sequence for which plain attention replaces the fused kernel, see `attention`."""

HAS_AMX: bool = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()
"""Whether this CPU multiplies bf16 matrices in tiles; torch says so, but not in public."""


def attention(
    q: Float[Tensor, "B H M d"],
    k: Float[Tensor, "B H L d"],
    v: Float[Tensor, "B H L d"],
    *,
    causal: bool = False,
    visible: Bool[Tensor, "B 1 1 L"] | None = None,
) -> Float[Tensor, "B H M d"]:
    """Return softmax(q k^T / sqrt(d)) v (Vaswani et al., arXiv 1706.03762).

    The fused kernel (`scaled_dot_product_attention`) computes it, with one exception: on a CPU, in half
    precision, up to `LONGEST_PLAIN` keys, where a backward pass will follow or there is no AMX. There plain
    matrix products win. Forward and backward of one layer, milliseconds on one core with AMX, torch 2.15,
    heads 64 wide, about 8,000 tokens a batch with 3 heads and 4,000 with 12:

        tokens x heads      17x3    65x3    257x3   577x3   50x12   197x12  577x12  1025x3
        bf16, fused         118     100     71      132     187     137     255     105
        bf16, plain          20      19     35       62      42      62     203     141
        fp32, fused          27      33     62      119      78     113     267     149
        fp32, plain          25      32     76      230      73     193     446     277

    Without a backward pass, or in fp32, the fused kernel is as fast or faster there. On one core with
    AVX512-BF16 and no AMX, torch 2.14, processor time, about 1,600 tokens a batch:

        tokens x heads      17x2    50x6    65x3    101x6   197x6   197x12  577x12  1025x3
        bf16, fused          11      18      28      44      41      83     145      80
        bf16, plain           2       4       6      10      17      33      60      40
        bf16, fused forward  0.8     2.0     3.9     6.9     9.4    18.8      36      26
        bf16, plain forward  0.6     1.6     2.0     4.5     7.0    13.6      36      15

    Both agree up to rounding.

    Args:
        q: (B, H, M, d) queries, M = L or fewer rows.
        k, v: (B, H, L, d) keys and values.
        causal: query i sees keys 0..i only; needs M = L.
        visible: (B, 1, 1, L) bool, keys that the queries of a sample see; not together with `causal`.

    Returns:
        (B, H, M, d), dtype of `q`.
    """
    if not _plain_is_faster(q, k):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, is_causal=causal)
    logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    if causal:
        length = k.shape[-2]
        visible = torch.ones(length, length, dtype=torch.bool, device=q.device).tril()
    if visible is not None:
        logits = logits.masked_fill(~visible, float("-inf"))
    return torch.softmax(logits, dim=-1) @ v


def cls_attention(q: Float[Tensor, "B H M d"], k: Float[Tensor, "B H L d"]) -> Float[Tensor, "B N"]:
    """Return how much the first token attends to each of the others, averaged over heads.

        s_P = 1/H sum_h softmax(q_h(CLS) . k_h / sqrt(d))[P]    (A-CLIP, arXiv 2212.08653)

    One row of each attention map, in fp32 whatever the precision around it; the softmax runs over all L
    tokens and the CLS column is dropped afterwards, so a row sums to less than 1. No gradient.

    Args:
        q: (B, H, M, d) queries, the CLS token's first.
        k: (B, H, L, d) keys, the CLS token's first.

    Returns:
        (B, L - 1) float32 in [0, 1].
    """
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        logits = q[:, :, :1].float() @ k.float().transpose(-2, -1) * q.shape[-1] ** -0.5
        scores: Tensor = logits.softmax(dim=-1)[:, :, 0, 1:].mean(dim=1)
    return scores


def _plain_is_faster(q: Tensor, k: Tensor) -> bool:
    return (
        q.device.type == "cpu"
        and q.dtype in (torch.bfloat16, torch.float16)
        and k.shape[-2] <= LONGEST_PLAIN
        and (q.requires_grad or not HAS_AMX)
    )
