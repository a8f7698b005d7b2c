"""What an export format is; an export is written, read back with its own library, and kept only if features agree."""

import json
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from huggingface_hub import ModelCard, ModelCardData
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from aclip import rng
from aclip.errors import AclipError, ConfigError, ExportError, MissingDependencyError
from aclip.models import LoadedModel, logit_scale_of, preprocess_config

RECORD = "aclip_export.json"
CAPTIONS = (
    "a photo of a dog", "two people walk along a beach at sunset", "red apple", "A Drawing of a LIGHTHOUSE on a cliff",
    "it's 12 o'clock, isn't it?", "café 北京 – naïve façade 😀", "",  # noqa: RUF001
    "rock &amp; roll", "“curly quotes” and a cat’s paw", "a very long caption " * 30,  # noqa: RUF001
)
"""Hard cases for a tokenizer: case, accents, emoji, entities, quotes, the empty text, more than the context."""

PIXELS, TOKENS = "preprocessed pixels (of 255)", "captions tokenized differently"
LIMITS = {PIXELS: 2.0, TOKENS: float("inf")}
"""Limits other than the tolerance of features: libraries round pixels and clean texts differently."""


@dataclass(frozen=True)
class Readback:
    """An export as its own library loads it.

    Attributes:
        encode_image: (B, 3, h, w) preprocessed pixels -> (B, D) features, normalised or not.
        encode_text: (B, T) tokens at full context -> (B, D); None without a text tower.
        preprocess: image -> (3, h, w), where the format has its own preprocessing.
        tokenize: texts -> (B, T), where the format has its own tokenizer; ids after the first EOT are ignored.
        logit_scale: multiplier of similarities, where the format stores it.
    """

    encode_image: Callable[[Float[Tensor, "B 3 h w"]], Float[Tensor, "B D"]]
    encode_text: Callable[[Int[Tensor, "B T"]], Float[Tensor, "B D"]] | None = None
    preprocess: Callable[[Image.Image], Float[Tensor, "3 h w"]] | None = None
    tokenize: Callable[[list[str]], Int[Tensor, "B T"]] | None = None
    logit_scale: float | None = None


class Exporter(ABC):
    """One export format. Models are on the CPU, in fp32 and evaluation mode.

    Attributes:
        library: what reads the format, as messages and the model card name it.
    """

    library: ClassVar[str]

    def check_supported(self, model: LoadedModel) -> None:  # noqa: B027 - most formats take any model
        """Check that the format can represent a model, before anything is written.

        Raises:
            UnsupportedModelError: it cannot; the message names formats that can.
            MissingDependencyError: writing or reading needs a package that is not installed.
        """

    @abstractmethod
    def write(self, model: LoadedModel, config: Mapping[str, Any], folder: Path) -> None:
        """Write everything but the model card into an empty folder; `config` is open_clip's `model_cfg`, complete."""

    @abstractmethod
    def read(self, folder: Path, model: LoadedModel) -> Readback:
        """Load what was written, with the library it is for."""

    @abstractmethod
    def usage(self, model: LoadedModel) -> str:
        """Return Python code for the model card that loads the export from `FOLDER` and computes features."""


def synthetic_images(image_size: tuple[int, int]) -> list[Image.Image]:
    """Return RGB images for an input of (height, width) that are the same on every machine.

    They are coloured noise, smooth and sharp: one of twice the input's side, one much wider and one much taller
    than the input, with even margins to crop, and a small one that has to be enlarged.
    """
    height, width = image_size
    images = []
    for i, (h, w) in enumerate(((2 * height, 2 * width), (height, 3 * width), (3 * height, width),
                                (height // 2 + 1, width // 2 + 1))):
        draw = partial(rng.generator(0, "export", i).integers, 0, 256, dtype=np.uint8)
        smooth = Image.fromarray(draw((2 + 3 * i, 3 + 2 * i, 3))).resize((w, h), Image.Resampling.BICUBIC)
        images.append(Image.blend(smooth, Image.fromarray(draw((h, w, 3))), 0.2))
    return images


def write_checked(
    exporter: Exporter, model: LoadedModel, config: Mapping[str, Any], folder: Path, *,
    card: Callable[[dict[str, float]], str] = str, record: Mapping[str, Any] | None = None, tolerance: float = 1e-5,
    overwrite: bool = False,
) -> dict[str, float]:
    """Write an export to `folder` if its own library computes the model's features from it.

    Everything is written beside the folder first: on any error nothing is left, and an earlier export stays. `card`
    makes a model card of the differences; `record` has further entries of `aclip_export.json`. For the other arguments
    and errors see `Exporter.write` and `aclip.export`. Return the differences, see `compare`.
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
            (temporary / "README.md").write_text(card(differences), encoding="utf-8")
            write_json(temporary / RECORD, {**(record or {}), "library": exporter.library, "tolerance": tolerance,
                                            "differences": differences})
    except AclipError:
        raise
    except Exception as error:  # a full disk, a tower that cannot be traced, a file that cannot be loaded
        raise ExportError(f"the export to {folder} for {exporter.library} failed, so nothing was written: "
                          f"{type(error).__name__}: {error}") from error
    return differences


@torch.inference_mode()
def compare(readback: Readback, model: LoadedModel) -> dict[str, float]:
    """Return the largest difference of each thing that an export computes, by its name; NaN for another shape."""
    images, captions = synthetic_images(model.image_size), list(CAPTIONS)
    pixels = torch.stack([model.preprocess(image) for image in images])
    found = {"image features": _difference(_normalized(readback.encode_image(pixels)), model.encode_image(pixels))}
    if readback.encode_text is not None:
        tokens = model.tokenizer(captions)
        found["text features"] = _difference(_normalized(readback.encode_text(tokens)), model.encode_text(tokens))
        if readback.tokenize is not None:
            counted = torch.arange(tokens.shape[1]) <= tokens.argmax(dim=1)[:, None]  # up to the EOT, the highest id
            found[TOKENS] = int(((readback.tokenize(captions) != tokens) & counted).any(dim=1).sum())
    if readback.logit_scale is not None:
        found["logit scale"] = abs(readback.logit_scale / logit_scale_of(model.model).exp().item() - 1)
    if readback.preprocess is not None:
        levels = torch.tensor(preprocess_config(model.model)["std"])[:, None, None] * 255
        differences = [_difference(readback.preprocess(image) * levels, ours * levels)
                       for image, ours in zip(images, pixels, strict=True)]
        found[PIXELS] = float(np.max(differences))  # unlike max(), NaN if any is
    return found


def check_differences(differences: Mapping[str, float], tolerance: float, library: str) -> None:
    """Raise ExportError for a difference above the tolerance, or NaN."""
    for name, value in differences.items():
        limit = LIMITS.get(name, tolerance)
        if not value <= limit:  # also true of NaN
            raise ExportError(f"{name}: {library} differs from the model by {value:.1e}, more than {limit:g}; nothing "
                              f"was written{'' if name in LIMITS else ' (--tolerance accepts more)'}")


def model_card(
    exporter: Exporter, model: LoadedModel, name: str, differences: Mapping[str, float], weights: str,
    config: Mapping[str, Any] | None, evaluations: Iterable[Mapping[str, Any]],
) -> str:
    """Return the text of the card; `config` and `evaluations` are the files of a run, None and empty without one."""
    # of every set and evaluator the newest result on the exported weights, none of a later step
    newest: dict[tuple[Any, ...], Mapping[str, Any]] = {}
    for record in evaluations:
        if record.get("weights") == weights and (model.step is None or record.get("step", 0) <= model.step):
            newest[tuple(record.get(key) for key in ("set", "evaluator", "training_set"))] = record
    data = ModelCardData(
        library_name=exporter.library if exporter.library in ("open_clip", "transformers") else None,
        pipeline_tag="zero-shot-image-classification" if model.has_text else "image-feature-extraction",
        tags=["clip", "attentive-clip"])
    shown = {key: value for key, value in (config or {}).items() if key not in ("command", "dataflow")}
    return str(ModelCard.from_template(
        data, template_path=str(Path(__file__).with_name("card.md.j2")), exporter=exporter, model=model, name=name,
        differences=differences, weights=weights, config=config, evaluations=list(newest.values()),
        pixels=preprocess_config(model.model), config_json=json.dumps(shown, indent=2, ensure_ascii=False)))


def optional_package(name: str, extra: str) -> Any:
    """Import a package that an extra of this one installs, or raise MissingDependencyError."""
    try:
        return import_module(name)
    except ImportError as error:
        raise MissingDependencyError(
            f"this export needs the package {name}: pip install 'attentive-clip[{extra}]'") from error


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextmanager
def replace_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `folder` that replaces it on success; on an error `folder` stays as it was."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # of a process that was killed
    try:
        temporary.mkdir(parents=True)
        yield temporary
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _normalized(features: Tensor) -> Tensor:
    return F.normalize(features.float().cpu(), dim=-1)


def _difference(theirs: Float[Tensor, "..."], ours: Float[Tensor, "..."]) -> float:
    return float((theirs - ours).abs().max()) if theirs.shape == ours.shape else float("nan")
