"""timm's plain ViTs inside open_clip models: with a class token, with registers, with attention pooling."""

import functools
from collections.abc import Mapping
from typing import Any

import timm
import torch
from jaxtyping import Float
from open_clip.timm_model import TimmModel
from timm.layers import Attention, AttentionPoolLatent, PatchEmbed
from timm.models import is_model, model_entrypoint
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from aclip.models.attention_pool import attend
from aclip.models.vit import Vit

_PLAIN = "vision_transformer"
_WHY_NOT = {
    "eva": "whose rotary positions and attention layers are none of a plain ViT's",
    "vision_transformer_relpos": "whose relative positions would have to be picked pair by pair",
    "vision_transformer_hybrid": "whose convolutional stem looks across the borders of patches",
    "vitamin": "whose convolutional stages look across the borders of patches",
    "swin_transformer": "whose windows need the whole grid of patches",
    "swin_transformer_v2": "whose windows need the whole grid of patches",
}
"""timm's module -> what is in the way."""


class TimmVit(Vit):
    """timm's `VisionTransformer` of plain blocks, inside open_clip's `TimmModel`."""

    def __init__(self, visual: Any) -> None:
        trunk = visual.trunk
        self.visual, self.trunk = visual, trunk
        self.stack = trunk
        self.grid_size = tuple(trunk.patch_embed.grid_size)
        self.num_prefix_tokens = trunk.num_prefix_tokens
        self.reads_first = trunk.attn_pool is None and trunk.global_pool == "token"
        asks = self.reads_first and trunk.has_class_token  # else the first token is a register or a patch
        self.asker = "pool" if trunk.attn_pool is not None else "class token" if asks else None

    @property
    def patch_embedding(self) -> nn.Conv2d:
        conv: nn.Conv2d = self.trunk.patch_embed.proj
        return conv

    @property
    def attention_pool(self) -> nn.Module | None:
        pool: nn.Module | None = self.trunk.attn_pool
        return pool

    def patch_positions(self) -> Float[Tensor, "N C"]:
        positions: Tensor = self.trunk.pos_embed[0]
        return positions if self.trunk.no_embed_class else positions[self.num_prefix_tokens:]

    def prefix(self) -> Float[Tensor, "P C"]:
        tokens = [token[0] for token in (self.trunk.cls_token, self.trunk.reg_token) if token is not None]
        if not tokens:
            empty: Tensor = self.trunk.pos_embed[0, :0]
            return empty
        prefix = torch.cat(tokens)
        return prefix if self.trunk.no_embed_class else prefix + self.trunk.pos_embed[0, :self.num_prefix_tokens]

    def before_blocks(self, x: Float[Tensor, "B L C"]) -> Float[Tensor, "B L C"]:
        normed: Tensor = self.trunk.norm_pre(x)
        return normed

    def pool(
        self, x: Float[Tensor, "B L C"], with_scores: bool
    ) -> tuple[Float[Tensor, "B C"], Float[Tensor, "B N"] | None]:
        """Pool as timm does, by attention, the class token, or over the patches."""
        trunk, scores = self.trunk, None
        x = trunk.norm(x)
        if trunk.attn_pool is None:
            pooled = trunk.pool(x)
        else:
            seen = 0 if trunk.pool_include_prefix else self.num_prefix_tokens
            pooled, scores = attend(trunk.attn_pool, x[:, seen:], with_scores=with_scores)
            scores = None if scores is None else scores[:, self.num_prefix_tokens - seen:]
        return trunk.fc_norm(pooled), scores

    def project(self, pooled: Float[Tensor, "B C"]) -> Float[Tensor, "B D"]:
        features: Tensor = self.trunk.head(pooled)
        for name, layer in self.visual.head.named_children():
            features = features if name == "drop" else layer(features)
        return features

    def norm_patches(self, x: Float[Tensor, "B M C"]) -> Float[Tensor, "B M C"]:
        normed: Tensor = self.trunk.fc_norm(self.trunk.norm(x))  # one of the two does nothing
        return normed

    def drop_projection(self) -> None:
        self.trunk.head, self.visual.head = nn.Identity(), nn.Sequential()

    def resize(self, image_size: tuple[int, int], positions: Float[Tensor, "N C"]) -> None:
        trunk = self.trunk
        prefix = trunk.pos_embed[0, : 0 if trunk.no_embed_class else self.num_prefix_tokens].detach()
        trunk.patch_embed.set_input_size(image_size)
        trunk.pos_embed = nn.Parameter(torch.cat([prefix, positions])[None], trunk.pos_embed.requires_grad)
        self.visual.image_size = image_size
        if hasattr(self.visual, "preprocess_cfg"):
            self.visual.preprocess_cfg = {**self.visual.preprocess_cfg, "size": image_size}


def obstacle(visual: TimmModel) -> str | None:
    """Return what keeps a tower of timm's from being masked, in words, or None."""
    trunk = visual.trunk
    if type(trunk) is not VisionTransformer:
        return f"timm's {type(trunk).__name__}, which is no plain ViT"
    kinds = {type(block) for block in trunk.blocks}
    if kinds == {Block}:
        kinds |= {type(block.attn) for block in trunk.blocks}
    if kinds != {Block, Attention}:
        others = sorted(kind.__name__ for kind in kinds - {Block, Attention})
        return f"timm's {' and '.join(others)} in place of plain blocks"
    embed = trunk.patch_embed
    if type(embed) is not PatchEmbed or not isinstance(embed.norm, nn.Identity):
        return f"timm's {type(embed).__name__}, which does more than to embed each patch"
    if trunk.pos_embed is None:
        return "no positions that could be kept with the patches"
    if trunk.global_pool in ("", "prr") or type(trunk.attn_pool) not in (type(None), AttentionPoolLatent):
        return f"timm's pooling '{trunk.global_pool}'"
    return None


def obstacle_by_name(name: str) -> str | None:
    """Return what is known to be in the way from timm's name of a model alone, without building it."""
    if not isinstance(name, str) or not is_model(name):
        return f"timm's image tower {name}, which the installed timm {timm.__version__} does not have"
    module = model_entrypoint(name).__module__.rpartition(".")[2]
    if module == _PLAIN:
        return None
    return f"timm's image tower {name}, {_WHY_NOT.get(module, 'which is no plain ViT')}"


def outline(vision: Mapping[str, Any], embed_dim: int) -> TimmModel:
    """Return the tower of a config without weights (on the meta device), at timm's own image size."""
    return _outline(vision["timm_model_name"], embed_dim, vision.get("timm_pool", "avg"),
                    vision.get("timm_proj", "linear"), vision.get("timm_proj_bias", False))


@functools.lru_cache(maxsize=64)
def _outline(name: str, embed_dim: int, pool: str, proj: str, proj_bias: bool) -> TimmModel:
    with torch.device("meta"):
        return TimmModel(name, embed_dim, pool=pool, proj=proj, proj_bias=proj_bias, pretrained=False)
