"""Colour, blur and solarisation: drawn per sample in the loader, applied per batch on the device.

Settings are those of the A-CLIP release (arXiv 2212.08653) and of SLIP (arXiv 2112.12750), with two deviations:
the colour jitter applies its four parts in a fixed order (brightness, contrast, saturation, hue) where
torchvision permutes them per image, and values stay float between operations where PIL truncates to 8 bits.

Plain torch takes 1/5 to 3/4 of kornia's time on a CPU thread, and kornia's blur reads its sigmas on the host.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32
from torch import Tensor

from aclip.structs import ViewBatch

COLUMNS = ("brightness", "contrast", "saturation", "hue", "grey", "blur_sigma", "solarize_threshold")
"""Columns of `ViewBatch.augmentation`: three factors; a shift in turns of the colour circle, -0.5 to 0.5; 1 for luma
instead of colours; the standard deviation of a Gaussian in pixels of the view; and the value in [0, 1] from which on
values are inverted."""

IDENTITY = (1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 2.0)
"""Parameters that change nothing."""

# PIL inverts 8-bit values from 128 on; half-way between 127 and 128 is robust in floats.
_SOLARIZE_THRESHOLD = 127.5 / 255

# Three times the largest sigma, 2: 0.3 % of the mass lies beyond. Fixed, because a kernel size that followed the drawn
# sigmas would have to be read from the device.
_BLUR_RADIUS = 6

# On a CPU, values per piece: half a megabyte of floats stays in the cache through the chain of operations.
_PIECE = 2**17

AugmentationName = Literal["none", "a-clip", "slip"]


@dataclass(frozen=True)
class Augmentation:
    """Strength and probability of each operation.

    Attributes:
        brightness, contrast, saturation: factors are uniform in [1 - value, 1 + value].
        hue: shift uniform in [-value, value], in turns, at most 0.5.
        jitter_p: probability that these four are applied, all of them or none.
        grey_p, blur_p, solarize_p: probabilities of the others, independent.
        blur_sigma: sigma is uniform between these, in pixels of the view; at most 2.
    """

    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    jitter_p: float = 0.0
    grey_p: float = 0.0
    blur_p: float = 0.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    solarize_p: float = 0.0


AUGMENTATIONS: dict[AugmentationName, Augmentation] = {
    "none": Augmentation(),
    "a-clip": Augmentation(0.4, 0.4, 0.2, 0.1, jitter_p=0.8, grey_p=0.2, blur_p=0.1, solarize_p=0.2),
    "slip": Augmentation(0.4, 0.4, 0.4, 0.1, jitter_p=0.8, grey_p=0.2, blur_p=0.5),
}
"""Named settings: of A-CLIP's views, and of SLIP's two self-supervised views. Flips belong to `views`."""


def draw(augmentation: Augmentation, generator: np.random.Generator) -> Float32[np.ndarray, " A"]:
    """Draw the parameters of one view of a sample: (A,) float32 in the order of `COLUMNS`.

    They equal `IDENTITY` where an operation is not applied. Always takes the same number of draws.
    """
    u = generator.random(9).tolist()
    values = list(IDENTITY)
    if u[0] < augmentation.jitter_p:
        values[0] = 1 + augmentation.brightness * (2 * u[1] - 1)
        values[1] = 1 + augmentation.contrast * (2 * u[2] - 1)
        values[2] = 1 + augmentation.saturation * (2 * u[3] - 1)
        values[3] = augmentation.hue * (2 * u[4] - 1)
    if u[5] < augmentation.grey_p:
        values[4] = 1.0
    if u[6] < augmentation.blur_p:
        low, high = augmentation.blur_sigma
        values[5] = low + (high - low) * u[7]
    if u[8] < augmentation.solarize_p:
        values[6] = _SOLARIZE_THRESHOLD
    return np.array(values, dtype=np.float32)


def apply(view: ViewBatch, mean: Float[Tensor, " 3"], std: Float[Tensor, " 3"]) -> Float[Tensor, "B 3 h w"]:
    """Augment a view with its own parameters, if any, and normalise it: (augmented(pixels / 255) - mean) / std.

    The order is brightness, contrast, saturation, hue, grey, blur, solarisation. Each sample's result depends on that
    sample alone. Runs on the view's device, without a host synchronisation. `mean` and `std` are float32 there, of
    values in [0, 1]; the result is float32, too.
    """
    # The loader's pixels are channels_last; towers read contiguous images.
    images = view.pixels.to(torch.float32, memory_format=torch.contiguous_format).div_(255)
    if view.augmentation is not None:
        images = _augmented(images, view.augmentation)
    return images.sub_(mean[:, None, None]).div_(std[:, None, None])


def _augmented(images: Float[Tensor, "B 3 h w"], parameters: Float[Tensor, "B A"]) -> Float[Tensor, "B 3 h w"]:
    """Run the chain of operations; may write into `images`."""
    for operation, columns in _OPERATIONS:
        values = parameters[:, columns]
        if images.device.type != "cpu":
            # Which samples are concerned is known on the device only; identity values change nothing.
            images = operation(images, values)
            continue
        changed = (values != values.new_tensor(IDENTITY[columns])).any(dim=1).nonzero()[:, 0]
        for rows in torch.split(changed, max(1, _PIECE // images[0].numel())):
            images[rows] = operation(images[rows], values[rows])
    return images


def _jitter(images: Float[Tensor, "n 3 h w"], values: Float[Tensor, "n 4"]) -> Float[Tensor, "n 3 h w"]:
    """Blend with black, the mean luma and the luma, clamping to [0, 1] after each; then shift the hue."""
    brightness, contrast, saturation, hue = values[:, :, None, None, None].unbind(1)
    images = images.mul_(brightness).clamp_(0, 1)
    mean = _luma(images).mean(dim=(2, 3), keepdim=True)
    images = images.mul_(contrast).add_(mean * (1 - contrast)).clamp_(0, 1)
    images = torch.lerp(_luma(images), images, saturation).clamp_(0, 1)
    return _shift_hue(images, hue[:, 0])


def _shift_hue(images: Float[Tensor, "n 3 h w"], shift: Float[Tensor, "n 1 1"]) -> Float[Tensor, "n 3 h w"]:
    """Turn the hue of the HSV hexcone (Smith, "Color gamut transform pairs", 1978), value and chroma kept.

    With V = max, C = max - min and the hue H in turns, a channel whose hue lies at 1/3 - phase is
    V - C clamp(2 - 6 |frac(H + phase) - 1/3|, 0, 1), which needs no case distinction on the way back.
    """
    red, green, blue = images.unbind(1)
    value = torch.maximum(torch.maximum(red, green), blue)
    chroma = value - torch.minimum(torch.minimum(red, green), blue)
    other = torch.where(value == green, torch.add(blue - red, chroma, alpha=2), torch.add(red - green, chroma, alpha=4))
    sector = torch.where(value == red, green - blue, other)
    # Greys have no hue: chroma 0 gives sector 0 here and is ignored below.
    hue = sector.div_(chroma.clamp_min(1e-8)).div_(6).add_(shift)
    shifted = torch.empty_like(images)
    for channel, phase in enumerate((5 / 6, 3 / 6, 1 / 6)):
        # one turn more, because frac keeps the sign of a negative hue
        distance = (hue + (1 + phase)).frac_().sub_(1 / 3).abs_()
        fraction = distance.mul_(-6).add_(2).clamp_(0, 1)
        shifted[:, channel] = torch.addcmul(value, chroma, fraction, value=-1)
    return shifted


def _to_grey(images: Float[Tensor, "n 3 h w"], values: Float[Tensor, "n 1"]) -> Float[Tensor, "n 3 h w"]:
    return torch.lerp(images, _luma(images).expand_as(images), values[:, :, None, None])


def _blur(images: Float[Tensor, "n 3 h w"], values: Float[Tensor, "n 1"]) -> Float[Tensor, "n 3 h w"]:
    """Convolve rows and columns with each sample's Gaussian, with replicated borders.

    A sum of shifted copies: a grouped convolution with one kernel per sample is slower on a CPU.
    """
    offsets = torch.arange(-_BLUR_RADIUS, _BLUR_RADIUS + 1, device=images.device, dtype=images.dtype)
    # exp(-offset^2 / tiny) is exactly 0 beside the centre, so that sigma 0 returns the image itself
    weights = torch.exp(-offsets.square() / (2 * values.square()).clamp_min(1e-4))
    taps = (weights / weights.sum(dim=1, keepdim=True))[:, :, None, None, None].unbind(1)
    for dim, padding in ((3, (_BLUR_RADIUS, _BLUR_RADIUS, 0, 0)), (2, (0, 0, _BLUR_RADIUS, _BLUR_RADIUS))):
        padded, size = F.pad(images, padding, mode="replicate"), images.shape[dim]
        images = padded.narrow(dim, 0, size) * taps[0]
        for i, weight in enumerate(taps[1:], start=1):
            images.addcmul_(padded.narrow(dim, i, size), weight)
    return images


def _solarize(images: Float[Tensor, "n 3 h w"], values: Float[Tensor, "n 1"]) -> Float[Tensor, "n 3 h w"]:
    return torch.where(images >= values[:, :, None, None], 1 - images, images)


def _luma(images: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n 1 h w"]:
    """Return Rec. 601 luma, as in PIL and torchvision."""
    red, green, blue = images[:, 0:1], images[:, 1:2], images[:, 2:3]
    return (red * 0.299).add_(green, alpha=0.587).add_(blue, alpha=0.114)


# In order of application, with the columns that each reads.
_OPERATIONS: tuple[tuple[Callable[[Tensor, Tensor], Tensor], slice], ...] = (
    (_jitter, slice(0, 4)),
    (_to_grey, slice(4, 5)),
    (_blur, slice(5, 6)),
    (_solarize, slice(6, 7)),
)
