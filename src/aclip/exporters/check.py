"""Writing an export that is kept only if it gives the model's own features."""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from torch import Tensor
from torch.nn import functional as F

from aclip.errors import AclipError, ConfigError, ExportError
from aclip.exporters.base import ExportFormat, Readback, Subject
from aclip.exporters.examples import Examples, made_examples

RECORD = "aclip_export.json"
CARD = "README.md"
TOLERANCE = 1e-5
"""Of an entry of a feature of length 1, fp32 on both sides."""

GREY_LEVELS = 2.0
"""By how much a preprocessed pixel may differ, of 255: libraries round after resizing."""


@dataclass(frozen=True)
class Parity:
    """How far an export is from its model.

    Attributes:
        image, text: largest difference of an entry of the L2-normalised features; None without text.
        logit_scale: relative difference of the multiplier, None where the format has none.
        pixels: largest difference of the format's own preprocessing in grey levels of 255, on made pictures; None
            where it brings none.
        captions: how many were tokenised. differing: those that the format's own tokenizer splits otherwise.
    """

    image: float
    text: float | None = None
    logit_scale: float | None = None
    pixels: float | None = None
    captions: int = 0
    differing: tuple[str, ...] = ()

    @property
    def largest(self) -> float:
        """The largest of the differences that the tolerance is for."""
        return max(value for value in (self.image, self.text, self.logit_scale) if value is not None)


def write_checked(
    export_format: ExportFormat, subject: Subject, folder: Path, examples: Examples, *,
    card: Callable[[Parity], str], tolerance: float = TOLERANCE, overwrite: bool = False,
) -> Parity:
    """Write an export to `folder`, if what its own library reads back gives the same features.

    Everything is written beside the folder first. On any error nothing is left, and what was there before stays.

    Args:
        export_format: one of `EXPORTS`. subject: the model.
        folder: must not exist, save as an earlier export where `overwrite` is set.
        examples: what the features are compared on.
        card: writes the model card, given what was found.
        tolerance: of an entry of a feature of length 1.
        overwrite: replace an earlier export.

    Raises:
        UnsupportedModelError: a model that the format cannot represent.
        MissingDependencyError: the format needs a package that is not installed.
        ConfigError: something is in the way.
        ExportError: the features differ, the library cannot load the export, or the folder cannot be written.
    """
    check_place(folder, overwrite=overwrite)
    export_format.check_can_represent(subject)
    with _beside(folder) as temporary:
        export_format.write(subject, temporary)
        with torch.inference_mode():
            parity = compare(_read(export_format, temporary, subject), subject, examples)
        refuse_difference(parity, tolerance, export_format.library)
        (temporary / CARD).write_text(card(parity), encoding="utf-8")
        (temporary / RECORD).write_text(json.dumps(
            {"library": export_format.library, "model": subject.name, "checked_on": examples.origin,
             "tolerance": tolerance, "parity": asdict(parity)}, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
    return parity


def check_place(folder: Path, *, overwrite: bool) -> None:
    """Check that an export can go to `folder`.

    Raises:
        ConfigError: something else is there, or an earlier export that was not to be overwritten.
    """
    if not folder.exists():
        return
    if not (folder / RECORD).is_file():
        if folder.is_dir() and not any(folder.iterdir()):
            return
        raise ConfigError(f"{folder} exists and is no earlier export: choose another --output")
    if not overwrite:
        raise ConfigError(f"{folder} holds an earlier export: replace it with --overwrite, or choose another --output")


def compare(readback: Readback, subject: Subject, examples: Examples) -> Parity:
    """Return how far what was read back is from the model."""
    model = subject.model
    pixels = torch.stack([model.preprocess(picture) for picture in examples.pictures])
    image = _difference(readback.encode_image(pixels), model.encode_image(pixels))
    text, scale = None, None
    differing: tuple[str, ...] = ()
    if readback.encode_text is not None:
        tokens = model.tokenizer(list(examples.captions))
        text = _difference(readback.encode_text(tokens), model.encode_text(tokens))
        if readback.tokenize is not None:
            differing = _differing(readback.tokenize(list(examples.captions)), tokens, examples.captions)
    if readback.logit_scale is not None and subject.logit_scale is not None:
        scale = abs(readback.logit_scale / subject.logit_scale - 1)
    return Parity(image, text, scale, _pixel_difference(readback, subject),
                  len(examples.captions) if readback.tokenize is not None else 0, differing)


def refuse_difference(parity: Parity, tolerance: float, library: str) -> None:
    """Check that an export is close enough.

    Raises:
        ExportError: it is not, or it is not a number.
    """
    for what, value in (("image features", parity.image), ("text features", parity.text),
                        ("the logit scale", parity.logit_scale)):
        if value is not None and not value <= tolerance:  # NaN is refused too
            raise ExportError(f"{what} by {library} differ from the model's by {value:.1e}, more than the tolerance of "
                              f"{tolerance:.0e}: nothing was written (--tolerance accepts more)")
    if parity.pixels is not None and not parity.pixels <= GREY_LEVELS:
        raise ExportError(f"the preprocessing by {library} differs from the model's by {parity.pixels:.1f} of 255 grey "
                          f"levels, more than {GREY_LEVELS:g}: nothing was written")


def _read(export_format: ExportFormat, folder: Path, subject: Subject) -> Readback:
    """Load an export with its own library; whatever that raises is one sentence."""
    try:
        return export_format.read(folder, subject)
    except (AclipError, OSError, SafetensorError):
        raise
    except Exception as error:  # each library has its own kinds
        raise ExportError(f"{export_format.library} cannot load what was written of {subject.name}, and nothing of it "
                          f"was kept: {' '.join(str(error).split()) or repr(error)}") from error


def _difference(theirs: Tensor, ours: Float[Tensor, "B D"]) -> float:
    """Return the largest difference of an entry, NaN if there is one; features of another shape are no number."""
    if theirs.shape != ours.shape:
        return float("nan")
    return float((F.normalize(theirs.float().cpu(), dim=-1) - ours).abs().max())


def _pixel_difference(readback: Readback, subject: Subject) -> float | None:
    """Return the largest difference of the preprocessing of made pictures, in grey levels."""
    if readback.preprocess is None:
        return None
    std = torch.tensor(subject.preprocess["std"])[:, None, None] * 255
    differences = []
    for picture in made_examples(subject.image_size).pictures:
        theirs, ours = readback.preprocess(picture), subject.model.preprocess(picture)
        differences.append(float(((theirs - ours) * std).abs().max()) if theirs.shape == ours.shape else float("nan"))
    return float(torch.tensor(differences).max())


def _differing(theirs: Tensor, ours: Tensor, captions: tuple[str, ...]) -> tuple[str, ...]:
    """Return the captions whose ids differ up to the first end of text, the highest id."""
    ends = ours.argmax(dim=1)
    counted = torch.arange(ours.shape[1]) <= ends[:, None]
    same = ((theirs == ours) | ~counted).all(dim=1)
    return tuple(caption for caption, equal in zip(captions, same.tolist(), strict=True) if not equal)


@contextmanager
def _beside(folder: Path) -> Iterator[Path]:
    """Make a folder beside another one; whatever happens, it is gone or renamed afterwards."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    made = [parent for parent in folder.parents if not parent.exists()]
    done = False
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        done = True
    except (OSError, SafetensorError) as error:
        raise ExportError(f"cannot write the export to {folder}: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if not done:
            for parent in made:
                if parent.exists() and not any(parent.iterdir()):
                    parent.rmdir()
