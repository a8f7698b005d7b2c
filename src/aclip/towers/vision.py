"""The image tower: open_clip's ViT over kept patches, at any resolution, with CLS attention scores."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from open_clip.transformer import ResidualAttentionBlock, VisionTransformer
from torch import Tensor, nn

from aclip.errors import ConfigError, UnsupportedModelError
from aclip.structs import ImageEncoding
from aclip.towers.blocks import run_blocks

NUM_PREFIX_TOKENS = 1
"""P of open_clip's own ViTs: one class token, always."""

SUPPORTED = ("supported are open_clip's own ViTs with plain attention blocks and 'tok' or 'avg' pooling, "
             "such as ViT-B-32, ViT-B-16, ViT-L-14, vit-small and vit-tiny")


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
    """Encode images, or only some of their patches, with an open_clip ViT and its own weights.

    With every patch kept, the features equal `visual(pixels)` up to rounding. Patches are removed before
    they are embedded, after which kept patch i carries the position of patch `keep_indices[:, i]`; the
    class token always stays. At another resolution than the model's, positions are interpolated
    (see `positions_at`). The scores of patch P, over all layers l and heads h (A-CLIP, arXiv 2212.08653):

        s_P = 1/(L H) sum_lh softmax(q_lh(CLS) . k_lh / sqrt(d))[P]

    Runs under autocast, under `torch.compile`, and without a host synchronisation. `patch_dropout` of a
    config is not applied: what is removed is an argument here, never a state of the model.

    Args:
        visual: `open_clip.transformer.VisionTransformer`, see `visual_of`.
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
        `ImageEncoding`: features (B, D) not normalised, cls (B, C), scores (B, N) float32 without gradient
        or None, patches (B, M, C) or None, number of tokens.

    Raises:
        UnsupportedModelError: not one of open_clip's own ViTs.
        ConfigError: an image size that is not a whole number of patches.
        ValueError: scores of a masked image were asked for.
    """
    tower = check_visual(visual)
    if return_scores and keep_indices is not None:
        raise ValueError("scores rank all patches: they cannot be returned when only some are kept")
    x = embed_patches(tower, pixels, keep_indices, mask_token)
    cls = tower.class_embedding + tower.positional_embedding[0]
    x = torch.cat([cls.to(x.dtype).expand(x.shape[0], 1, -1), x], dim=1)
    x = tower.ln_pre(x)
    num_tokens = x.shape[1]

    # mean pooling reads every patch, class token pooling one token
    reads_all = return_patches or tower.pool_type == "avg"
    first = None if reads_all else torch.zeros(len(x), dtype=torch.int64, device=x.device)
    x, scores = run_blocks(tower.transformer, x, first, with_scores=return_scores, score_layers=score_layers,
                           scores_only=scores_only)
    pooled = pool(tower, x)
    features = pooled if tower.proj is None else pooled @ tower.proj
    patches = tower.ln_post(x[:, NUM_PREFIX_TOKENS:]) if return_patches else None
    return ImageEncoding(features=features, cls=pooled, scores=scores, patches=patches, num_tokens=num_tokens)


def embed_patches(
    tower: Any,
    pixels: Float[Tensor, "B 3 h w"],
    keep_indices: Int[Tensor, "B K"] | None,
    mask_token: Float[Tensor, " C"] | None = None,
) -> Float[Tensor, "B M C"]:
    """Cut images into patches, drop those not kept, embed the rest and add their positions.

    The stride of open_clip's convolution is its kernel size, so it is a matrix product over the pixels
    (channel, row, column) of a patch, and can be applied to the kept ones alone.

    Args:
        tower: the ViT.
        pixels: (B, 3, h, w) float.
        keep_indices: (B, K) int64, or None for all N.
        mask_token: (C,) what takes the place of a patch not kept, or None to drop it.

    Returns:
        (B, M, C), M = K where patches are dropped, else N.
    """
    patch = tower.conv1.kernel_size
    grid = grid_of((pixels.shape[-2], pixels.shape[-1]), patch)
    cells = pixels.reshape(len(pixels), -1, grid[0], patch[0], grid[1], patch[1]).permute(0, 2, 4, 1, 3, 5)
    positions = positions_at(tower, grid)[NUM_PREFIX_TOKENS:]
    if keep_indices is None and mask_token is not None:  # spelled out, so that its gradient is 0 and not none
        keep_indices = torch.arange(grid[0] * grid[1], device=pixels.device).expand(len(pixels), -1)
    if keep_indices is None:
        patches = cells.flatten(1, 2)
    else:
        sample = torch.arange(len(pixels), device=pixels.device)[:, None]
        patches = cells[sample, keep_indices // grid[1], keep_indices % grid[1]]
        positions = F.embedding(keep_indices, positions)  # indexing has a slow backward
    embedded = F.linear(patches.flatten(2), tower.conv1.weight.flatten(1), tower.conv1.bias) + positions
    if keep_indices is None or mask_token is None:
        return embedded
    everywhere = (mask_token + positions_at(tower, grid)[NUM_PREFIX_TOKENS:]).to(embedded.dtype)
    everywhere = everywhere.expand(len(pixels), -1, -1)
    return everywhere.scatter(1, keep_indices[:, :, None].expand_as(embedded), embedded)


def pool(tower: Any, x: Float[Tensor, "B L C"]) -> Float[Tensor, "B C"]:
    """Return the pooled token after the final norm: the class token's, or the mean over patches."""
    pooled: Tensor
    if tower.pool_type == "tok":
        pooled = tower.ln_post(x[:, 0])
    elif tower.final_ln_after_pool:
        pooled = tower.ln_post(x[:, NUM_PREFIX_TOKENS:].mean(dim=1))
    else:
        pooled = tower.ln_post(x)[:, NUM_PREFIX_TOKENS:].mean(dim=1)
    return pooled


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


def positions_at(tower: Any, grid_size: tuple[int, int]) -> Float[Tensor, "L C"]:
    """Return the position embeddings on a grid (down, across), the class token's first.

    The model's own where the grid is the model's. Elsewhere interpolated as open_clip does when it loads a
    checkpoint at another image size: bicubic, antialiased, corners not aligned. Gradients flow through.
    """
    own = tower.positional_embedding
    if tuple(tower.grid_size) == grid_size:
        positions: Tensor = own
        return positions
    prefix, patches = own[:NUM_PREFIX_TOKENS], own[NUM_PREFIX_TOKENS:]
    picture = patches.unflatten(0, tuple(tower.grid_size)).permute(2, 0, 1)[None].float()
    resized = F.interpolate(picture, grid_size, mode="bicubic", antialias=True, align_corners=False)
    return torch.cat([prefix, resized[0].flatten(1).T.to(own.dtype)])


def check_visual(visual: nn.Module) -> Any:
    """Return `visual`, if it is a tower that `encode_image` can run.

    Raises:
        UnsupportedModelError: a ResNet, a timm model, attentional pooling, or custom attention blocks.
    """
    if not isinstance(visual, VisionTransformer):
        what = f"this image tower is a {type(visual).__name__}"
    elif visual.attn_pool is not None or visual.pool_type not in ("tok", "avg"):
        what = "this image tower pools by attention or not at all"
    elif not isinstance(visual.transformer.resblocks[0], ResidualAttentionBlock):
        what = "this image tower has custom attention blocks"
    else:
        return visual
    raise UnsupportedModelError(f"{what}, which cannot be scored and masked: {SUPPORTED}")
