"""ONNX graphs of both towers, for ONNX Runtime and whatever else reads them, any batch size, text at full context."""

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from aclip.errors import ExportError
from aclip.exporters.base import ExportFormat, Readback, Subject, missing
from aclip.exporters.tokenizer_files import is_bundled
from aclip.exporters.torch_export import CONFIG, in_threes, programs, quietly, write_companions

NAMES = {"image": ("pixels", "image_features"), "text": ("tokens", "text_features")}
"""Input and output of each graph."""

TOKENIZERS = '''\
tokenizer = tokenizers.Tokenizer.from_file("FOLDER/tokenizer.json")
tokenizer.enable_truncation(CONTEXT)
tokenizer.enable_padding(length=CONTEXT)
tokens = numpy.array([encoding.ids for encoding in tokenizer.encode_batch(["a cat", "two dogs"])])'''
"""Text to tokens with CLIP's own words, without transformers."""

TRANSFORMERS = '''\
tokenizer = transformers.AutoTokenizer.from_pretrained("FOLDER")
tokens = tokenizer(["a cat", "two dogs"], max_length=CONTEXT, padding="max_length", truncation=True,
                   return_tensors="np").input_ids'''
"""Likewise with words of the model's own."""

LARGEST = 1_800_000_000
"""Bytes of weights above which they go to a file of their own: a graph's file must stay below 2 GB."""


class OnnxFormat(ExportFormat):
    """`image.onnx`, `text.onnx`, preprocessing as JSON, and the tokenizer's files."""

    about: ClassVar[str] = "graphs for ONNX Runtime with any batch size, one a tower"
    library: ClassVar[str] = "ONNX Runtime"

    def check_can_represent(self, subject: Subject) -> None:
        """Any tower that runs can be traced; what cannot shows when it is."""
        _runtime()
        try:
            import onnx
            import onnxscript
        except ImportError as error:
            raise missing("onnxscript", "onnx", "writing ONNX") from error
        del onnx, onnxscript

    def write(self, subject: Subject, folder: Path) -> None:
        """Translate the traced towers."""
        for name, (program, _) in programs(subject).items():
            source, target = NAMES[name]
            size = sum(t.numel() * t.element_size() for t in program.state_dict.values())
            try:
                with _silent_exporter():
                    torch.onnx.export(
                        program, (), str(folder / f"{name}.onnx"), dynamo=True, input_names=[source],
                        output_names=[target], external_data=size > LARGEST, verbose=False)
            except OSError:
                raise
            except Exception as error:  # the exporter's own kinds are not public
                raise ExportError(f"the {name} tower of {subject.name} cannot be written as ONNX: {error}; "
                                  "use --to torch-export") from error
        write_companions(subject, folder)

    def read(self, folder: Path, subject: Subject) -> Readback:
        """Load in ONNX Runtime, on the CPU."""
        image = _session(folder, "image")
        text = _session(folder, "text") if subject.model.has_text else None
        return Readback(image, text, logit_scale=json.loads((folder / CONFIG).read_text())["logit_scale"])

    def usage(self, subject: Subject) -> str:
        """See `ExportFormat`."""
        bundled = is_bundled(subject.model.tokenizer)
        image = f'''\
import numpy, onnxruntime, {"tokenizers" if bundled else "transformers"}

image_encoder = onnxruntime.InferenceSession("FOLDER/image.onnx")
(image_features,) = image_encoder.run(None, {{"pixels": pixels}})      # (B, 3, h, w) float32, see config.json'''
        if not subject.model.has_text:
            return image
        words = (TOKENIZERS if bundled else TRANSFORMERS).replace("CONTEXT", str(subject.context_length))
        return f'''{image}
text_encoder = onnxruntime.InferenceSession("FOLDER/text.onnx")
{words}
(text_features,) = text_encoder.run(None, {{"tokens": tokens}})        # (B, D), L2-normalised'''


def _session(folder: Path, name: str) -> Callable[[Tensor], Tensor]:
    """Return what runs a graph on a tensor."""
    session = _runtime().InferenceSession(str(folder / f"{name}.onnx"), providers=["CPUExecutionProvider"])
    source, target = NAMES[name]
    return in_threes(lambda batch: torch.from_numpy(session.run([target], {source: batch.numpy()})[0]))


def _runtime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise missing("onnxruntime", "onnx", "checking an ONNX export") from error
    return onnxruntime


@contextmanager
def _silent_exporter() -> Iterator[None]:
    """Hide the exporter's warnings and log lines."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with quietly():
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
