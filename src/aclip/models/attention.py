"""Attention on projected heads, and the single row of it that scores patches."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

LONGEST_PLAIN = 577
"""Longest sequence for which plain attention replaces the fused kernel, see `attention`."""

HAS_AMX: bool = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()
"""Whether this CPU multiplies bf16 matrices in tiles; torch has no public name for it."""


def attention(
    q: Float[Tensor, "B H M d"],
    k: Float[Tensor, "B H L d"],
    v: Float[Tensor, "B H L d"],
    *,
    causal: bool = False,
    visible: Bool[Tensor, "B 1 1 L"] | None = None,
) -> Float[Tensor, "B H M d"]:
    """Return softmax(q k^T / sqrt(d)) v (Vaswani et al., arXiv 1706.03762).

    Computed by the fused kernel (`scaled_dot_product_attention`), except on a CPU in half precision with at most
    `LONGEST_PLAIN` keys, if gradients are needed or there is no AMX: there, plain matrix products are faster. Forward
    and backward of one layer in bf16, milliseconds on one core (with AMX: torch 2.15, 8,000 tokens; without, on
    AVX512-BF16: torch 2.14, 1,600 tokens):

        tokens x heads      17x3  65x3  257x3  577x3  1025x3        tokens x heads     17x2  65x3  197x6  577x12  1025x3
        AMX, fused           118   100     71    132     105        no AMX, fused        11    28     41     145      80
        AMX, plain            20    19     35     62     141        no AMX, plain         2     6     17      60      40

    With AMX and without gradients, or in fp32, the fused kernel is as fast or faster. Both agree up to rounding.

    Args:
        q: (B, H, M, d) queries, M = L or fewer rows.
        k, v: (B, H, L, d) keys and values.
        causal: query i sees keys 0..i only; needs M = L.
        visible: (B, 1, 1, L) bool, the keys that the queries of a sample see; not together with `causal`.

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


def first_row(q: Float[Tensor, "B H M d"], k: Float[Tensor, "B H L d"]) -> Float[Tensor, "B L"]:
    """Return the attention of the first query to all keys, averaged over heads.

    One row of each attention map, in fp32 under any autocast, without gradient.

    Args:
        q: (B, H, M, d) queries.
        k: (B, H, L, d) keys.

    Returns:
        (B, L) float32 in [0, 1]; rows sum to 1.
    """
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        logits = q[:, :, :1].float() @ k.float().transpose(-2, -1) * q.shape[-1] ** -0.5
        row: Tensor = logits.softmax(dim=-1)[:, :, 0].mean(dim=1)
    return row


def cls_attention(q: Float[Tensor, "B H M d"], k: Float[Tensor, "B H L d"]) -> Float[Tensor, "B N"]:
    """Return the attention of the first token to each of the others, averaged over heads.

        s_P = 1/H sum_h softmax(q_h(CLS) . k_h / sqrt(d))[P]    (A-CLIP, arXiv 2212.08653)

    The softmax runs over all L tokens and the CLS column is dropped afterwards, so a row sums to less than 1.

    Args:
        q, k: as in `first_row`, the CLS token first.

    Returns:
        (B, L - 1) float32 in [0, 1].
    """
    return first_row(q, k)[:, 1:]


def _plain_is_faster(q: Tensor, k: Tensor) -> bool:
    return (
        q.device.type == "cpu"
        and q.dtype in (torch.bfloat16, torch.float16)
        and k.shape[-2] <= LONGEST_PLAIN
        and (q.requires_grad or not HAS_AMX)
    )
