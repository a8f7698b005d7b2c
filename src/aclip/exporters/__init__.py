"""Export models for other libraries, each export checked against the model's own features.

One format a module. An exporter writes, and reads back with the library that the format is for; `write_checked`
compares what came back with the model and keeps the folder only if the features agree.

Everything is imported on first use, so that the command line starts without torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aclip.exporters import open_clip
    from aclip.exporters.base import Exporter, Readback
    from aclip.exporters.check import synthetic_examples, write_checked

EXPORTERS: "dict[str, Exporter]"
"""Formats by the name that `export(to=...)` takes; `EXPORTERS["mine"] = MyExporter()` adds one."""

__all__ = ["EXPORTERS", "Exporter", "Readback", "export", "open_clip", "synthetic_examples",
           "write_checked"]

_HOMES = {"export": "command", "Exporter": "base", "Readback": "base", "synthetic_examples": "check",
          "write_checked": "check"}


def __getattr__(name: str) -> Any:
    if name == "EXPORTERS":
        return globals().setdefault(name, _builtin_exporters())
    if name == "open_clip":
        return importlib.import_module("aclip.exporters.open_clip")
    if name in _HOMES:
        return getattr(importlib.import_module(f"aclip.exporters.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'aclip.exporters' has no attribute '{name}'")


def _builtin_exporters() -> "dict[str, Exporter]":
    from aclip.exporters.huggingface import HuggingFaceExporter
    from aclip.exporters.onnx import OnnxExporter
    from aclip.exporters.open_clip import OpenClipExporter
    from aclip.exporters.torch_export import TorchExporter

    return {"open_clip": OpenClipExporter(), "huggingface": HuggingFaceExporter(), "onnx": OnnxExporter(),
            "torch-export": TorchExporter()}
