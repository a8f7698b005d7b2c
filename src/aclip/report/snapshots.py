"""What the model looked at, at one step of training: a few held-out pictures, their scores, what was kept.

A file holds the tensors `images`, `scores` and `keep_indices`, and in its header the captions, the patch
grid and the step.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int, UInt8
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from aclip.errors import CheckpointError


@dataclass(frozen=True)
class Snapshot:
    """One file of `snapshots/`.

    Attributes:
        images: (n, 3, H, W) uint8, without augmentation.
        scores: (n, N) float32, attention of CLS to each patch, as the masking reads it.
        keep_indices: (n, K) int64 ascending, the patches that survive.
        grid: patches (down, across), N = down x across.
        captions: one a picture.
        step: optimizer steps done when it was taken.
    """

    images: UInt8[Tensor, "n 3 H W"]
    scores: Float[Tensor, "n N"]
    keep_indices: Int[Tensor, "n K"]
    grid: tuple[int, int]
    captions: tuple[str, ...]
    step: int


def snapshot_path(folder: Path, step: int) -> Path:
    """Return where the snapshot of a step lies in `folder`; names sort by step."""
    return folder / f"step-{step:08d}.safetensors"


def write_snapshot(
    path: Path,
    images: UInt8[Tensor, "n 3 H W"],
    scores: Float[Tensor, "n N"],
    keep_indices: Int[Tensor, "n K"],
    grid: tuple[int, int],
    captions: Sequence[str],
    step: int,
) -> None:
    """Write a snapshot, replacing one at the same place in one move; see `Snapshot` for the arguments.

    Raises:
        ValueError: the shapes do not fit each other.
    """
    n = len(captions)
    if len(images) != n or len(keep_indices) != n or scores.shape != (n, grid[0] * grid[1]):
        raise ValueError(f"a snapshot of {n} captions on a {grid[0]}x{grid[1]} grid cannot hold "
                         f"{len(images)} images, scores {tuple(scores.shape)} and {len(keep_indices)} rows "
                         "of indices")
    tensors = {
        "images": images.to("cpu", torch.uint8).contiguous(),
        "scores": scores.detach().to("cpu", torch.float32).contiguous(),
        "keep_indices": keep_indices.to("cpu", torch.int64).contiguous(),
    }
    header = {"captions": json.dumps(list(captions)), "grid": json.dumps(list(grid)), "step": str(step)}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file(tensors, partial, metadata=header)
    partial.replace(path)


def read_snapshot(path: Path) -> Snapshot:
    """Read what `write_snapshot` wrote.

    Raises:
        CheckpointError: the file is missing, torn, or something else.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in ("images", "scores", "keep_indices")}
        down, across = json.loads(header["grid"])
        captions = tuple(json.loads(header["captions"]))
        return Snapshot(**tensors, grid=(down, across), captions=captions, step=int(header["step"]))
    except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path} is not a readable snapshot: {error}") from error
