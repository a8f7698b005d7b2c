"""Handing a model to other tools, in their own formats: one format a file, one line each in `EXPORTS`.

A format says what it cannot represent, writes, and reads back with the library that it is for; `write_checked` compares
what came back with the model and keeps the folder only if the features are the same.
"""

from aclip.export import open_clip
from aclip.export.base import ExportFormat, Readback, Subject
from aclip.export.card import Training, model_card
from aclip.export.check import TOLERANCE, Parity, check_place, write_checked
from aclip.export.examples import Examples, made_examples, real_examples
from aclip.export.huggingface import HuggingFaceFormat
from aclip.export.onnx import OnnxFormat
from aclip.export.open_clip import OpenClipFormat
from aclip.export.safetensors import SafetensorsFormat
from aclip.export.torch_export import TorchExportFormat

EXPORTS: dict[str, ExportFormat] = {
    "open_clip": OpenClipFormat(),
    "huggingface": HuggingFaceFormat(),
    "onnx": OnnxFormat(),
    "safetensors": SafetensorsFormat(),
    "torch-export": TorchExportFormat(),
}
"""Formats by the name that `aclip export --to` takes."""

__all__ = [
    "EXPORTS",
    "TOLERANCE",
    "Examples",
    "ExportFormat",
    "Parity",
    "Readback",
    "Subject",
    "Training",
    "check_place",
    "made_examples",
    "model_card",
    "open_clip",
    "real_examples",
    "write_checked",
]
