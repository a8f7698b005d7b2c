"""The image tower: a ViT over the kept patches, at any resolution, with the attention that ranks patches."""

from collections.abc import Sequence
from copy import deepcopy
from functools import partial
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from aclip.errors import ConfigError, UnsupportedModelError
from aclip.models.blocks import Score, attention, first_row, mean_row, run_blocks
from aclip.structs import ImageEncoding

SUPPORTED = ("supported are plain ViTs: open_clip's own, such as ViT-B-32, ViT-B-16, ViT-L-14, vit-small and vit-tiny, "
             "and timm's, such as ViT-B-16-SigLIP, EVA02-B-16 and PE-Core-B-16")

NO_ATTENTION_SCORES = (
    "the features of this image tower come from neither a class token, nor attention pooling, nor the mean of the "
    "patches, so it has no attention scores: choose a masking that needs none, such as uniform, or another model, such "
    "as ViT-B-16")


def encode_image(
    visual: nn.Module,
    pixels: Float[Tensor, "B 3 h w"],
    keep_indices: Int[Tensor, "B K"] | None = None,
    *,
    mask_token: Float[Tensor, " C"] | None = None,
    return_scores: bool = False,
    return_patches: bool = False,
) -> ImageEncoding:
    """Encode images, or only some of their patches, with a ViT of open_clip or timm and its own weights.

    With every patch kept, the features equal `visual(pixels)` up to rounding. Patches are removed before they are
    embedded and keep their own positions, which are interpolated at another resolution than the model's. The score of
    patch P, over all layers l and heads h (A-CLIP, arXiv 2212.08653):

        s_P = 1/(L H) sum_lh softmax(q_lh(CLS) . k_lh / sqrt(d))[P]

    What is pooled asks: in a tower that pools by attention (SigLIP), the heads of the pool's query in place of CLS; in
    one that pools the mean of the patches, every patch, averaged, which is the weight that P's value has in the mean
    of what a layer's attention returns.

    Works under autocast and `torch.compile`, without host synchronisation. A config's `patch_dropout`, dropout and
    stochastic depth are not applied: masking is an argument here, never a state of the model.

    Args:
        visual: `open_clip.transformer.VisionTransformer`, or `open_clip.timm_model.TimmModel` around a plain ViT.
        pixels: (B, 3, h, w) float, normalised; h and w multiples of the patch size.
        keep_indices: (B, K) int64 ascending patch numbers on the (h / patch, w / patch) grid, row by row; class token
            and registers, which always stay, are not counted. None keeps all.
        mask_token: (C,) replaces removed patches, which then stay in the sequence with their positions (SimMIM,
            arXiv 2111.09886); None drops them.
        return_scores: also return the scores; only with all patches kept.
        return_patches: also return the patch tokens after the final norm.

    Raises:
        UnsupportedModelError: not a plain ViT, or scores of one that has none.
        ConfigError: an image size that is not a whole number of patches.
        ValueError: scores of a masked image.
    """
    vit = vit_of(visual)
    if return_scores and keep_indices is not None:
        raise ValueError("scores rank all patches: they cannot be returned when only some are kept")
    if return_scores and vit.scored_by is None:
        raise UnsupportedModelError(NO_ATTENTION_SCORES)
    x, rotary = embed_tokens(vit, pixels, keep_indices, mask_token)
    num_tokens, first_patch = x.shape[1], vit.num_prefix_tokens
    reads_all = return_patches or not vit.reads_first
    first = None if reads_all else torch.zeros(x.shape[0], dtype=torch.int64, device=x.device)
    x, rows = run_blocks(vit.stack, x, first, score=vit.block_score if return_scores else None, rotary=rotary)
    pooled, scores = vit.pool(x, return_scores and vit.scored_by == "pool")
    return ImageEncoding(
        features=vit.project(pooled), cls=pooled, scores=scores if rows is None else rows[:, first_patch:],
        patches=vit.norm_patches(x[:, first_patch:]) if return_patches else None, num_tokens=num_tokens)


def embed_tokens(
    vit: "Vit", pixels: Float[Tensor, "B 3 h w"], keep_indices: Int[Tensor, "B K"] | None = None,
    mask_token: Float[Tensor, " C"] | None = None,
) -> tuple[Float[Tensor, "B L C"], Sequence[Tensor] | None]:
    """Return what the blocks read: class token and registers, then the patches; and their rotations, for `run_blocks`.

    Arguments are those of `encode_image`.
    """
    grid = grid_of((pixels.shape[-2], pixels.shape[-1]), vit.patch_size)
    x = _embed_patches(vit, pixels, grid, keep_indices, mask_token)
    tokens = torch.cat([vit.prefix().to(x.dtype).expand(x.shape[0], -1, -1), x], dim=1)
    return vit.norm_before(tokens), vit.rotary_at(grid, keep_indices if mask_token is None else None)


def _embed_patches(
    vit: "Vit", pixels: Float[Tensor, "B 3 h w"], grid: tuple[int, int], keep_indices: Int[Tensor, "B K"] | None,
    mask_token: Float[Tensor, " C"] | None,
) -> Float[Tensor, "B M C"]:
    """Cut images into patches, drop those not kept, embed the rest and add their positions.

    The convolution's stride is its kernel size, so it is a matrix product over the pixels (channel, row, column) of a
    patch. M is K, or N if a mask token fills the gaps.
    """
    conv, patch = vit.patch_embedding, vit.patch_size
    cells = pixels.reshape(pixels.shape[0], -1, grid[0], patch[0], grid[1], patch[1]).permute(0, 2, 4, 1, 3, 5)
    positions = vit.positions_at(grid)
    if keep_indices is None and mask_token is not None:  # explicit, so that the mask token's gradient is 0, not None
        keep_indices = torch.arange(grid[0] * grid[1], device=pixels.device).expand(pixels.shape[0], -1)
    if keep_indices is None:
        return F.linear(cells.flatten(1, 2).flatten(2), conv.weight.flatten(1), conv.bias) + positions
    sample = torch.arange(pixels.shape[0], device=pixels.device)[:, None]
    patches = cells[sample, keep_indices // grid[1], keep_indices % grid[1]]
    kept = F.embedding(keep_indices, positions)  # the backward of indexing is slow
    embedded = F.linear(patches.flatten(2), conv.weight.flatten(1), conv.bias) + kept
    if mask_token is None:
        return embedded
    filled = (mask_token + positions).to(embedded.dtype).expand(pixels.shape[0], -1, -1)
    return filled.scatter(1, keep_indices[:, :, None].expand_as(embedded), embedded)


def resize_images(visual: nn.Module, image_size: tuple[int, int]) -> None:
    """Change an image tower to an image size (height, width) of whole patches, in place; interpolate positions."""
    vit = vit_of(visual)
    vit.resize(image_size, grid_of(image_size, vit.patch_size))
    if hasattr(vit.visual, "preprocess_cfg"):
        vit.visual.preprocess_cfg = {**vit.visual.preprocess_cfg, "size": image_size}


def vit_of(visual: nn.Module) -> "Vit":
    """Return the parts of an image tower; UnsupportedModelError if `encode_image` cannot run it, such as a ResNet."""
    from open_clip.timm_model import TimmModel
    from open_clip.transformer import ResidualAttentionBlock, VisionTransformer

    if isinstance(visual, TimmModel) and _is_plain(visual.trunk):
        return TimmVit(visual)
    if (isinstance(visual, VisionTransformer) and visual.attn_pool is None and visual.pool_type in ("tok", "avg")
            and isinstance(visual.transformer.resblocks[0], ResidualAttentionBlock)):
        return Vit(visual)
    what = type(getattr(visual, "trunk", visual)).__name__
    raise UnsupportedModelError(f"this image tower, a {what}, is not a plain ViT that can be scored and masked: "
                                f"{SUPPORTED}")


def _is_plain(trunk: Any) -> bool:
    from timm.layers import Attention, AttentionPoolLatent, AttentionRope, PatchEmbed
    from timm.models.eva import Eva, EvaAttention, EvaBlock, EvaBlockPostNorm
    from timm.models.vision_transformer import Block, VisionTransformer

    kinds = {VisionTransformer: [(Block, Attention)],
             Eva: [(block, attn) for block in (EvaBlock, EvaBlockPostNorm) for attn in (EvaAttention, AttentionRope)]}
    return (
        type(trunk) in kinds
        and all((type(block), type(getattr(block, "attn", None))) in kinds[type(trunk)]
                and getattr(block.attn, "num_kv_groups", 1) == 1 for block in trunk.blocks)
        and type(trunk.patch_embed) is PatchEmbed
        and isinstance(trunk.patch_embed.norm, nn.Identity)
        and (trunk.pos_embed is not None or getattr(trunk, "rope", None) is not None)
        and trunk.global_pool not in ("", "prr")
        and type(trunk.attn_pool) in (type(None), AttentionPoolLatent)
    )


def visual_of(model: nn.Module) -> Any:
    """Return the image tower of a model (`model.visual`), or the tower itself; raises as `vit_of`."""
    visual = getattr(model, "visual", model)
    vit_of(visual)
    return visual


def attention_pool_of(visual: nn.Module) -> nn.Module | None:
    """Return the module that pools the patches of a tower by attention (SigLIP), or None."""
    return getattr(vit_of(visual).stack, "attn_pool", None)


def patch_embedding_of(visual: nn.Module) -> nn.Conv2d:
    """Return the convolution that embeds patches; `Recipe.freeze` calls it `patch_embedding`."""
    return vit_of(visual).patch_embedding


class Vit:
    """The parts of an image tower: open_clip's `VisionTransformer` here, timm's in `TimmVit`. Holds no state.

    Attributes:
        stack: the module that holds the transformer blocks, for `run_blocks`.
        grid_size: patches (down, across) at the tower's own image size. patch_size: (height, width) in pixels.
        patch_embedding: the convolution that embeds patches; its stride is its kernel size.
        norm_before: the norm before the blocks, or the identity.
        num_prefix_tokens: P, class token and registers.
        scored_by: whose attention scores the patches, None if nothing's does. It is what is pooled: a class token that
            is not pooled is no source, as no loss reaches its last query, and nothing teaches the earlier ones to look
            for content.
        reads_first: whether only the first token is read after the blocks.
    """

    scored_by: Literal["class token", "patches", "pool"] | None

    def __init__(self, visual: Any) -> None:
        self.visual = visual
        self.stack = visual.transformer
        self.grid_size: tuple[int, int] = tuple(visual.grid_size)
        self.patch_size: tuple[int, int] = tuple(visual.patch_size)
        self.patch_embedding: nn.Conv2d = visual.conv1
        self.norm_before: nn.Module = visual.ln_pre
        self.num_prefix_tokens = 1
        self.reads_first: bool = visual.pool_type == "tok"
        self.scored_by = "class token" if self.reads_first else "patches"

    @property
    def block_score(self) -> Score | None:
        """The scores that blocks give, None if they give none."""
        if self.scored_by == "patches":
            return partial(mean_row, first=self.num_prefix_tokens)
        return first_row if self.scored_by == "class token" else None

    def rotary_at(
        self, grid_size: tuple[int, int], keep_indices: Int[Tensor, "B K"] | None
    ) -> Sequence[Float[Tensor, "b h R e"]] | None:
        """Return each block's rotations of the kept patches on a grid (down, across), None in a tower without."""
        return None

    def prefix(self) -> Float[Tensor, "P C"]:
        """Return class token and registers, their positions added."""
        return cast(Tensor, self.visual.class_embedding + self.visual.positional_embedding[0])[None]

    def patch_positions(self) -> Float[Tensor, "N C"]:
        """Return the position embeddings of the patches on the tower's own grid, row by row."""
        return cast(Tensor, self.visual.positional_embedding[1:])

    def positions_at(self, grid_size: tuple[int, int]) -> Float[Tensor, "N C"]:
        """Return the position embeddings on a grid (down, across), interpolated by timm if it is not the tower's."""
        own = self.patch_positions()
        if grid_size == self.grid_size:
            return own
        from timm.layers import resample_abs_pos_embed

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

    def resize(self, image_size: tuple[int, int], grid_size: tuple[int, int]) -> None:
        """Change the tower's own image size, its positions interpolated, in place."""
        visual = self.visual
        positions = torch.cat([visual.positional_embedding[:1], self.positions_at(grid_size)]).detach()
        visual.positional_embedding = nn.Parameter(positions, visual.positional_embedding.requires_grad)
        visual.image_size, visual.grid_size = image_size, grid_size


class TimmVit(Vit):
    """timm's `VisionTransformer` or `Eva` of plain blocks inside open_clip's `TimmModel`.

    Class token, registers, any pool; learned or rotary positions, or both. Rotations on another grid than the tower's
    own are those that timm's `set_input_size` would give it.
    """

    def __init__(self, visual: Any) -> None:
        trunk = visual.trunk
        self.visual, self.trunk = visual, trunk
        self.stack = trunk
        self.grid_size = tuple(trunk.patch_embed.grid_size)
        self.patch_size = tuple(trunk.patch_embed.patch_size)
        self.patch_embedding = trunk.patch_embed.proj
        self.norm_before = trunk.norm_pre
        self.num_prefix_tokens = trunk.num_prefix_tokens
        self.reads_first = trunk.attn_pool is None and trunk.global_pool == "token"
        if trunk.attn_pool is not None:
            self.scored_by = "pool"
        elif self.reads_first:  # without a class token, the first is a register or a patch
            self.scored_by = "class token" if trunk.cls_token is not None else None
        else:
            self.scored_by = "patches" if trunk.global_pool == "avg" else None
        without = trunk.pos_embed is None or trunk.no_embed_class
        self._prefix_positions = 0 if without else trunk.num_prefix_tokens

    def prefix(self) -> Float[Tensor, "P C"]:
        tokens = [token[0] for token in (self.trunk.cls_token, self.trunk.reg_token) if token is not None]
        weight = self.patch_embedding.weight
        prefix: Tensor = torch.cat(tokens) if tokens else weight.new_zeros(0, len(weight))
        return prefix + self.trunk.pos_embed[0, :self._prefix_positions] if self._prefix_positions else prefix

    def patch_positions(self) -> Float[Tensor, "N C"]:
        return cast(Tensor, self.trunk.pos_embed[0, self._prefix_positions:])

    def positions_at(self, grid_size: tuple[int, int]) -> Float[Tensor, "N C"]:
        if self.trunk.pos_embed is None:  # rotations alone
            weight = self.patch_embedding.weight
            return weight.new_zeros(grid_size[0] * grid_size[1], len(weight))
        return super().positions_at(grid_size)

    def rotary_at(
        self, grid_size: tuple[int, int], keep_indices: Int[Tensor, "B K"] | None
    ) -> Sequence[Float[Tensor, "b h R e"]] | None:
        rope, depth = getattr(self.trunk, "rope", None), len(self.trunk.blocks)
        if rope is None:
            return None
        if grid_size != self.grid_size and hasattr(rope, "pos_embed"):  # keeps one table, and ignores `shape`
            rope = deepcopy(rope)
            rope.update_feat_shape(list(grid_size))
        tables: Tensor = rope.get_embed(shape=list(grid_size))
        if tables.ndim == 2:  # (N, e), shared by all blocks and heads
            table = tables[None] if keep_indices is None else F.embedding(keep_indices, tables)
            return [table[:, None]] * depth
        if keep_indices is None:  # (depth, H, N, e)
            return list(tables[:, None])
        return [table[:, keep_indices].transpose(0, 1) for table in tables]

    def pool(
        self, x: Float[Tensor, "B L C"], with_scores: bool
    ) -> tuple[Float[Tensor, "B C"], Float[Tensor, "B N"] | None]:
        trunk, scores = self.trunk, None
        x = trunk.norm(x)
        if trunk.attn_pool is None:
            pooled = trunk.pool(x)
        else:
            start = 0 if getattr(trunk, "pool_include_prefix", True) else self.num_prefix_tokens
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

    def resize(self, image_size: tuple[int, int], grid_size: tuple[int, int]) -> None:
        self.trunk.set_input_size(image_size)
        self.visual.image_size = image_size


def _attention_pool(
    pool: Any, x: Float[Tensor, "B L C"], *, with_scores: bool
) -> tuple[Float[Tensor, "B C"], Float[Tensor, "B L"] | None]:
    """Pool tokens with timm's `AttentionPoolLatent` (SigLIP's MAP head, arXiv 2106.04560, appendix) and its weights.

        y = proj(softmax(q . k / sqrt(d)) v);  y + mlp(norm(y))
    """
    query = pool.q(pool.latent).unflatten(-1, (pool.num_heads, -1)).transpose(1, 2).expand(x.shape[0], -1, -1, -1)
    k, v = pool.kv(x).unflatten(-1, (2, pool.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    query, k = pool.q_norm(query), pool.k_norm(k)
    scores = first_row(query, k) if with_scores else None
    pooled = pool.proj(attention(query, k, v).transpose(1, 2).flatten(2))
    if pool.mlp is not None:
        pooled = pooled + pool.mlp(pool.norm(pooled))
    return pooled[:, 0], scores


def grid_of(image_size: tuple[int, int], patch_size: tuple[int, int]) -> tuple[int, int]:
    """Return the patch grid (down, across) of an image of (height, width) pixels; ConfigError if there is none."""
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
