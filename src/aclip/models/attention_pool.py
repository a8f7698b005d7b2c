"""Pooling by attention: a learned query looks at the patches, and what it looks at are their scores."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from aclip.models.attention import attention


def attend(
    pool: Any, x: Float[Tensor, "B L C"], *, with_scores: bool = False
) -> tuple[Float[Tensor, "B C"], Float[Tensor, "B L"] | None]:
    """Pool tokens with timm's `AttentionPoolLatent` (SigLIP's MAP head, arXiv 2106.04560, appendix) and its weights.

        y = proj(softmax(q . k / sqrt(d)) v);  y + mlp(norm(y))

    The score of a token is the query's attention to it, averaged over the pool's heads: one row a head, in fp32
    whatever the precision around it, without gradient.

    Args:
        pool: the module, with one query.
        x: (B, L, C) tokens after the final norm.
        with_scores: also return the scores.

    Returns:
        (B, C), and (B, L) float32 in [0, 1], rows that sum to 1, or None.
    """
    query = pool.q(pool.latent).unflatten(-1, (pool.num_heads, -1)).transpose(1, 2).expand(x.shape[0], -1, -1, -1)
    k, v = pool.kv(x).unflatten(-1, (2, pool.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    query, k = pool.q_norm(query), pool.k_norm(k)
    scores = None
    if with_scores:
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            logits = query.float() @ k.float().transpose(-2, -1) * query.shape[-1] ** -0.5
            scores = logits.softmax(dim=-1)[:, :, 0].mean(dim=1)
    pooled = pool.proj(attention(query, k, v).transpose(1, 2).flatten(2))
    if pool.mlp is not None:
        pooled = pooled + pool.mlp(pool.norm(pooled))
    return pooled[:, 0], scores
