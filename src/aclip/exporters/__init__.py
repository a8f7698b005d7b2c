"""Handing a model to other tools, in their own formats: one format a file, one line each in `EXPORTS`.

A format says what it cannot represent, writes, and reads back with the library that it is for; `write_checked` compares
what came back with the model and keeps the folder only if the features are the same.
"""

from aclip.exporters import open_clip
from aclip.exporters.base import ExportFormat, Readback, Subject
from aclip.exporters.card import Training, model_card
from aclip.exporters.check import TOLERANCE, Parity, check_place, write_checked
from aclip.exporters.examples import Examples, made_examples, real_examples
from aclip.exporters.huggingface import HuggingFaceFormat
from aclip.exporters.onnx import OnnxFormat
from aclip.exporters.open_clip import OpenClipFormat
from aclip.exporters.safetensors import SafetensorsFormat
from aclip.exporters.torch_export import TorchExportFormat

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
