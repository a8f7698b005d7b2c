"""Export each tower as a program with its weights and any batch size: for ONNX Runtime, or for torch alone.

A `.pt2` file is code: only load one whose author you trust.
"""

import copy
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from aclip.exporters.base import Exporter, Readback, optional_package, write_json
from aclip.exporters.huggingface import is_clip_tokenizer, save_pretrained, write_tokenizer
from aclip.models import LoadedModel, encode_image, encode_text, logit_scale_of, preprocess_config
from aclip.models.text import text_tower_of


class TorchExporter(Exporter):
    """`image.pt2`, `text.pt2`, preprocessing and logit scale in `config.json`, and the tokenizer's files."""

    library = "torch.export"

    def write(self, model: LoadedModel, config: Mapping[str, Any], folder: Path) -> None:
        for name, program in trace(model).items():
            torch.export.save(program, folder / f"{name}.pt2")
        write_metadata(model, folder)

    def read(self, folder: Path, model: LoadedModel) -> Readback:
        return _readback(lambda name: torch.export.load(folder / f"{name}.pt2").module(), folder, model)

    def usage(self, model: LoadedModel) -> str:
        text = '''
text_encoder = torch.export.load("FOLDER/text.pt2").module()
text_features = text_encoder(tokens)             # (B, T) int64 -> (B, D), L2-normalised; see tokenizer.json'''
        return '''\
import torch

image_encoder = torch.export.load("FOLDER/image.pt2").module()      # runs code: load only files that you trust
image_features = image_encoder(pixels)           # (B, 3, h, w) -> (B, D), L2-normalised; see config.json''' + (
            text if model.has_text else "")


class OnnxExporter(Exporter):
    """`image.onnx`, `text.onnx`, preprocessing and logit scale in `config.json`, and the tokenizer's files."""

    library = "ONNX Runtime"

    def check_supported(self, model: LoadedModel) -> None:
        for package in ("onnx", "onnxruntime", "onnxscript"):
            optional_package(package, "onnx")

    def write(self, model: LoadedModel, config: Mapping[str, Any], folder: Path) -> None:
        logging.getLogger("onnxscript").setLevel(logging.ERROR)  # warns of every operation it cannot fold
        for name, program in trace(model).items():
            size = sum(tensor.numel() * tensor.element_size() for tensor in program.state_dict.values())
            torch.onnx.export(program, (), str(folder / f"{name}.onnx"), dynamo=True, verbose=False,
                              input_names=["pixels" if name == "image" else "tokens"],
                              output_names=[f"{name}_features"],
                              external_data=size > 1.8e9)  # protobuf limits a graph's file to 2 GB
        write_metadata(model, folder)

    def read(self, folder: Path, model: LoadedModel) -> Readback:
        def load(name: str) -> Callable[[Tensor], Tensor]:
            session = optional_package("onnxruntime", "onnx").InferenceSession(
                str(folder / f"{name}.onnx"), providers=["CPUExecutionProvider"])
            source = session.get_inputs()[0].name
            return lambda batch: torch.from_numpy(session.run(None, {source: batch.numpy()})[0])

        return _readback(load, folder, model)

    def usage(self, model: LoadedModel) -> str:
        image = '''\
import onnxruntime, transformers

image_encoder = onnxruntime.InferenceSession("FOLDER/image.onnx")
(image_features,) = image_encoder.run(None, {"pixels": pixels})        # (B, 3, h, w) float32, see config.json'''
        if not model.has_text:
            return image.replace(", transformers", "")
        return image + '''
text_encoder = onnxruntime.InferenceSession("FOLDER/text.onnx")
tokenizer = transformers.AutoTokenizer.from_pretrained("FOLDER")       # or tokenizer.json in the tokenizers library
tokens = tokenizer(["a cat", "two dogs"], padding="max_length", truncation=True, max_length=CONTEXT,
                   return_tensors="np").input_ids
(text_features,) = text_encoder.run(None, {"tokens": tokens})        # (B, D), L2-normalised'''.replace(
            "CONTEXT", str(text_tower_of(model.model).context_length))


class _Encoder(nn.Module):
    def __init__(self, tower: nn.Module, encode: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.tower, self.encode = tower, encode

    def forward(self, inputs: Tensor) -> Tensor:
        return F.normalize(self.encode(self.tower, inputs), dim=-1)


@torch.no_grad()
def trace(model: LoadedModel) -> dict[str, torch.export.ExportedProgram]:
    """Return each tower, "image" and "text", as a program with a dynamic batch size.

    It maps pixels (B, 3, h, w), or token ids (B, T) at full context, to L2-normalised features (B, D).
    """
    clip: Any = model.model
    inputs = {"image": (_Encoder(clip.visual, lambda visual, pixels: encode_image(visual, pixels).features),
                        torch.zeros(2, 3, *model.image_size))}
    if model.has_text:
        without_image_tower = copy.copy(clip)
        without_image_tower._modules = {name: part for name, part in clip._modules.items() if name != "visual"}
        inputs["text"] = _Encoder(without_image_tower, encode_text), model.tokenizer(["a cat", "two dogs"])
    return {name: torch.export.export(encoder.eval(), (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))
            for name, (encoder, example) in inputs.items()}


def write_metadata(model: LoadedModel, folder: Path) -> None:
    """Write what the programs lack: preprocessing, context length, logit scale and bias, and the tokenizer."""
    metadata: dict[str, Any] = {"preprocess": preprocess_config(model.model)}
    if model.has_text:
        bias: Tensor | None = getattr(model.model, "logit_bias", None)
        metadata |= {"context_length": text_tower_of(model.model).context_length,
                     "logit_scale": logit_scale_of(model.model).exp().item(),
                     "logit_bias": 0.0 if bias is None else bias.item()}
        if is_clip_tokenizer(model.tokenizer):
            write_tokenizer(folder, metadata["context_length"])
        else:
            save_pretrained(model.tokenizer, folder)
    write_json(folder / "config.json", metadata)


def _readback(load: Callable[[str], Callable[[Tensor], Tensor]], folder: Path, model: LoadedModel) -> Readback:
    def by_threes(encode: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        # not the traced two rows at a time, to check that any number is taken
        return lambda batch: torch.cat([encode(rows) for rows in batch.split(3)])

    metadata = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return Readback(by_threes(load("image")), by_threes(load("text")) if model.has_text else None,
                    logit_scale=metadata.get("logit_scale"))
