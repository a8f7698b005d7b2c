"""Export for torch alone: each tower as a `torch.export` program with its weights and any batch size.

A `.pt2` file is a program: like any file that torch loads as code, only load one whose author you trust.
"""

import copy
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from aclip.exporters.base import Exporter, Readback, logit_multiplier
from aclip.exporters.huggingface import is_clip_tokenizer, save_pretrained, write_tokenizer
from aclip.models import LoadedModel, encode_image, encode_text, preprocess_config
from aclip.models.text import text_tower_of

METADATA = "config.json"


class Encoder(nn.Module):
    """A tower and the function that encodes with it, returning L2-normalised features (B, D)."""

    def __init__(self, tower: nn.Module, encode: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.tower, self.encode = tower, encode

    def forward(self, inputs: Tensor) -> Tensor:
        """Encode pixels (B, 3, h, w) or token ids (B, T) at full context."""
        return F.normalize(self.encode(self.tower, inputs), dim=-1)


class TorchExporter(Exporter):
    """`image.pt2`, `text.pt2`, preprocessing and logit scale in `config.json`, and the tokenizer's files."""

    library = "torch.export"

    def write(self, model: LoadedModel, config: Mapping[str, Any], folder: Path) -> None:
        """Trace and write each tower."""
        for name, program in trace(model).items():
            torch.export.save(program, folder / f"{name}.pt2")
        write_metadata(model, folder)

    def read(self, folder: Path, model: LoadedModel) -> Readback:
        """Load the programs."""
        return read_towers(lambda name: torch.export.load(folder / f"{name}.pt2").module(), folder, model)

    def usage(self, model: LoadedModel) -> str:
        """See `Exporter`."""
        text = '''
text_encoder = torch.export.load("FOLDER/text.pt2").module()
text_features = text_encoder(tokens)             # (B, T) int64 -> (B, D), L2-normalised; see tokenizer.json'''
        return '''\
import torch

image_encoder = torch.export.load("FOLDER/image.pt2").module()      # runs code: load only files that you trust
image_features = image_encoder(pixels)           # (B, 3, h, w) -> (B, D), L2-normalised; see config.json''' + (
            text if model.has_text else "")


def trace(model: LoadedModel) -> dict[str, torch.export.ExportedProgram]:
    """Return each tower, "image" and "text", as a program with a dynamic batch size."""
    clip: Any = model.model
    inputs: dict[str, tuple[nn.Module, Tensor]] = {"image": (
        Encoder(clip.visual, lambda visual, pixels: encode_image(visual, pixels).features),
        torch.zeros(2, 3, *model.image_size))}
    if model.has_text:
        without_image_tower = copy.copy(clip)
        without_image_tower._modules = {name: part for name, part in clip._modules.items() if name != "visual"}
        inputs["text"] = Encoder(without_image_tower, encode_text), model.tokenizer(["a cat", "two dogs"])
    programs = {}
    for name, (encoder, example) in inputs.items():
        with torch.no_grad():
            programs[name] = torch.export.export(
                encoder.eval(), (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    return programs


def write_metadata(model: LoadedModel, folder: Path) -> None:
    """Write what the programs lack: preprocessing, context length, logit scale and bias, and the tokenizer."""
    metadata: dict[str, Any] = {"preprocess": preprocess_config(model.model)}
    if model.has_text:
        bias: Tensor | None = getattr(model.model, "logit_bias", None)
        metadata |= {"context_length": text_tower_of(model.model).context_length,
                     "logit_scale": logit_multiplier(model.model), "logit_bias": 0.0 if bias is None else bias.item()}
        if is_clip_tokenizer(model.tokenizer):
            write_tokenizer(folder, metadata["context_length"])
        else:
            save_pretrained(model.tokenizer, folder)
    (folder / METADATA).write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")


def read_towers(load: Callable[[str], Callable[[Tensor], Tensor]], folder: Path, model: LoadedModel) -> Readback:
    """Return the towers that `load` reads, taking three rows at a time: not the traced two, to check that they can."""
    def by_threes(encode: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda batch: torch.cat([encode(rows) for rows in batch.split(3)])

    metadata = json.loads((folder / METADATA).read_text(encoding="utf-8"))
    return Readback(by_threes(load("image")), by_threes(load("text")) if model.has_text else None,
                    logit_scale=metadata.get("logit_scale"))
