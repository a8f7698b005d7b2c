"""timm's plain ViTs inside open_clip models: with a class token, registers, or attention pooling."""

from typing import Any, cast

import torch
from jaxtyping import Float
from open_clip.timm_model import TimmModel
from timm.layers import Attention, AttentionPoolLatent, PatchEmbed
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from aclip.models.attention import attention, first_row
from aclip.models.vit import Vit


class TimmVit(Vit):
    """timm's `VisionTransformer` of plain blocks, inside open_clip's `TimmModel`."""

    def __init__(self, visual: Any) -> None:
        trunk = visual.trunk
        self.visual, self.trunk = visual, trunk
        self.stack = trunk
        self.grid_size = tuple(trunk.patch_embed.grid_size)
        self.patch_embedding = trunk.patch_embed.proj
        self.num_prefix_tokens = trunk.num_prefix_tokens
        self.reads_first = trunk.attn_pool is None and trunk.global_pool == "token"
        by_class_token = self.reads_first and trunk.has_class_token  # else the first token is a register or a patch
        self.scored_by = "pool" if trunk.attn_pool is not None else "class token" if by_class_token else None

    @property
    def _prefix_positions(self) -> int:
        return 0 if self.trunk.no_embed_class else self.num_prefix_tokens

    def patch_positions(self) -> Float[Tensor, "N C"]:
        return cast(Tensor, self.trunk.pos_embed[0, self._prefix_positions:])

    def prefix(self) -> Float[Tensor, "P C"]:
        tokens = [token[0] for token in (self.trunk.cls_token, self.trunk.reg_token) if token is not None]
        prefix: Tensor = torch.cat(tokens) if tokens else self.trunk.pos_embed[0, :0]
        return prefix + self.trunk.pos_embed[0, :self._prefix_positions] if self._prefix_positions else prefix

    def before_blocks(self, x: Float[Tensor, "B L C"]) -> Float[Tensor, "B L C"]:
        return cast(Tensor, self.trunk.norm_pre(x))

    def pool(
        self, x: Float[Tensor, "B L C"], with_scores: bool
    ) -> tuple[Float[Tensor, "B C"], Float[Tensor, "B N"] | None]:
        trunk, scores = self.trunk, None
        x = trunk.norm(x)
        if trunk.attn_pool is None:
            pooled = trunk.pool(x)
        else:
            start = 0 if trunk.pool_include_prefix else self.num_prefix_tokens
            pooled, scores = _attention_pool(trunk.attn_pool, x[:, start:], with_scores=with_scores)
            scores = None if scores is None else scores[:, self.num_prefix_tokens - start:]
        return trunk.fc_norm(pooled), scores

    def project(self, pooled: Float[Tensor, "B C"]) -> Float[Tensor, "B D"]:
        features: Tensor = self.trunk.head(pooled)
        for name, layer in self.visual.head.named_children():
            features = features if name == "drop" else layer(features)
        return features

    def norm_patches(self, x: Float[Tensor, "B M C"]) -> Float[Tensor, "B M C"]:
        return cast(Tensor, self.trunk.fc_norm(self.trunk.norm(x)))  # one of the two is the identity

    def drop_projection(self) -> None:
        self.trunk.head, self.visual.head = nn.Identity(), nn.Sequential()

    def resize(self, image_size: tuple[int, int], positions: Float[Tensor, "N C"]) -> None:
        trunk = self.trunk
        prefix = trunk.pos_embed[0, :self._prefix_positions].detach()
        trunk.patch_embed.set_input_size(image_size)
        trunk.pos_embed = nn.Parameter(torch.cat([prefix, positions])[None], trunk.pos_embed.requires_grad)
        self.visual.image_size = image_size
        if hasattr(self.visual, "preprocess_cfg"):
            self.visual.preprocess_cfg = {**self.visual.preprocess_cfg, "size": image_size}


def _attention_pool(
    pool: Any, x: Float[Tensor, "B L C"], *, with_scores: bool
) -> tuple[Float[Tensor, "B C"], Float[Tensor, "B L"] | None]:
    """Pool tokens with timm's `AttentionPoolLatent` (SigLIP's MAP head, arXiv 2106.04560, appendix) and its weights.

        y = proj(softmax(q . k / sqrt(d)) v);  y + mlp(norm(y))

    The scores are the attention of the pool's one query, rows that sum to 1.
    """
    query = pool.q(pool.latent).unflatten(-1, (pool.num_heads, -1)).transpose(1, 2).expand(x.shape[0], -1, -1, -1)
    k, v = pool.kv(x).unflatten(-1, (2, pool.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    query, k = pool.q_norm(query), pool.k_norm(k)
    scores = first_row(query, k) if with_scores else None
    pooled = pool.proj(attention(query, k, v).transpose(1, 2).flatten(2))
    if pool.mlp is not None:
        pooled = pooled + pool.mlp(pool.norm(pooled))
    return pooled[:, 0], scores


def obstacle(visual: TimmModel) -> str | None:
    """Return what about a timm tower cannot be masked, or None."""
    trunk = visual.trunk
    if type(trunk) is not VisionTransformer:
        return f"timm's {type(trunk).__name__}, which is not a plain ViT"
    kinds = {type(block) for block in trunk.blocks}
    if kinds == {Block}:
        kinds |= {type(block.attn) for block in trunk.blocks}
    if kinds != {Block, Attention}:
        others = sorted(kind.__name__ for kind in kinds - {Block, Attention})
        return f"timm's {' and '.join(others)} in place of plain blocks"
    embed = trunk.patch_embed
    if type(embed) is not PatchEmbed or not isinstance(embed.norm, nn.Identity):
        return f"timm's {type(embed).__name__}, which does more than embed each patch"
    if trunk.pos_embed is None:
        return "no position embeddings"
    if trunk.global_pool in ("", "prr") or type(trunk.attn_pool) not in (type(None), AttentionPoolLatent):
        return f"timm's pooling '{trunk.global_pool}'"
    return None
