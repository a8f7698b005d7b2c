"""The image tower: a ViT over the kept patches, at any resolution, with the attention that ranks patches."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from aclip.errors import UnsupportedModelError
from aclip.models.blocks import run_blocks
from aclip.models.vit import Vit, grid_of, vit_of
from aclip.structs import ImageEncoding

NO_ATTENTION_SCORES = (
    "the features of this image tower come from neither a class token nor attention pooling, so it has no attention "
    "scores: choose a masking that needs none, such as uniform, or another model, such as ViT-B-16")


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
    embedded; kept patch i has the position embedding of patch `keep_indices[:, i]`. Class token and registers always
    stay. At another resolution than the model's own, positions are interpolated as by timm and open_clip. The score of
    patch P, over all layers l and heads h (A-CLIP, arXiv 2212.08653):

        s_P = 1/(L H) sum_lh softmax(q_lh(CLS) . k_lh / sqrt(d))[P]

    In a tower that pools by attention (SigLIP), with the query of the pool and its heads:

        s_P = 1/H sum_h softmax(q_h . k_h / sqrt(d))[P]

    Works under autocast and `torch.compile`, without host synchronisation. A config's `patch_dropout`, dropout and
    stochastic depth are not applied: masking is an argument here, never a state of the model.

    Args:
        visual: `open_clip.transformer.VisionTransformer`, or `open_clip.timm_model.TimmModel` around a plain ViT.
        pixels: (B, 3, h, w) float, normalised; h and w multiples of the patch size.
        keep_indices: (B, K) int64 ascending patch numbers on the (h / patch, w / patch) grid, row by row, CLS never
            counted; None keeps all.
        mask_token: (C,) replaces removed patches, which then stay in the sequence with their positions (SimMIM,
            arXiv 2111.09886); None drops them.
        return_scores: also return the scores; only with all patches kept.
        return_patches: also return the patch tokens after the final norm.

    Returns:
        `ImageEncoding`: features (B, D) not normalised, cls (B, C) the pooled token, scores (B, N) float32 without
        gradient or None, patches (B, M, C) or None, number of tokens.

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
    x = _embed_patches(vit, pixels, keep_indices, mask_token)
    prefix = vit.prefix()
    x = vit.norm_before(torch.cat([prefix.to(x.dtype).expand(x.shape[0], -1, -1), x], dim=1))
    num_tokens, first_patch = x.shape[1], vit.num_prefix_tokens

    reads_all = return_patches or not vit.reads_first
    first = None if reads_all else torch.zeros(x.shape[0], dtype=torch.int64, device=x.device)
    x, scores = run_blocks(vit.stack, x, first, with_scores=return_scores and vit.scored_by == "class token")
    if scores is not None:
        scores = scores[:, first_patch - 1:]  # drop the registers
    pooled, pool_scores = vit.pool(x, return_scores and vit.scored_by == "pool")
    return ImageEncoding(
        features=vit.project(pooled), cls=pooled, scores=scores if pool_scores is None else pool_scores,
        patches=vit.norm_patches(x[:, first_patch:]) if return_patches else None, num_tokens=num_tokens)


def _embed_patches(
    vit: Vit,
    pixels: Float[Tensor, "B 3 h w"],
    keep_indices: Int[Tensor, "B K"] | None,
    mask_token: Float[Tensor, " C"] | None,
) -> Float[Tensor, "B M C"]:
    """Cut images into patches, drop those not kept, embed the rest and add their positions.

    The stride of the convolution is its kernel size, so it is a matrix product over the pixels (channel, row, column)
    of a patch, and can be applied to the kept patches alone. M is K, or N if a mask token fills the gaps.
    """
    conv, patch = vit.patch_embedding, vit.patch_size
    grid = grid_of((pixels.shape[-2], pixels.shape[-1]), patch)
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
    """Change an image tower to another image size (height, width), its positions interpolated, in place.

    Raises:
        ConfigError: not a whole number of patches.
    """
    vit = vit_of(visual)
    grid_of(image_size, vit.patch_size)
    vit.resize(image_size)
    if hasattr(vit.visual, "preprocess_cfg"):
        vit.visual.preprocess_cfg = {**vit.visual.preprocess_cfg, "size": image_size}


def attention_pool_of(visual: nn.Module) -> nn.Module | None:
    """Return the module that pools the patches of a tower by attention (SigLIP), or None."""
    return getattr(vit_of(visual).stack, "attn_pool", None)


def patch_embedding_of(visual: nn.Module) -> nn.Conv2d:
    """Return the convolution that embeds patches; `Recipe.freeze` calls it `patch_embedding`."""
    return vit_of(visual).patch_embedding
