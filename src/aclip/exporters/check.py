"""Write an export, read it back with its own library, and keep it only if the features are the model's own."""

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from aclip import rng
from aclip.errors import AclipError, ConfigError, ExportError
from aclip.exporters.base import Exporter, Readback, logit_multiplier, replace_folder
from aclip.models import LoadedModel, preprocess_config

RECORD, CARD = "aclip_export.json", "README.md"
CAPTIONS = (
    "a photo of a dog", "two people walk along a beach at sunset", "red apple", "A Drawing of a LIGHTHOUSE on a cliff",
    "it's 12 o'clock, isn't it?", "café 北京 – naïve façade 😀", "",  # noqa: RUF001
    "rock &amp; roll", "“curly quotes” and a cat’s paw", "a very long caption " * 30,  # noqa: RUF001
)
"""Hard cases for a tokenizer: case, accents, emoji, entities, quotes, the empty text, more than the context."""

PIXELS, TOKENS = "preprocessed pixels (of 255)", "captions tokenized differently"
LIMITS = {PIXELS: 2.0, TOKENS: float("inf")}
"""Limits other than the tolerance of features: libraries round pixels and clean texts differently."""


class Examples(NamedTuple):
    """RGB images and uncleaned captions to compare features on."""

    images: tuple[Image.Image, ...]
    captions: tuple[str, ...] = CAPTIONS


def synthetic_examples(image_size: tuple[int, int]) -> Examples:
    """Return images and captions that are the same on every machine.

    The images are coloured noise, smooth and sharp: one of twice the input's side, one much wider and one much taller
    than the input, with even margins to crop, and a small one that has to be enlarged.

    Args:
        image_size: (height, width) of the model's input in pixels.
    """
    height, width = image_size
    sizes = ((2 * height, 2 * width), (height, 3 * width), (3 * height, width), (height // 2 + 1, width // 2 + 1))
    return Examples(tuple(_noise_image(number, *size) for number, size in enumerate(sizes)))


def write_checked(
    exporter: Exporter, model: LoadedModel, config: Mapping[str, Any], folder: Path, *,
    card: Callable[[dict[str, float]], str] = str, record: Mapping[str, Any] | None = None, tolerance: float = 1e-5,
    overwrite: bool = False,
) -> dict[str, float]:
    """Write an export to `folder` if its own library computes the model's features from it.

    Everything is written beside the folder first: on any error nothing is left, and an earlier export stays.

    Args:
        exporter: the format.
        model: on the CPU, in fp32 and evaluation mode.
        config: open_clip's `model_cfg` of it, complete.
        folder: must not exist, unless it is empty, or an earlier export and `overwrite` is set.
        card: differences -> model card.
        record: further entries of `aclip_export.json`.
        tolerance, overwrite: as in `aclip.exporters.export`.

    Returns:
        The differences, see `compare`.

    Raises:
        UnsupportedModelError: a model that the format cannot represent.
        MissingDependencyError: the format needs a package that is not installed.
        ConfigError: something else is at `folder`.
        ExportError: the features differ, or the export cannot be written or loaded.
    """
    if (folder / RECORD).is_file():
        if not overwrite:
            raise ConfigError(f"{folder} holds an earlier export: replace it with --overwrite, or choose another "
                              "--output")
    elif folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ConfigError(f"{folder} exists and is not an earlier export: choose another --output")
    exporter.check_supported(model)
    try:
        with replace_folder(folder) as temporary:
            exporter.write(model, config, temporary)
            differences = compare(exporter.read(temporary, model), model)
            check_differences(differences, tolerance, exporter.library)
            (temporary / CARD).write_text(card(differences), encoding="utf-8")
            content = {**(record or {}), "library": exporter.library, "tolerance": tolerance,
                       "differences": differences}
            (temporary / RECORD).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    except AclipError:
        raise
    except Exception as error:  # a full disk, a tower that cannot be traced, a file that cannot be loaded
        raise ExportError(f"the export to {folder} for {exporter.library} failed, so nothing was written: "
                          f"{type(error).__name__}: {error}") from error
    return differences


@torch.inference_mode()
def compare(readback: Readback, model: LoadedModel) -> dict[str, float]:
    """Return the differences between an export, as read back, and its model, on `synthetic_examples`.

    Of L2-normalised features and of preprocessed pixels the largest of an entry, of the logit scale the relative one,
    of tokens the number of captions; NaN if shapes differ. What a format does not have is left out.
    """
    images, captions = synthetic_examples(model.image_size).images, list(CAPTIONS)
    pixels = torch.stack([model.preprocess(image) for image in images])
    found = {"image features": _difference(_normalized(readback.encode_image(pixels)), model.encode_image(pixels))}
    if readback.encode_text is not None:
        tokens = model.tokenizer(captions)
        found["text features"] = _difference(_normalized(readback.encode_text(tokens)), model.encode_text(tokens))
        if readback.tokenize is not None:
            counted = torch.arange(tokens.shape[1]) <= tokens.argmax(dim=1)[:, None]  # up to the EOT, the highest id
            found[TOKENS] = int(((readback.tokenize(captions) != tokens) & counted).any(dim=1).sum())
    if readback.logit_scale is not None:
        found["logit scale"] = abs(readback.logit_scale / logit_multiplier(model.model) - 1)
    if readback.preprocess is not None:
        levels = torch.tensor(preprocess_config(model.model)["std"])[:, None, None] * 255
        differences = [_difference(readback.preprocess(image) * levels, ours * levels)
                       for image, ours in zip(images, pixels, strict=True)]
        found[PIXELS] = float(torch.tensor(differences).max())  # unlike max(), NaN if any is
    return found


def check_differences(differences: Mapping[str, float], tolerance: float, library: str) -> None:
    """Check that an export is close enough to its model.

    Raises:
        ExportError: a difference above the tolerance, or NaN.
    """
    for name, value in differences.items():
        limit = LIMITS.get(name, tolerance)
        if not value <= limit:  # also true of NaN
            raise ExportError(f"{name}: {library} differs from the model by {value:.1e}, more than {limit:g}; nothing "
                              f"was written{'' if name in LIMITS else ' (--tolerance accepts more)'}")


def _normalized(features: Tensor) -> Tensor:
    return F.normalize(features.float().cpu(), dim=-1)


def _difference(theirs: Float[Tensor, "..."], ours: Float[Tensor, "..."]) -> float:
    return float((theirs - ours).abs().max()) if theirs.shape == ours.shape else float("nan")


def _noise_image(number: int, height: int, width: int) -> Image.Image:
    draw = partial(rng.generator(0, "export", number).integers, 0, 256, dtype=np.uint8)
    cells = draw((2 + 3 * number, 3 + 2 * number, 3))
    smooth = Image.fromarray(cells).resize((width, height), Image.Resampling.BICUBIC)
    return Image.blend(smooth, Image.fromarray(draw((height, width, 3))), 0.2)
