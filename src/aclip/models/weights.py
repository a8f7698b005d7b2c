"""Weight files: read without running code in them, checked against the model before anything is loaded."""

import argparse
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from open_clip.model import convert_to_custom_text_state_dict, resize_text_pos_embed
from safetensors.torch import load_file
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from aclip.errors import CheckpointError, UnsupportedModelError
from aclip.models.vision import visual_of, vit_of

# What training scripts save beside their tensors; constructing these has no side effects.
_HARMLESS: list[Any] = [argparse.Namespace, np.dtype, type(np.dtype(np.float64)), type(np.dtype(np.float32)),
                        type(np.dtype(np.int64)), (np.float64(0).__reduce__()[0], "numpy.core.multiarray.scalar"),
                        np.float64(0).__reduce__()[0]]


def read_weights(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a weight file by name, in safetensors' or torch's format; no code in the file is run.

    Unwraps `{"state_dict": ...}` and `{"model": ...}`, and the `module.` and `_orig_mod.` that wrappers prepend.

    Anything else is a CheckpointError.
    """
    try:
        with path.open("rb") as file:
            head = file.read(16)
        if head[8:9] == b"{":
            found: Any = load_file(path)
        else:
            with torch.serialization.safe_globals(_HARMLESS):  # mapped: optimizer states in the file are never read
                found = torch.load(path, map_location="cpu", weights_only=True, mmap=head.startswith(b"PK"))
    except Exception as error:  # whatever the readers meet in a damaged file, or one with code in it
        code = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it would call {code[1]}" if code else (str(error) or repr(error)).splitlines()[0]
        raise CheckpointError(f"the weights {path} are damaged or hold more than tensors, and no code in them was run "
                              f"({reason}): save a plain state dict") from error
    for key in ("state_dict", "model"):
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
    if not isinstance(found, Mapping) or not found or not all(isinstance(tensor, Tensor) for tensor in found.values()):
        raise CheckpointError(f"the weights {path} hold no state dict, nor one under 'state_dict' or 'model'")
    state: dict[str, Tensor] = dict(found)
    for wrapper in ("module.", "_orig_mod."):
        if all(name.startswith(wrapper) for name in state):
            state = {name.removeprefix(wrapper): tensor for name, tensor in state.items()}
    return state


def load_weights(model: nn.Module, state: Mapping[str, Tensor], path: str | Path) -> bool:
    """Load a state dict in open_clip's names into a model; return whether it holds an image tower alone.

    Positions of another image size or context length are interpolated. An image tower alone leaves projection and
    text as they are. Tensors that are missing, unknown, or of another shape are a CheckpointError.
    """
    state = _adapted(model, dict(state))
    image_only = all(name.startswith("visual.") for name in state)
    try:
        found = model.load_state_dict(state, strict=False)
    except RuntimeError as error:  # other shapes, one a line
        raise CheckpointError(f"the weights {path} are not of this model: {str(error).splitlines()[1].strip()}"
                              ) from error
    missing = [name for name in found.missing_keys if not image_only or (
        name.startswith("visual.") and not name.startswith(("visual.proj", "visual.head.", "visual.trunk.head.")))]
    wrong = [f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
             for names, what in ((missing, "missing"), (found.unexpected_keys, "unknown")) if names]
    if wrong:
        raise CheckpointError(f"the weights {path} are not of this model: {'; '.join(wrong)}")
    return image_only


def _adapted(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Resolve the differences between files of one architecture that open_clip resolves too."""
    own = model.state_dict()
    state.pop("text.transformer.embeddings.position_ids", None)  # a constant that older versions of transformers saved
    if "positional_embedding" in state and "positional_embedding" not in own:
        state = convert_to_custom_text_state_dict(state)
    for name in ("logit_scale", "logit_bias"):  # a scalar, or a vector of one
        if name in state and name in own and state[name].numel() == own[name].numel():
            state[name] = state[name].reshape(own[name].shape)
    if "logit_bias" in own and "logit_scale" in state:  # a CLIP model to be trained as a SigLIP one
        state.setdefault("logit_bias", torch.zeros_like(own["logit_bias"]))
    for name in ("positional_embedding", "text.positional_embedding"):
        if name in state and name in own and state[name].shape[1:] == own[name].shape[1:]:
            resize_text_pos_embed(state, model)
    grid_size = vit_of(visual_of(model)).grid_size
    for name in ("visual.positional_embedding", "visual.trunk.pos_embed"):
        if name in state and name in own and state[name].shape != own[name].shape:
            prefix = own[name].shape[-2] - math.prod(grid_size)
            side = math.isqrt(max(0, state[name].shape[-2] - prefix))
            if side and side**2 + prefix == state[name].shape[-2]:
                rows = state[name].flatten(0, -2)[None]
                resized = resample_abs_pos_embed(rows, list(grid_size), [side, side], prefix)
                state[name] = resized.view(*own[name].shape[:-1], -1)
    return state


# The checkpoint layout of the public A-CLIP release, which is SLIP's.

_TIMM_SIZES = {(192, 12): "tiny", (768, 12): "base", (1024, 24): "large"}
"""(width, layers) -> size in timm's names, all with heads of 64. The releases are base and large."""

_TEXT = ("transformer.", "token_embedding.", "positional_embedding", "ln_final.", "text_projection", "logit_scale")


def is_released(state: Mapping[str, Tensor]) -> bool:
    """Whether a state dict is the release's: timm's names in `visual.*`, and a separate `image_projection`."""
    return {"image_projection", "visual.blocks.0.attn.qkv.weight", "ln_final.weight"} <= state.keys()


def released_config(state: Mapping[str, Tensor], path: Path) -> dict[str, Any]:
    """Return the open_clip config of a state dict of the release: timm's ViT, CLIP's text tower with quick GELU.

    Raises:
        UnsupportedModelError: a size that timm has no ViT for. SLIP's ViT-S has MoCo v3's 12 heads, timm's has 6: the
            tensors would fit, the features would be wrong.
    """
    patch, positions = state["visual.patch_embed.proj.weight"], state["visual.pos_embed"]
    width, layers, side = patch.shape[0], _layers(state, "visual.blocks."), patch.shape[-1]
    text_width = state["ln_final.weight"].shape[0]
    if (width, layers) not in _TIMM_SIZES:
        raise UnsupportedModelError(f"the weights {path} have the A-CLIP release's layout, but timm has no ViT of "
                                    f"width {width} and {layers} layers with the same heads: sizes that load are "
                                    f"{', '.join(f'{w} x {n}' for w, n in _TIMM_SIZES)}")
    return {
        "embed_dim": state["image_projection"].shape[1],
        "quick_gelu": True,
        "vision_cfg": {
            "timm_model_name": f"vit_{_TIMM_SIZES[width, layers]}_patch{side}_224", "timm_model_pretrained": False,
            "timm_pool": "token", "timm_proj": "linear", "image_size": math.isqrt(positions.shape[1] - 1) * side,
        },
        "text_cfg": {
            "context_length": state["positional_embedding"].shape[0],
            "vocab_size": state["token_embedding.weight"].shape[0], "width": text_width, "heads": text_width // 64,
            "layers": _layers(state, "transformer.resblocks."),
        },
    }


def from_released(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the online towers of the release's state dict in open_clip's names, without EMA copies and heads."""
    ours = {name: tensor for name, tensor in state.items()
            if name in _TEXT or name.startswith(tuple(part for part in _TEXT if part.endswith(".")))}
    ours["visual.head.proj.weight"] = state["image_projection"].T
    for name, tensor in state.items():
        if name.startswith("visual.") and not name.startswith("visual.head."):
            ours[f"visual.trunk.{name.removeprefix('visual.')}"] = tensor
    return ours


def _layers(state: Mapping[str, Tensor], prefix: str) -> int:
    return 1 + max(int(name.removeprefix(prefix).split(".")[0]) for name in state if name.startswith(prefix))
