"""Programs of `torch.export`: the towers as graphs with their weights, to run without this package or open_clip.

A `.pt2` file is for people who trust its author, as any file is that is loaded into torch as a program.
"""

import copy
import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from aclip.errors import ExportError
from aclip.exporters.base import ExportFormat, Readback, Subject
from aclip.exporters.tokenizer_files import is_bundled, write_foreign, write_tokenizer
from aclip.models import encode_image, encode_text

IMAGE, TEXT, CONFIG = "image.pt2", "text.pt2", "config.json"


class ImagePart(nn.Module):
    """Pixels (B, 3, h, w) to L2-normalised features (B, D): the image tower alone."""

    def __init__(self, subject: Subject) -> None:
        super().__init__()
        self.visual: nn.Module = subject.model.model.visual  # type: ignore[assignment]

    def forward(self, pixels: Float[Tensor, "B 3 h w"]) -> Float[Tensor, "B D"]:
        """Encode."""
        return F.normalize(encode_image(self.visual, pixels).features, dim=-1)


class TextPart(nn.Module):
    """Token ids (B, T) at full context to L2-normalised features (B, D): the model without its image tower."""

    def __init__(self, subject: Subject) -> None:
        super().__init__()
        self.model = copy.copy(subject.model.model)
        self.model._modules = {name: part for name, part in self.model._modules.items() if name != "visual"}

    def forward(self, tokens: Int[Tensor, "B T"]) -> Float[Tensor, "B D"]:
        """Encode."""
        return F.normalize(encode_text(self.model, tokens), dim=-1)


class TorchExportFormat(ExportFormat):
    """`image.pt2`, `text.pt2`, preprocessing as JSON, and the tokenizer's files."""

    about: ClassVar[str] = "programs of torch.export with any batch size, to run with torch alone"
    library: ClassVar[str] = "torch.export"

    def check_can_represent(self, subject: Subject) -> None:
        """Any tower that runs can be traced; what cannot shows when it is."""

    def write(self, subject: Subject, folder: Path) -> None:
        """Trace and write each tower."""
        for name, (program, _) in programs(subject).items():
            torch.export.save(program, folder / f"{name}.pt2")
        write_companions(subject, folder)

    def read(self, folder: Path, subject: Subject) -> Readback:
        """Load the programs."""
        image = torch.export.load(folder / IMAGE).module()
        text = torch.export.load(folder / TEXT).module() if subject.model.has_text else None
        return Readback(in_threes(image), None if text is None else in_threes(text),
                        logit_scale=json.loads((folder / CONFIG).read_text())["logit_scale"])

    def usage(self, subject: Subject) -> str:
        """See `ExportFormat`."""
        text = '''
text_encoder = torch.export.load("FOLDER/text.pt2").module()
text_features = text_encoder(tokens)             # (B, T) int64 -> (B, D), L2-normalised; tokenizer.json is beside it'''
        return '''\
import torch

image_encoder = torch.export.load("FOLDER/image.pt2").module()      # only files whose author you trust
image_features = image_encoder(pixels)           # (B, 3, h, w) -> (B, D), L2-normalised; see config.json''' + (
            text if subject.model.has_text else "")


def programs(subject: Subject) -> dict[str, tuple[torch.export.ExportedProgram, Tensor]]:
    """Return the towers as programs with a free batch size, "image" and "text", each with an input to try it on.

    Raises:
        ExportError: a tower that cannot be traced.
    """
    height, width = subject.image_size
    parts: dict[str, tuple[nn.Module, Tensor]] = {"image": (ImagePart(subject), torch.zeros(2, 3, height, width))}
    if subject.model.has_text:
        parts["text"] = (TextPart(subject), subject.model.tokenizer(["a cat", "two dogs"]))
    found = {}
    for name, (part, example) in parts.items():
        try:
            with quietly(), torch.no_grad():
                program = torch.export.export(
                    part.eval(), (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))
        except Exception as error:  # the exporter's own kinds are not public
            raise ExportError(f"torch.export cannot trace the {name} tower of {subject.name}: {error}") from error
        found[name] = (program, example)
    return found


def write_companions(subject: Subject, folder: Path) -> None:
    """Write what the programs do not hold: preprocessing, sizes, the logit scale and bias, the tokenizer."""
    config: dict[str, Any] = {"preprocess": subject.preprocess, "logit_scale": subject.logit_scale}
    if subject.logit_bias is not None:
        config["logit_bias"] = subject.logit_bias
    if subject.model.has_text:
        config |= {"context_length": subject.context_length}
        if is_bundled(subject.model.tokenizer):
            write_tokenizer(folder, subject.context_length)
        else:
            write_foreign(subject.model.tokenizer, folder)
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


@contextmanager
def quietly() -> Iterator[None]:
    """Hide what exporters say about themselves."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def in_threes(encode: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Return an encoder that takes three rows at a time: another number than was traced, to see that it is free."""
    return lambda batch: torch.cat([encode(part) for part in batch.split(3)])
