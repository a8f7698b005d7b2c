"""The image tower: a ViT over kept patches, at any resolution, with the attention that ranks patches."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from open_clip.timm_model import TimmModel
from open_clip.transformer import ResidualAttentionBlock, VisionTransformer
from torch import Tensor, nn

from aclip.errors import ConfigError, UnsupportedModelError
from aclip.models.blocks import run_blocks
from aclip.models.timm_vit import TimmVit, obstacle
from aclip.models.vit import OpenClipVit, Vit
from aclip.structs import ImageEncoding

SUPPORTED = ("supported are plain ViTs: open_clip's own, such as ViT-B-32, ViT-B-16, ViT-L-14, vit-small and vit-tiny, "
             "and timm's, such as ViT-B-16-SigLIP")

NOBODY_ASKS = ("the features of this image tower come from neither a class token nor attention pooling, so nothing in "
               "it has learned which patches matter: choose a masking that needs no scores, such as uniform, or "
               "another model, such as ViT-B-16")


def encode_image(
    visual: nn.Module,
    pixels: Float[Tensor, "B 3 h w"],
    keep_indices: Int[Tensor, "B K"] | None = None,
    *,
    mask_token: Float[Tensor, " C"] | None = None,
    return_scores: bool = False,
    return_patches: bool = False,
    score_layers: int | None = None,
    scores_only: bool = False,
) -> ImageEncoding:
    """Encode images, or only some of their patches, with a ViT of open_clip's or timm's and its own weights.

    With every patch kept, the features equal `visual(pixels)` up to rounding. Patches are removed before
    they are embedded, after which kept patch i carries the position of patch `keep_indices[:, i]`; class token
    and registers always stay. At another resolution than the model's, positions are interpolated
    (see `positions_at`). The scores of patch P, over all layers l and heads h (A-CLIP, arXiv 2212.08653):

        s_P = 1/(L H) sum_lh softmax(q_lh(CLS) . k_lh / sqrt(d))[P]

    A tower that pools by attention (SigLIP's) is asked there: s_P = 1/H sum_h softmax(q_h . k_h / sqrt(d))[P], with
    the query of the pool and its heads, over the tokens that it sees.

    Runs under autocast, under `torch.compile`, and without a host synchronisation. `patch_dropout`, dropout and
    stochastic depth of a config are not applied: what is removed is an argument here, never a state of the model.

    Args:
        visual: `open_clip.transformer.VisionTransformer`, or `open_clip.timm_model.TimmModel` around a plain ViT;
            see `visual_of`.
        pixels: (B, 3, h, w) float, normalised; h and w multiples of the patch size.
        keep_indices: (B, K) int64 ascending patch numbers on the (h / patch, w / patch) grid, row by row,
            CLS never counted; None keeps all.
        mask_token: (C,) what stands for a removed patch, its position added, where removed patches stay in the
            sequence (SimMIM, arXiv 2111.09886); None takes them out of it.
        return_scores: also return the scores; only with all patches kept.
        return_patches: also return the patch tokens after the final norm.
        score_layers: average the scores over so many blocks, the first ones; None for all (A-CLIP).
        scores_only: stop when the scores are known: features and cls are then those of a tower cut off there, and of
            no use.

    Returns:
        `ImageEncoding`: features (B, D) not normalised, cls (B, C) the pooled token, scores (B, N) float32 without
        gradient or None, patches (B, M, C) or None, number of tokens.

    Raises:
        UnsupportedModelError: not a plain ViT, or scores of one in which no token asks for the patches.
        ConfigError: an image size that is not a whole number of patches.
        ValueError: scores of a masked image were asked for.
    """
    vit = vit_of(visual)
    if return_scores and keep_indices is not None:
        raise ValueError("scores rank all patches: they cannot be returned when only some are kept")
    if return_scores and vit.asker is None:
        raise UnsupportedModelError(NOBODY_ASKS)
    x = embed_patches(vit, pixels, keep_indices, mask_token)
    prefix = vit.prefix()
    x = torch.cat([prefix.to(x.dtype).expand(x.shape[0], -1, -1), x], dim=1)
    x = vit.before_blocks(x)
    num_tokens, first_patch = x.shape[1], vit.num_prefix_tokens

    # class token pooling reads one token, other pooling every patch
    reads_all = return_patches or not vit.reads_first
    first = None if reads_all else torch.zeros(x.shape[0], dtype=torch.int64, device=x.device)
    x, scores = run_blocks(vit.stack, x, first, with_scores=return_scores and vit.asker == "class token",
                           score_layers=score_layers, scores_only=scores_only)
    if scores is not None:
        scores = scores[:, first_patch - 1:]  # without the registers
    pooled, pool_scores = vit.pool(x, return_scores and vit.asker == "pool")
    return ImageEncoding(
        features=vit.project(pooled), cls=pooled, scores=scores if pool_scores is None else pool_scores,
        patches=vit.norm_patches(x[:, first_patch:]) if return_patches else None, num_tokens=num_tokens)


def embed_patches(
    vit: Vit,
    pixels: Float[Tensor, "B 3 h w"],
    keep_indices: Int[Tensor, "B K"] | None,
    mask_token: Float[Tensor, " C"] | None = None,
) -> Float[Tensor, "B M C"]:
    """Cut images into patches, drop those not kept, embed the rest and add their positions.

    The stride of the convolution is its kernel size, so it is a matrix product over the pixels
    (channel, row, column) of a patch, and can be applied to the kept ones alone.

    Args:
        vit: the tower.
        pixels: (B, 3, h, w) float.
        keep_indices: (B, K) int64, or None for all N.
        mask_token: (C,) what takes the place of a patch not kept, or None to drop it.

    Returns:
        (B, M, C), M = K where patches are dropped, else N.
    """
    conv, patch = vit.patch_embedding, vit.patch_size
    grid = grid_of((pixels.shape[-2], pixels.shape[-1]), patch)
    cells = pixels.reshape(pixels.shape[0], -1, grid[0], patch[0], grid[1], patch[1]).permute(0, 2, 4, 1, 3, 5)
    positions = positions_at(vit, grid)
    if keep_indices is None and mask_token is not None:  # spelled out, so that its gradient is 0 and not none
        keep_indices = torch.arange(grid[0] * grid[1], device=pixels.device).expand(pixels.shape[0], -1)
    if keep_indices is None:
        patches = cells.flatten(1, 2)
    else:
        sample = torch.arange(pixels.shape[0], device=pixels.device)[:, None]
        patches = cells[sample, keep_indices // grid[1], keep_indices % grid[1]]
        positions = F.embedding(keep_indices, positions)  # indexing has a slow backward
    embedded = F.linear(patches.flatten(2), conv.weight.flatten(1), conv.bias) + positions
    if keep_indices is None or mask_token is None:
        return embedded
    everywhere = (mask_token + positions_at(vit, grid)).to(embedded.dtype)
    everywhere = everywhere.expand(pixels.shape[0], -1, -1)
    return everywhere.scatter(1, keep_indices[:, :, None].expand_as(embedded), embedded)


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


def positions_at(vit: Vit, grid_size: tuple[int, int]) -> Float[Tensor, "N C"]:
    """Return the position embeddings of the patches on a grid (down, across), row by row.

    The model's own where the grid is the model's. Elsewhere interpolated as open_clip and timm do when they load a
    checkpoint at another image size: bicubic, antialiased, corners not aligned. Gradients flow through.
    """
    own = vit.patch_positions()
    if vit.grid_size == grid_size:
        return own
    picture = own.unflatten(0, vit.grid_size).permute(2, 0, 1)[None].float()
    resized = F.interpolate(picture, grid_size, mode="bicubic", antialias=True, align_corners=False)
    return resized[0].flatten(1).T.to(own.dtype)


def vit_of(visual: nn.Module) -> Vit:
    """Return the parts of an image tower, if `encode_image` can run it.

    Raises:
        UnsupportedModelError: a ResNet, a tower of timm's that is no plain ViT, attentional pooling of open_clip's, or
            custom attention blocks.
    """
    if isinstance(visual, TimmModel):
        what = obstacle(visual)
        if what is None:
            return TimmVit(visual)
        what = f"this image tower has {what}"
    elif not isinstance(visual, VisionTransformer):
        what = f"this image tower is a {type(visual).__name__}"
    elif visual.attn_pool is not None or visual.pool_type not in ("tok", "avg"):
        what = "this image tower pools by attention or not at all"
    elif not isinstance(visual.transformer.resblocks[0], ResidualAttentionBlock):
        what = "this image tower has custom attention blocks"
    else:
        return OpenClipVit(visual)
    raise UnsupportedModelError(f"{what}, which cannot be scored and masked: {SUPPORTED}")


def attention_pool_of(visual: nn.Module) -> nn.Module | None:
    """Return what pools the patches of a tower by attention (SigLIP's), or None.

    Raises:
        UnsupportedModelError: as `vit_of`.
    """
    return vit_of(visual).attention_pool


def patch_embedding_of(visual: nn.Module) -> nn.Conv2d:
    """Return the convolution that embeds patches, of any supported tower; `Recipe.freeze` names it `patch_embedding`.

    Raises:
        UnsupportedModelError: as `vit_of`.
    """
    return vit_of(visual).patch_embedding
