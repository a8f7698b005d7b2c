"""Weight files: read without running what is in them, and compared with the model before anything is loaded."""

import argparse
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from open_clip.convert import convert_state_dict, load_big_vision_weights
from open_clip.model import convert_to_custom_text_state_dict, resize_text_pos_embed
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from aclip.errors import CheckpointError
from aclip.models.vision import vit_of
from aclip.tensor_files import StoredTensors

RUN_PREFIX = "method/model."
"""What a run's checkpoint puts before the model's own names."""

# What training scripts save beside their tensors; none of these can do anything when it is made.
_HARMLESS: list[Any] = [argparse.Namespace, np.dtype, type(np.dtype(np.float64)), type(np.dtype(np.float32)),
                        type(np.dtype(np.int64)), (np.float64(0).__reduce__()[0], "numpy.core.multiarray.scalar"),
                        np.float64(0).__reduce__()[0]]


def read_state(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a weight file, or of a run's checkpoint folder, by name; no code of the file is run.

    Safetensors (of a checkpoint, its model alone) or torch's format, told apart by their first bytes. Taken off are
    `{"state_dict": ...}`, and the `module.` and `_orig_mod.` that wrappers put before every name.

    Raises:
        CheckpointError: missing, empty, cut off, of another kind, or with code in it.
    """
    state = _read_folder(path) if path.is_dir() else _read_file(path)
    for wrapper in ("module.", "_orig_mod.", RUN_PREFIX):
        if wrapper == RUN_PREFIX and any(name.startswith(wrapper) for name in state):
            state = {name: tensor for name, tensor in state.items() if name.startswith(wrapper)}
        if state and all(name.startswith(wrapper) for name in state):
            state = {name.removeprefix(wrapper): tensor for name, tensor in state.items()}
    if not state:
        raise CheckpointError(f"the weights {path} are empty: no tensor is in the file")
    return state


def load_state(model: nn.Module, state: Mapping[str, Tensor], path: Path) -> bool:
    """Load a state in open_clip's names into a model; return whether it held an image tower alone.

    Of a model of another image size the positions are interpolated; an image tower alone leaves projection and text
    as they are.

    Args:
        model: an open_clip model.
        state: name -> tensor, of any floating type.
        path: where it came from, for what is said about it.

    Raises:
        CheckpointError: tensors that are missing, unknown, or of another shape: another model's.
    """
    state = _adapted(model, dict(convert_state_dict(model, dict(state))))
    image_only = all(name.startswith("visual.") for name in state)
    own = model.state_dict()
    missing = [name for name in own if name not in state]
    if image_only:
        missing = [name for name in missing if name.startswith("visual.") and not _is_projection(name)]
    unknown = [name for name in state if name not in own]
    other = [f"{name} is {_by(state[name])} in the file and {_by(own[name])} in the model"
             for name in own if name in state and state[name].shape != own[name].shape]
    wrong = [_count(names, what) for names, what in
             ((missing, "missing"), (unknown, "unknown"), (other, "of another shape")) if names]
    if wrong:
        raise CheckpointError(f"the weights {path} cannot be loaded into this model, whose tensors are others: "
                              f"{'; '.join(wrong)}")
    model.load_state_dict(state, strict=False)
    return image_only


def load_numpy(model: nn.Module, path: Path) -> None:
    """Load the weights that big_vision writes (`.npz`, SigLIP's original release).

    Raises:
        CheckpointError: damaged, or of another model.
    """
    try:
        load_big_vision_weights(model, str(path))
    except Exception as error:  # whatever numpy and open_clip meet in a damaged or foreign file
        raise CheckpointError(f"the weights {path} cannot be loaded into this model: {error!r}") from error


def _read_folder(path: Path) -> dict[str, Tensor]:
    """Return the model of a run's checkpoint, which may lie in several files."""
    try:
        stored = StoredTensors.of_folder(path)
        return {name: stored[name] for name in stored if name.startswith(RUN_PREFIX)}
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise CheckpointError(f"the checkpoint {path} is damaged: {error}") from error


def _read_file(path: Path) -> dict[str, Tensor]:
    """Return what a weight file holds, as it is."""
    if not path.is_file():
        raise CheckpointError(f"there is no weight file {path}")
    with path.open("rb") as file:
        head = file.read(16)
    if not head:
        raise CheckpointError(f"the weights {path} are damaged: the file is empty")
    return _read_safetensors(path) if head[8:9] == b"{" else _read_torch(path, head)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"the weights {path} are damaged: {error}") from error


def _read_torch(path: Path, head: bytes) -> dict[str, Tensor]:
    if not head.startswith((b"PK", b"\x80")):
        raise CheckpointError(f"{path} is no weight file: it is neither safetensors nor in torch's format")
    if head.startswith(b"PK") and _is_program(path):
        raise CheckpointError(f"the weights {path} are a TorchScript program, which is not run here: save its state "
                              "dict instead, or use one of the model's pretrained tags")
    try:
        with torch.serialization.safe_globals(_HARMLESS), path.open("rb") as file:
            if path.suffix == ".safetensors":  # of a path, torch goes by the suffix
                found = torch.load(file, map_location="cpu", weights_only=True)
            else:  # mapped: optimizer states beside the weights are never read
                found = torch.load(path, map_location="cpu", weights_only=True, mmap=head.startswith(b"PK"))
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        what = f"it would call {named.group(1)}" if named else "it is cut off, or has code in it"
        raise CheckpointError(f"the weights {path} hold more than tensors ({what}), and nothing of it was run: save a "
                              "plain state dict") from error
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, IndexError, AttributeError, TypeError) as error:
        raise CheckpointError(f"the weights {path} are damaged: {str(error).splitlines()[0]}") from error
    for key in ("state_dict", "model"):
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
    if not isinstance(found, Mapping) or not all(
            isinstance(k, str) and isinstance(v, Tensor) and v.layout is torch.strided and not v.is_meta
            for k, v in found.items()):
        raise CheckpointError(f"the weights {path} hold no state dict: expected names with a dense tensor each, or "
                              "such a table under 'state_dict'")
    return dict(found)


def _is_program(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except (OSError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"the weights {path} are damaged: the file is cut off ({error})") from error


def _adapted(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Bring what differs harmlessly between files of one architecture into the model's form."""
    own = model.state_dict()
    if "positional_embedding" in state and "positional_embedding" not in own:
        state = convert_to_custom_text_state_dict(state)
    for name in ("logit_scale", "logit_bias"):  # a scalar, or a vector of one
        if name in state and name in own and state[name].numel() == own[name].numel():
            state[name] = state[name].reshape(own[name].shape)
    if "logit_bias" in own and "logit_scale" in state:  # a CLIP model to be trained as a SigLIP one
        state.setdefault("logit_bias", torch.zeros_like(own["logit_bias"]))
    state.pop("text.transformer.embeddings.position_ids", None)
    for name in ("positional_embedding", "text.positional_embedding"):
        if name in state and name in own and len(state[name]) and state[name].shape[1:] == own[name].shape[1:]:
            resize_text_pos_embed(state, model)  # another context length
    _resize_positions(model, state)
    return state


def _resize_positions(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Interpolate the image positions of a square grid to the model's."""
    vit = vit_of(model.visual)  # type: ignore[arg-type]
    for name in ("visual.positional_embedding", "visual.trunk.pos_embed"):
        own, given = model.state_dict().get(name), state.get(name)
        if own is None or given is None or own.shape == given.shape or own.ndim != given.ndim:
            continue
        rows, prefix = given.flatten(0, -2), own.shape[-2] - vit.grid_size[0] * vit.grid_size[1]
        side = round(max(0, len(rows) - prefix) ** 0.5)
        if own.shape[-1] != given.shape[-1] or side == 0 or side**2 + prefix != len(rows):
            continue
        picture = rows[prefix:].unflatten(0, (side, side)).permute(2, 0, 1)[None].float()
        new = F.interpolate(picture, vit.grid_size, mode="bicubic", antialias=True, align_corners=False)[0]
        state[name] = torch.cat([rows[:prefix], new.flatten(1).T.to(rows.dtype)]).view(own.shape)


def _is_projection(name: str) -> bool:
    return name.startswith(("visual.proj", "visual.head.", "visual.trunk.head."))


def _by(tensor: Tensor) -> str:
    return " x ".join(map(str, tensor.shape)) or "a scalar"


def _count(names: list[str], what: str, most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{len(names)} {what} ({', '.join(names[:most])}{more})"
