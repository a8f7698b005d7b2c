"""Weights alone: one safetensors file with open_clip's names, and the architecture beside it."""

import json
from copy import deepcopy
from pathlib import Path
from typing import ClassVar

from safetensors.torch import load_file, save_file
from torch import Tensor

from aclip.errors import ExportError
from aclip.exporters.base import ExportFormat, Readback, Subject, fp32_tensors, multiplier

WEIGHTS = "model.safetensors"
CONFIG = "config.json"


class SafetensorsFormat(ExportFormat):
    """`model.safetensors`, readable from any language, and `config.json` with architecture and preprocessing."""

    about: ClassVar[str] = "the weights in one safetensors file, with the architecture and preprocessing as JSON"
    library: ClassVar[str] = "safetensors"

    def check_can_represent(self, subject: Subject) -> None:
        """Any model has weights."""

    def write(self, subject: Subject, folder: Path) -> None:
        """Write both files."""
        save_file(fp32_tensors(subject.model.model), folder / WEIGHTS, metadata={"format": "pt"})
        config = {"model_cfg": dict(subject.config), "preprocess_cfg": subject.preprocess,
                  "image_only": not subject.model.has_text}
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")

    def read(self, folder: Path, subject: Subject) -> Readback:
        """Load the file into a copy of the model whose own weights were zeroed first."""
        model = deepcopy(subject.model)
        for tensor in model.model.state_dict().values():
            tensor.zero_()
        try:
            model.model.load_state_dict(load_file(folder / WEIGHTS))
        except RuntimeError as error:
            raise ExportError(f"{folder / WEIGHTS} does not hold this model: {error}") from error
        def encode_image(pixels: Tensor) -> Tensor:
            return model.encode_image(pixels, normalize=False)

        def encode_text(tokens: Tensor) -> Tensor:
            return model.encode_text(tokens, normalize=False)

        if not model.has_text:
            return Readback(encode_image)
        return Readback(encode_image, encode_text, logit_scale=multiplier(model.model))

    def usage(self, subject: Subject) -> str:
        """See `ExportFormat`."""
        return '''\
import json
from pathlib import Path
from safetensors.torch import load_file

weights = load_file("FOLDER/model.safetensors")          # open_clip's names: visual.*, transformer.*, ...
config = json.loads(Path("FOLDER/config.json").read_text())          # open_clip's model_cfg and preprocess_cfg'''
