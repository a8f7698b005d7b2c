"""A model with random weights on the disk."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from aclip import models


def save_model(folder: Path, seed: int) -> Path:
    """Save a vit-micro whose features of noise differ from image to image."""
    torch.manual_seed(seed)
    built = models.create_model("vit-micro")
    for parameter in built.visual.parameters():
        if parameter.ndim > 1:
            parameter.data.mul_(3.0)
    folder.mkdir()
    save_file(built.state_dict(), folder / "open_clip_model.safetensors")
    config = {"model_cfg": models.model_config("vit-micro"), "preprocess_cfg": {}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    return folder
