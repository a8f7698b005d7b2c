"""Writing a model as open_clip reads it: `open_clip.create_model_and_transforms("local-dir:FOLDER")`."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn

from aclip.towers.sources import CONFIG_NAME, WEIGHTS_NAME


def save(
    model: nn.Module, model_config: Mapping[str, Any], preprocess_config: Mapping[str, Any], folder: Path
) -> None:
    """Write weights (fp32), architecture and preprocessing to `folder`, replacing it as a whole.

    Args:
        model: the open_clip model; its state dict is native already.
        model_config: open_clip's `model_cfg`, complete, so that loading needs no registered name.
        preprocess_config: open_clip's `preprocess_cfg`: mean, std, interpolation, resize_mode.
    """
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    config = {"model_cfg": dict(model_config), "preprocess_cfg": dict(preprocess_config)}
    (temporary / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n")
    tensors = {k: v.detach().float().cpu().contiguous().clone() for k, v in model.state_dict().items()}
    save_file(tensors, temporary / WEIGHTS_NAME)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
