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
        q, k, v: queries, M = L or fewer rows; keys and values.
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
