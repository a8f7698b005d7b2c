"""The plain ViTs of open_clip and timm under one set of names, and the sizes of their images and patches."""

import re
from typing import Any, Literal, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from aclip.errors import ConfigError, UnsupportedModelError
from aclip.models.attention import attention, first_row

SUPPORTED = ("supported are plain ViTs: open_clip's own, such as ViT-B-32, ViT-B-16, ViT-L-14, vit-small and vit-tiny, "
             "and timm's, such as ViT-B-16-SigLIP")


class Vit:
    """The parts of an image tower: open_clip's `VisionTransformer` here, timm's in `TimmVit`. Holds no state.

    Attributes:
        visual: the image tower itself.
        stack: the module that holds the transformer blocks, for `run_blocks`.
        grid_size: patches (down, across) at the tower's own image size.
        patch_embedding: the convolution that embeds patches; its stride is its kernel size.
        norm_before: the norm before the blocks, or the identity.
        num_prefix_tokens: P, class token and registers; never counted as patches and never removed.
        scored_by: the source of attention scores, None if there is none. A class token that is not pooled is no
            source: no loss reaches its last query, and nothing teaches the earlier ones to look for content.
        reads_first: whether only the first token is read after the blocks.
    """

    scored_by: Literal["class token", "pool"] | None

    def __init__(self, visual: Any) -> None:
        self.visual = visual
        self.stack = visual.transformer
        self.grid_size: tuple[int, int] = tuple(visual.grid_size)
        self.patch_embedding: nn.Conv2d = visual.conv1
        self.norm_before: nn.Module = visual.ln_pre
        self.num_prefix_tokens = 1
        self.reads_first: bool = visual.pool_type == "tok"
        self.scored_by = "class token" if self.reads_first else None

    @property
    def patch_size(self) -> tuple[int, int]:
        """(height, width) of a patch in pixels."""
        height, width = self.patch_embedding.kernel_size
        return int(height), int(width)

    def prefix(self) -> Float[Tensor, "P C"]:
        """Return class token and registers, their positions added."""
        return cast(Tensor, self.visual.class_embedding + self.visual.positional_embedding[0])[None]

    def patch_positions(self) -> Float[Tensor, "N C"]:
        """Return the position embeddings of the patches on the tower's own grid, row by row."""
        return cast(Tensor, self.visual.positional_embedding[1:])

    def positions_at(self, grid_size: tuple[int, int]) -> Float[Tensor, "N C"]:
        """Return the position embeddings on a grid (down, across), interpolated by timm if it is not the tower's."""
        from timm.layers import resample_abs_pos_embed

        own = self.patch_positions()
        if grid_size == self.grid_size:
            return own
        resized: Tensor = resample_abs_pos_embed(own[None], list(grid_size), list(self.grid_size), 0)[0]
        return resized

    def pool(
        self, x: Float[Tensor, "B L C"], with_scores: bool
    ) -> tuple[Float[Tensor, "B C"], Float[Tensor, "B N"] | None]:
        """Return the pooled token after the final norm, and the pool's scores if asked for and `scored_by` is "pool".

        If `reads_first`, `x` may hold the first token alone.
        """
        if self.reads_first:
            return self.visual.ln_post(x[:, 0]), None
        if self.visual.final_ln_after_pool:
            return self.visual.ln_post(x[:, 1:].mean(dim=1)), None
        return self.visual.ln_post(x)[:, 1:].mean(dim=1), None

    def project(self, pooled: Float[Tensor, "B C"]) -> Float[Tensor, "B D"]:
        """Map the pooled token into the joint space."""
        return pooled if self.visual.proj is None else pooled @ self.visual.proj

    def norm_patches(self, x: Float[Tensor, "B M C"]) -> Float[Tensor, "B M C"]:
        """Apply the final norm to patch tokens."""
        return cast(Tensor, self.visual.ln_post(x))

    def drop_projection(self) -> None:
        """Remove the projection into the joint space; features are the pooled token from then on."""
        self.visual.proj = None

    def resize(self, image_size: tuple[int, int]) -> None:
        """Change the tower's own image size, its positions interpolated, in place."""
        visual, grid_size = self.visual, grid_of(image_size, self.patch_size)
        positions = torch.cat([visual.positional_embedding[:1], self.positions_at(grid_size)]).detach()
        visual.positional_embedding = nn.Parameter(positions, visual.positional_embedding.requires_grad)
        visual.image_size, visual.grid_size = image_size, grid_size


class TimmVit(Vit):
    """timm's `VisionTransformer` of plain blocks inside open_clip's `TimmModel`: class token, registers, any pool."""

    def __init__(self, visual: Any) -> None:
        trunk = visual.trunk
        self.visual, self.trunk = visual, trunk
        self.stack = trunk
        self.grid_size = tuple(trunk.patch_embed.grid_size)
        self.patch_embedding = trunk.patch_embed.proj
        self.norm_before = trunk.norm_pre
        self.num_prefix_tokens = trunk.num_prefix_tokens
        self.reads_first = trunk.attn_pool is None and trunk.global_pool == "token"
        by_class_token = self.reads_first and trunk.has_class_token  # else the first token is a register or a patch
        self.scored_by = "pool" if trunk.attn_pool is not None else "class token" if by_class_token else None
        self._prefix_positions = 0 if trunk.no_embed_class else trunk.num_prefix_tokens

    def prefix(self) -> Float[Tensor, "P C"]:
        tokens = [token[0] for token in (self.trunk.cls_token, self.trunk.reg_token) if token is not None]
        prefix: Tensor = torch.cat(tokens) if tokens else self.trunk.pos_embed[0, :0]
        return prefix + self.trunk.pos_embed[0, :self._prefix_positions] if self._prefix_positions else prefix

    def patch_positions(self) -> Float[Tensor, "N C"]:
        return cast(Tensor, self.trunk.pos_embed[0, self._prefix_positions:])

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

    def resize(self, image_size: tuple[int, int]) -> None:
        self.trunk.set_input_size(image_size)
        self.visual.image_size = image_size


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


def vit_of(visual: nn.Module) -> Vit:
    """Return the parts of an image tower.

    Raises:
        UnsupportedModelError: a tower that `encode_image` cannot run, such as a ResNet.
    """
    from open_clip.timm_model import TimmModel
    from open_clip.transformer import ResidualAttentionBlock, VisionTransformer

    if isinstance(visual, TimmModel):
        obstacle = _obstacle(visual.trunk)
        if obstacle is None:
            return TimmVit(visual)
        what = f"this image tower has {obstacle}"
    elif not isinstance(visual, VisionTransformer):
        what = f"this image tower is a {type(visual).__name__}"
    elif visual.attn_pool is not None or visual.pool_type not in ("tok", "avg"):
        what = "this image tower pools by attention or not at all"
    elif not isinstance(visual.transformer.resblocks[0], ResidualAttentionBlock):
        what = "this image tower has custom attention blocks"
    else:
        return Vit(visual)
    raise UnsupportedModelError(f"{what}, which cannot be scored and masked: {SUPPORTED}")


def _obstacle(trunk: Any) -> str | None:
    """Return what about a tower of timm's cannot be masked, or None."""
    from timm.layers import Attention, AttentionPoolLatent, PatchEmbed
    from timm.models.vision_transformer import Block, VisionTransformer

    if type(trunk) is not VisionTransformer:
        return f"timm's {type(trunk).__name__}, which is not a plain ViT"
    kinds = {type(block) for block in trunk.blocks} | {type(getattr(block, "attn", None)) for block in trunk.blocks}
    others = kinds - {Block, Attention, type(None)}
    if others:
        return f"timm's {' and '.join(sorted(kind.__name__ for kind in others))} in place of plain blocks"
    if type(trunk.patch_embed) is not PatchEmbed or not isinstance(trunk.patch_embed.norm, nn.Identity):
        return f"timm's {type(trunk.patch_embed).__name__}, which does more than embed each patch"
    if trunk.pos_embed is None:
        return "no position embeddings"
    if trunk.global_pool in ("", "prr") or type(trunk.attn_pool) not in (type(None), AttentionPoolLatent):
        return f"timm's pooling '{trunk.global_pool}'"
    return None


def visual_of(model: nn.Module) -> Any:
    """Return the image tower of a model (`model.visual`), or the tower itself; raises as `vit_of`."""
    visual = getattr(model, "visual", model)
    vit_of(visual)
    return visual


def grid_of(image_size: tuple[int, int], patch_size: tuple[int, int]) -> tuple[int, int]:
    """Return the patch grid (down, across) of an image; both sizes are (height, width) in pixels.

    Raises:
        ConfigError: not a whole number of patches.
    """
    (height, width), (patch_height, patch_width) = image_size, patch_size
    if height < 1 or width < 1 or height % patch_height or width % patch_width:
        raise ConfigError(f"images of {height} x {width} pixels cannot be cut into patches of "
                          f"{patch_height} x {patch_width}: both sides must be positive multiples")
    return height // patch_height, width // patch_width


def pair(size: Any) -> tuple[int, int]:
    """Return (height, width) from one integer or two; anything else is a ConfigError."""
    sides = size if isinstance(size, list | tuple) else (size, size)
    if len(sides) != 2 or not all(type(side) is int for side in sides):
        raise ConfigError(f"an image size is a whole number of pixels, or two of them (height, width), not {size!r}")
    height, width = sides
    return height, width


def parse_image_size(text: str) -> int | tuple[int, int]:
    """Return an image size in pixels: "224", or height and width as in "192x256"; anything else is a ConfigError."""
    sides = re.fullmatch(r"\s*(\d+)\s*(?:x\s*(\d+)\s*)?", text, re.IGNORECASE)
    if not sides or not all(int(side) for side in sides.groups() if side):
        raise ConfigError(f"an image size is one side in pixels, such as 224, or HEIGHTxWIDTH, such as 192x256, not "
                          f"'{text}'")
    return int(sides[1]) if sides[2] is None else (int(sides[1]), int(sides[2]))
