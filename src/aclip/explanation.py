"""`aclip.explain`: where a model looks in an image, which patches it would keep, and where the image answers a text."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from jaxtyping import Bool, Float
from PIL import Image

from aclip.errors import BadSampleError, ConfigError, DataError

if TYPE_CHECKING:
    from aclip.models import LoadedModel
    from aclip.models.loaded import ImageLike

SHOWN = 448  # pixels: the shorter side of the displayed image is at least that long


@dataclass(frozen=True, eq=False)
class Explanation:
    """What a model sees in one image, on its grid of H_p x W_p patches.

    Attributes:
        image: the part of the image that the model sees, RGB, large enough to look at.
        texts: T texts.
        attention: (H_p, W_p) in [0, 1], of the class token (or the attention pool) to each patch.
        kept: (H_p, W_p), the patches that attentive masking would keep.
        maps: (T, H_p, W_p) not negative, how much each patch makes the image more similar to each text, see
            `aclip.models.text_maps`; 0 is not at all.
        similarity: (T,) in [-1, 1], cosine similarity of the image to each text.

    Example:
        >>> explained, = aclip.explain("runs/first", ["street.jpg"], ["a red bus"])
        >>> explained.maps.shape, explained.kept.sum().item()
        ((1, 8, 8), 32)
    """

    image: Image.Image
    texts: tuple[str, ...]
    attention: Float[np.ndarray, "H_p W_p"]
    kept: Bool[np.ndarray, "H_p W_p"]
    maps: Float[np.ndarray, "T H_p W_p"]
    similarity: Float[np.ndarray, " T"]

    def figure(self) -> Image.Image:
        """Draw the image, its attention, the patches kept, and the map of each text on one scale of colours."""
        import torch

        from aclip.report.page import compact
        from aclip.report.sheet import Panel, draw_sheet, with_scale
        from aclip.report.snapshots import heat_map, kept_patches

        down, across = self.attention.shape
        grid, kept = (down, across), torch.from_numpy(self.kept.ravel()).nonzero()[:, 0]
        panels = [
            Panel(self.image, "what the model sees", f"{down} x {across} patches"),
            Panel(heat_map(self.image, torch.from_numpy(self.attention), grid), "attention", "light: much"),
            Panel(kept_patches(self.image, kept, grid), "patches kept", f"{len(kept)} of {down * across}")]
        if not self.texts:
            return draw_sheet(panels)
        limits = 0.0, float(self.maps.max())
        for text, one, value in zip(self.texts, self.maps, self.similarity, strict=True):
            heat = heat_map(self.image, torch.from_numpy(one), grid, limits)
            panels.append(Panel(heat, text, f"similarity {value:.3f}"))
        words = "how much a patch makes the image more similar to the text below it"
        return with_scale(draw_sheet(panels, columns=4 if len(self.texts) == 1 else 3), "0", compact(limits[1]), words)


def explain(
    model: LoadedModel | str | Path, images: Iterable[ImageLike], texts: Iterable[str] = (), keep: float = 0.5
) -> list[Explanation]:
    """Show where a model looks in images, which patches training would keep, and where images answer texts.

    Args:
        model: a loaded model, or what `aclip.load` takes.
        images: paths, Pillow images or uint8 arrays.
        texts: what to look for in every image.
        keep: fraction of the patches that is kept, in (0, 1].

    Raises:
        ConfigError: one image or text in place of several, or a fraction out of range.
        DataError: an image that cannot be used, with its path (or number) and the reason.
        UnsupportedModelError: a tower without attention scores, or texts for a model without a text tower.

    Example:
        >>> explained, = aclip.explain("runs/first", ["street.jpg"], ["a red bus", "a tree"])
        >>> explained.figure().save("explained.png")
    """
    import torch

    from aclip import models
    from aclip.data.evaluation_set import limit_aspect
    from aclip.models.loaded import open_image

    if isinstance(images, str | Path | Image.Image | np.ndarray) or isinstance(texts, str):
        raise ConfigError("explain takes lists of images and of texts, such as ['street.jpg'], ['a red bus']")
    if not 0 < keep <= 1:
        raise ConfigError(f"keep is a fraction of the patches, above 0 and at most 1, not {keep:g}")
    loaded = models.load(model) if isinstance(model, str | Path) else model
    visual, enlarged, texts = models.visual_of(loaded.model), loaded.display_transform(SHOWN), tuple(texts)
    wanted = loaded.encode_texts(texts).to(loaded.device) if texts else None
    explanations = []
    for number, given in enumerate(images):
        try:
            image = limit_aspect(open_image(given))
        except BadSampleError as error:
            name = given if isinstance(given, str | Path) else f"image {number}"
            if isinstance(given, str | Path) and Path(given).is_dir():
                raise DataError(f"{name} is a folder: name images, as in {Path(name) / '*.jpg'}") from error
            raise DataError(f"{name} cannot be used: {error.reason}") from error
        pixels = loaded.preprocess(image)[None].to(loaded.device)
        grid = models.vit_of(visual).grid_size
        attention, kept = loaded.attention_scores(pixels)[0], loaded.keep_mask(pixels, 1 - keep)[0]
        maps, similarity = torch.zeros(0, attention.numel()), torch.zeros(0)
        if wanted is not None:
            with torch.no_grad():
                similarity = wanted @ loaded.encode_image(pixels)[0]
            maps = models.text_maps(visual, pixels, wanted)[0]
        explanations.append(Explanation(
            enlarged(image), texts, attention.reshape(grid).cpu().numpy(),
            kept.reshape(grid).cpu().numpy(), maps.reshape(-1, *grid).cpu().numpy(), similarity.cpu().numpy()))
    return explanations


def draw_explanations(
    model: str, images: tuple[str, ...], *, output: str, text: tuple[str, ...] = (), keep: float = 0.5,
    weights: Literal["online", "ema"] = "online",
) -> list[dict[str, Any]]:
    """Draw where a model looks in images, which patches it would keep, and where the images answer texts.

    Args:
        model: a run's folder, or any model that training starts from (NAME:TAG, NAME:FILE, a folder).
        images: files.
        output: FILE.png (or .jpg), or a folder with one PNG an image.
        text: what to look for, e.g. --text "a red bus" "a tree".
        keep: fraction of the patches that is kept.
        weights: of a run: the trained model, or its image tower's moving average (ema), which scores in training.

    Returns:
        Of every image: its name, the file written, and its similarity to each text.

    Raises:
        ConfigError: several images for one file.
        AclipError: as `aclip.explain`.
    """
    from rich.console import Console
    from rich.progress import track

    from aclip.models import load

    stems = [Path(image).stem for image in images]
    if output.lower().endswith((".png", ".jpg", ".jpeg")):
        if len(images) != 1:
            raise ConfigError(f"{output} holds one image and {len(images)} are given: name a folder, "
                              f"--output {Path(output).with_suffix('')}")
        paths = [Path(output)]
    else:
        unique = len(set(stems)) == len(stems)
        paths = [Path(output) / f"{stem if unique else f'{number:03}-{stem}'}.png" for number, stem in enumerate(stems)]
    loaded, console, drawn = load(model, weights=weights), Console(highlight=False), []
    for image, path in zip(track(images, "images", console=console, disable=len(images) == 1), paths, strict=True):
        (explained,) = explain(loaded, [image], text, keep)
        path.parent.mkdir(parents=True, exist_ok=True)
        explained.figure().save(path)
        similarities = dict(zip(text, explained.similarity.tolist(), strict=True))
        drawn.append({"image": image, "output": path, "similarity": similarities})
        for words, similarity in similarities.items():
            console.print(f"{similarity:6.3f}  {words}", markup=False)
        console.print(f"{image} -> {path}", markup=False, soft_wrap=True)
    return drawn
