"""timm's pre-norm transformer block, run with its own weights."""

from typing import Any

from jaxtyping import Bool, Float, Int
from torch import Tensor

from aclip.models.attention import attention, cls_attention


def run_timm_block(
    block: Any,
    x: Float[Tensor, "B L C"],
    read: Int[Tensor, " B"] | None,
    visible: Bool[Tensor, "B L"] | None,
    with_scores: bool,
) -> tuple[Float[Tensor, "B M C"], Float[Tensor, "B N"] | None]:
    """Run one `timm.models.vision_transformer.Block`; arguments and results as in `blocks.run_blocks`.

        x <- x + ls1(attn(norm1(x)));  x <- x + ls2(mlp(norm2(x)))

    Normalised queries and keys, gates, layer scale and gated MLPs are the block's own modules. Stochastic depth and
    dropout are not applied: a step that is run again, or in parts, has to give the same result.
    """
    attn = block.attn
    normed = block.norm1(x)
    q, k, v = attn.qkv(normed).unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    q, k = attn.q_norm(q), attn.k_norm(k)
    if read is not None:
        # not take_along_dim, under which torch.export loses the freedom of B
        q = q.gather(2, read[:, None, None, None].expand(-1, q.shape[1], 1, q.shape[3]))
        x, normed = (t.gather(1, read[:, None, None].expand(-1, 1, x.shape[2])) for t in (x, normed))
    scores = cls_attention(q, k) if with_scores else None
    mixed = attention(q, k, v, visible=None if visible is None else visible[:, None, None])
    mixed = attn.norm(mixed.transpose(1, 2).flatten(2))
    if getattr(attn, "gate", None) is not None:
        mixed = mixed * attn.gate(normed).sigmoid()
    x = x + block.ls1(attn.proj(mixed))
    x = x + block.ls2(block.mlp(block.norm2(x)))
    return x, scores
