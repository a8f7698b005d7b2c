"""Pictures of what a model looks at: the score heat map, and the patches kept.

The layers have one pixel a patch; the report lays them over a picture and lets the browser enlarge them.
`heat_map` and `kept_patches` do the same in Pillow, for pictures that stand alone.
"""

import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image
from torch import Tensor

# Inferno's course in nine anchors (van der Walt and Smith, 2015; CC0): dark = little attention, light = much;
# lightness rises evenly, so it also reads in grey and for colour-blind eyes.
_HEAT = np.array([
    (0, 0, 4), (31, 12, 72), (85, 15, 109), (136, 34, 106), (186, 54, 85),
    (227, 89, 51), (249, 140, 10), (249, 201, 50), (252, 255, 164),
], dtype=np.float64)

HEAT_OPACITY = 0.72
"""Opacity of the heat over the grey picture."""

VEIL_OPACITY = 0.86
"""Opacity of the veil over a removed patch."""

_VEIL = (134, 139, 150)  # mid-grey: apart from white and from black


def heat_colours(values: Float[np.ndarray, "*shape"]) -> UInt8[np.ndarray, "*shape 3"]:
    """Map values in [0, 1] (clipped) to sRGB colours."""
    position = np.clip(values, 0.0, 1.0) * (len(_HEAT) - 1)
    anchors = np.arange(len(_HEAT))
    channels = [np.interp(position, anchors, _HEAT[:, c]) for c in range(3)]
    return np.stack(channels, axis=-1).round().astype(np.uint8)


def heat_layer(scores: Float[Tensor, " N"], grid: tuple[int, int]) -> Image.Image:
    """Return the scores of one picture as colours, one pixel a patch.

    Scores are stretched from their minimum to their 98th percentile: a single patch that draws most of the
    attention, as ViTs have, must not leave all others black. All equal gives the darkest colour.

    Args:
        scores: (N,) float, N = grid[0] x grid[1].
        grid: patches (down, across).

    Returns:
        RGB, `grid[1]` wide and `grid[0]` high.
    """
    values = np.nan_to_num(scores.detach().cpu().double().numpy()).reshape(grid)
    low, high = values.min(), np.quantile(values, 0.98)
    stretched = (values - low) / (high - low) if high > low else np.zeros_like(values)
    return Image.fromarray(heat_colours(stretched))


def veil_layer(keep_indices: Int[Tensor, " K"], grid: tuple[int, int]) -> Image.Image:
    """Return a grey veil over the removed patches of one picture, one pixel a patch, clear where kept.

    Args:
        keep_indices: (K,) int64 on the patch grid, CLS not counted.
        grid: patches (down, across).

    Returns:
        RGBA, `grid[1]` wide and `grid[0]` high.
    """
    layer = np.full((grid[0] * grid[1], 4), (*_VEIL, round(255 * VEIL_OPACITY)), dtype=np.uint8)
    layer[keep_indices.cpu().numpy()] = 0
    return Image.fromarray(layer.reshape(*grid, 4))


def to_image(pixels: UInt8[Tensor, "3 H W"]) -> Image.Image:
    """Return uint8 RGB pixels as a Pillow image."""
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().cpu().numpy())


def heat_map(image: Image.Image, scores: Float[Tensor, " N"], grid: tuple[int, int]) -> Image.Image:
    """Lay the smoothed score heat map over a grey copy of `image`; see `heat_layer`.

    Returns:
        RGB of the size of `image`.
    """
    heat = heat_layer(scores, grid).resize(image.size, Image.Resampling.BICUBIC)
    return Image.blend(image.convert("L").convert("RGB"), heat, HEAT_OPACITY)


def kept_patches(image: Image.Image, keep_indices: Int[Tensor, " K"], grid: tuple[int, int]) -> Image.Image:
    """Show the kept patches of `image` as they are and veil the removed ones, drained of colour.

    Returns:
        RGB of the size of `image`.
    """
    veil = veil_layer(keep_indices, grid).resize(image.size, Image.Resampling.NEAREST)
    grey = image.convert("L").convert("RGBA")
    veiled = Image.alpha_composite(grey, veil).convert("RGB")
    removed = veil.getchannel("A").point(lambda alpha: 255 if alpha else 0)
    return Image.composite(veiled, image.convert("RGB"), removed)
