"""View pipelines: named crops of one decoded image, and where in the image they lie.

Crops are cut and resized in the loader's workers and travel as uint8; colours are changed later, in batch
(`aclip.data.augment`), from parameters drawn here. Every draw is a function of (seed, epoch, sample, view), so that a
sample gets the same views in any process and at any batch position.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float32, UInt8

from aclip import rng
from aclip.data.augment import AUGMENTATIONS, AugmentationName, draw
from aclip.errors import ConfigError, unknown_name

Box = tuple[int, int, int, int]
"""(top, left, height, width) in pixels of the decoded source image."""

_Draw = Callable[[str, str], np.random.Generator]  # purpose and view -> the generator for one image in one epoch

_TRIES = 10  # of random crops before the central one, as in torchvision


class Crop(NamedTuple):
    """One view of one image, before its colours are changed."""

    pixels: UInt8[np.ndarray, "3 h w"]  # RGB, already mirrored if `flipped`; channels last in memory
    box: Box  # the part of the source image that it shows
    flipped: bool  # left to right
    augmentation: Float32[np.ndarray, " A"] | None  # parameters for `aclip.data.augment.apply`; None: a plain view


@dataclass(frozen=True, kw_only=True)
class ViewPipeline:
    """Independent random crops, one for each of the class's view `names`; the base of all pipelines.

    Attributes:
        scale: fraction of the image's area, drawn uniformly from this interval.
        ratio: width over height in source pixels, drawn log-uniformly from this interval.
        augmentation: name in `aclip.data.augment.AUGMENTATIONS`.
        flip: probability of mirroring a view left to right.

    Raises:
        ConfigError: an option outside its range.
    """

    names: ClassVar[tuple[str, ...]]
    plain: ClassVar[tuple[str, ...]] = ()  # views that are never augmented

    scale: tuple[float, float] = (0.5, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    augmentation: AugmentationName = "none"
    flip: float = 0.0

    def __post_init__(self) -> None:
        _check_interval("scale", self.scale, largest=1.0)
        _check_interval("ratio", self.ratio)
        if not 0 <= self.flip <= 1:
            raise ConfigError(f"view option 'flip' must be a probability between 0 and 1, not {self.flip}")

    def __call__(self, image: UInt8[np.ndarray, "H W 3"], *, seed: int, epoch: int, sample: int,
                 sizes: Mapping[str, tuple[int, int]]) -> dict[str, Crop]:
        """Return the crops of one decoded RGB image, drawn from (seed, epoch, sample, view).

        Args:
            sizes: view name -> (height, width) of the crop in pixels. A view without a size is drawn, so that
                the others stay the same, but not cut.

        Raises:
            ConfigError: a size for a view that this pipeline does not have.
        """
        for name in sizes:
            if name not in self.names:
                raise ConfigError(unknown_name("view", name, self.names))
        generator = _generators(seed, epoch, sample)
        crops = {}
        for name, (box, flipped) in self._draw(image.shape[0], image.shape[1], generator).items():
            if name in sizes:
                plain = self.augmentation == "none" or name in self.plain
                drawn = None if plain else draw(AUGMENTATIONS[self.augmentation], generator("augment", name))
                crops[name] = Crop(cut(image, box, sizes[name], flipped), box, flipped, drawn)
        return crops

    def boxes(self, height: int, width: int, *, seed: int, epoch: int, sample: int) -> dict[str, Box]:
        """Return the boxes that `__call__` cuts from an image of this size in pixels."""
        drawn = self._draw(height, width, _generators(seed, epoch, sample))
        return {name: box for name, (box, _) in drawn.items()}

    def least_side(self, sizes: Mapping[str, tuple[int, int]]) -> int:
        """Return the smallest short side of an image, in pixels, with which no crop is enlarged, up to rounding."""
        height, width = (max(size[axis] for size in sizes.values()) for axis in (0, 1))
        fraction = min(scale[0] for scale, _ in self._random_crops().values())
        return math.ceil(max(height * math.sqrt(self.ratio[1] / fraction), width / math.sqrt(self.ratio[0] * fraction)))

    def _random_crops(self) -> dict[str, tuple[tuple[float, float], float]]:
        """Return scale and probability of a flip of the views that are cropped at random."""
        return dict.fromkeys(self.names, (self.scale, self.flip))

    def _draw(self, height: int, width: int, generator: _Draw) -> dict[str, tuple[Box, bool]]:
        """Return each view's box and whether it is flipped."""
        drawn = {}
        for name, (scale, flip) in self._random_crops().items():
            random = generator("crop", name)
            flipped = random.random() < flip
            drawn[name] = random_box(random, height, width, scale, self.ratio), flipped
        return drawn


@dataclass(frozen=True, kw_only=True)
class OneCrop(ViewPipeline):
    """View "a": one random crop, as CLIP and FLIP train on."""

    names: ClassVar[tuple[str, ...]] = ("a",)


@dataclass(frozen=True, kw_only=True)
class TwoAugs(ViewPipeline):
    """Views "a" and "b": two crops, each with an augmentation of its own."""

    names: ClassVar[tuple[str, ...]] = ("a", "b")

    augmentation: AugmentationName = "a-clip"


@dataclass(frozen=True, kw_only=True)
class TwoCropsInContext(ViewPipeline):
    """Views "a" and "b" as in `TwoAugs`, and "context", the plain crop that A-CLIP's EMA encoder scores.

    The context is only resized, never augmented or flipped.

    Attributes:
        context: how its box is drawn. "paper" (arXiv 2212.08653): `enclosing_box`, which contains both views.
            "released": `released_context_box`, as the authors' public code draws it, which cuts off part of a
            view in most samples.
    """

    names: ClassVar[tuple[str, ...]] = ("a", "b", "context")
    plain: ClassVar[tuple[str, ...]] = ("context",)

    augmentation: AugmentationName = "a-clip"
    context: Literal["paper", "released"] = "paper"

    def _random_crops(self) -> dict[str, tuple[tuple[float, float], float]]:
        return {name: (self.scale, self.flip) for name in self.names if name != "context"}

    def _draw(self, height: int, width: int, generator: _Draw) -> dict[str, tuple[Box, bool]]:
        crops = super()._draw(height, width, generator)
        draw_box = enclosing_box if self.context == "paper" else released_context_box
        box = draw_box(generator("crop", "context"), height, width, *(box for box, _ in crops.values()))
        return {**crops, "context": (box, False)}


@dataclass(frozen=True, kw_only=True)
class ThreeCropsInContext(TwoCropsInContext):
    """Views "a", "b" and "c", and the "context" that contains all three."""

    names: ClassVar[tuple[str, ...]] = ("a", "b", "c", "context")


@dataclass(frozen=True, kw_only=True)
class CropAndTwoAugs(ViewPipeline):
    """View "a", a plain random crop, and "b" and "c", two augmented ones, as SLIP trains on (arXiv 2112.12750).

    Attributes:
        scale: of the plain crop, which is never flipped.
        augmented_scale: of the augmented crops. `augmentation` and `flip` are theirs alone.
    """

    names: ClassVar[tuple[str, ...]] = ("a", "b", "c")
    plain: ClassVar[tuple[str, ...]] = ("a",)

    augmentation: AugmentationName = "slip"
    flip: float = 0.5
    augmented_scale: tuple[float, float] = (0.08, 1.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_interval("augmented_scale", self.augmented_scale, largest=1.0)

    def _random_crops(self) -> dict[str, tuple[tuple[float, float], float]]:
        return {"a": (self.scale, 0.0), "b": (self.augmented_scale, self.flip), "c": (self.augmented_scale, self.flip)}


VIEWS: dict[str, type[ViewPipeline]] = {
    "one_crop": OneCrop, "two_augs": TwoAugs, "two_crops_in_context": TwoCropsInContext,
    "three_crops_in_context": ThreeCropsInContext, "crop_and_two_augs": CropAndTwoAugs,
}
"""View pipelines by the name that a recipe gives; a recipe's `view_options` are their keyword arguments."""


def random_box(generator: np.random.Generator, height: int, width: int, scale: tuple[float, float],
               ratio: tuple[float, float]) -> Box:
    """Draw a crop of an image as torchvision's `RandomResizedCrop` does, by four draws a try.

    Fraction of the area uniform in `scale`, width / height log-uniform in `ratio`, both sides rounded to whole pixels,
    position uniform. After ten boxes that do not fit, the largest central box with an allowed ratio.
    """
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(_TRIES):
        u_area, u_ratio, u_top, u_left = generator.random(4).tolist()
        area = height * width * (scale[0] + (scale[1] - scale[0]) * u_area)
        drawn_ratio = math.exp(low + (high - low) * u_ratio)
        h, w = round(math.sqrt(area / drawn_ratio)), round(math.sqrt(area * drawn_ratio))
        if 0 < h <= height and 0 < w <= width:
            return int(u_top * (height - h + 1)), int(u_left * (width - w + 1)), h, w
    # a very long image can ask for a side of less than half a pixel here
    h = min(height, max(1, round(width / ratio[0])))
    w = min(width, max(1, round(height * ratio[1])))
    return (height - h) // 2, (width - w) // 2, h, w


def enclosing_box(generator: np.random.Generator, height: int, width: int, *views: Box) -> Box:
    """Draw a box that contains all `views`: the smallest, each edge moved outwards uniformly up to the image's."""
    top, left, bottom, right = _union(views)
    u_top, u_left, u_bottom, u_right = generator.random(4).tolist()
    top, left = int(u_top * (top + 1)), int(u_left * (left + 1))
    bottom += int(u_bottom * (height - bottom + 1))
    right += int(u_right * (width - right + 1))
    return top, left, bottom - top, right - left


def released_context_box(generator: np.random.Generator, height: int, width: int, *views: Box) -> Box:
    """Draw the scored box of the public A-CLIP release, which may not contain the views.

    Its left edge starts from the smaller of a's left and b's *height* (instead of b's left). Its top and left edges are
    moved outwards first; then height and width are drawn uniformly between those of the box *before* that move and the
    most that fits in the image, so that the bottom and right edges can end up inside a view.
    """
    top, _, bottom, right = _union(views)
    left = min(views[0][1], *(view[2] for view in views[1:]))
    h, w = bottom - top, right - left
    u_top, u_left, u_height, u_width = generator.random(4).tolist()
    top, left = int(u_top * (top + 1)), int(u_left * (left + 1))
    h += int(u_height * (height - top - h + 1))
    w += int(u_width * (width - left - w + 1))
    return top, left, h, w


def cut(image: UInt8[np.ndarray, "H W 3"], box: Box, size: tuple[int, int], flipped: bool
        ) -> UInt8[np.ndarray, "3 h w"]:
    """Return the part of an image in `box`, resized to (height, width) (bicubic, antialiased), mirrored if `flipped`.

    Equal to torchvision's `RandomResizedCrop` up to rounding: pixels outside the box have no influence.
    """
    top, left, height, width = box
    part = torch.from_numpy(image[None, top : top + height, left : left + width]).permute(0, 3, 1, 2)
    pixels = np.empty((1, *size, 3), dtype=np.uint8)
    # The kernel behind `functional.interpolate`, vectorised for 8-bit channels_last pixels: a sixth of Pillow's time.
    # With `out` it keeps that layout and saves a fifth of its own.
    torch.ops.aten._upsample_bicubic2d_aa.out(
        part, size, False, None, None, out=torch.from_numpy(pixels).permute(0, 3, 1, 2))
    return (pixels[0, :, ::-1] if flipped else pixels[0]).transpose(2, 0, 1)


def _union(boxes: tuple[Box, ...]) -> tuple[int, int, int, int]:
    """Return (top, left, bottom, right) of the smallest box around all of them."""
    return (min(box[0] for box in boxes), min(box[1] for box in boxes),
            max(box[0] + box[2] for box in boxes), max(box[1] + box[3] for box in boxes))


def _generators(seed: int, epoch: int, sample: int) -> _Draw:
    return lambda purpose, view: rng.generator(seed, purpose, epoch, sample, view)


def _check_interval(name: str, interval: tuple[float, float], largest: float = math.inf) -> None:
    low, high = interval
    if not 0 < low <= high <= largest or high == math.inf:
        limit = f" <= {largest:g}" if largest < math.inf else ""
        raise ConfigError(f"view option '{name}' takes two numbers, 0 < low <= high{limit}, not {interval}")
