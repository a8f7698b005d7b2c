"""Export for ONNX Runtime: a graph of each tower with any batch size, text at full context."""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aclip.exporters.base import Exporter, Readback, missing_package
from aclip.exporters.torch_export import read_towers, trace, write_metadata
from aclip.models import LoadedModel
from aclip.models.text import text_tower_of

NAMES = {"image": ("pixels", "image_features"), "text": ("tokens", "text_features")}
"""Input and output of each graph."""

MAX_INLINE_BYTES = 1_800_000_000
"""Weights above this are written to a file of their own: protobuf limits a graph's file to 2 GB."""


class OnnxExporter(Exporter):
    """`image.onnx`, `text.onnx`, preprocessing and logit scale in `config.json`, and the tokenizer's files."""

    library = "ONNX Runtime"

    def check_supported(self, model: LoadedModel) -> None:
        """Check that ONNX can be written and read here; any model is supported."""
        try:
            import onnx
            import onnxruntime
            import onnxscript
        except ImportError as error:
            raise missing_package(error.name or "onnx", "onnx") from error
        del onnx, onnxruntime, onnxscript

    def write(self, model: LoadedModel, config: Mapping[str, Any], folder: Path) -> None:
        """Translate the traced towers."""
        logging.getLogger("onnxscript").setLevel(logging.ERROR)  # warns of every operation it cannot fold
        for name, program in trace(model).items():
            source, target = NAMES[name]
            size = sum(tensor.numel() * tensor.element_size() for tensor in program.state_dict.values())
            torch.onnx.export(program, (), str(folder / f"{name}.onnx"), dynamo=True, input_names=[source],
                              output_names=[target], external_data=size > MAX_INLINE_BYTES, verbose=False)
        write_metadata(model, folder)

    def read(self, folder: Path, model: LoadedModel) -> Readback:
        """Load in ONNX Runtime, on the CPU."""
        import onnxruntime

        def load(name: str) -> Callable[[Tensor], Tensor]:
            session = onnxruntime.InferenceSession(str(folder / f"{name}.onnx"), providers=["CPUExecutionProvider"])
            source, target = NAMES[name]
            return lambda batch: torch.from_numpy(session.run([target], {source: batch.numpy()})[0])

        return read_towers(load, folder, model)

    def usage(self, model: LoadedModel) -> str:
        """See `Exporter`."""
        text = '''
text_encoder = onnxruntime.InferenceSession("FOLDER/text.onnx")
tokenizer = transformers.AutoTokenizer.from_pretrained("FOLDER")       # or tokenizer.json in the tokenizers library
tokens = tokenizer(["a cat", "two dogs"], padding="max_length", truncation=True, max_length=CONTEXT,
                   return_tensors="np").input_ids
(text_features,) = text_encoder.run(None, {"tokens": tokens})        # (B, D), L2-normalised'''
        image = '''\
import onnxruntime, transformers

image_encoder = onnxruntime.InferenceSession("FOLDER/image.onnx")
(image_features,) = image_encoder.run(None, {"pixels": pixels})        # (B, 3, h, w) float32, see config.json'''
        if not model.has_text:
            return image.replace(", transformers", "")
        return image + text.replace("CONTEXT", str(text_tower_of(model.model).context_length))
