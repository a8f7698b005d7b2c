"""Checkpoints: safetensors and JSON, written atomically, loaded without pickle.

A checkpoint is a folder `step-XXXXXXXX/` with `state.safetensors` (every tensor) and `state.json` (the
rest). It is written beside its place and renamed into it, so that a folder with that name is whole.
"""

import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from aclip.errors import CheckpointError

_NAME = re.compile(r"step-(\d{8})")


@dataclass(frozen=True)
class Checkpoint:
    """A training state at rest.

    Attributes:
        step: optimizer steps done.
        tensors: name -> tensor, on the CPU.
        values: JSON values (samples seen, scaler).
    """

    step: int
    tensors: Mapping[str, Tensor]
    values: Mapping[str, Any]

    def part(self, prefix: str) -> dict[str, Tensor]:
        """Return the tensors below `prefix/`, without it."""
        start = f"{prefix}/"
        return {name[len(start):]: t for name, t in self.tensors.items() if name.startswith(start)}


def save(folder: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Write a checkpoint into `folder`, then delete all but the newest `keep`; return its path.

    Raises:
        CheckpointError: the disk is full or the folder cannot be written; older checkpoints stay.
    """
    target = folder / f"step-{checkpoint.step:08d}"
    temporary = folder / f".{target.name}.tmp"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        # contiguous clones: safetensors refuses tensors that share memory
        save_file({k: t.detach().cpu().contiguous().clone() for k, t in checkpoint.tensors.items()},
                  temporary / "state.safetensors")
        (temporary / "state.json").write_text(
            json.dumps({"step": checkpoint.step, **checkpoint.values}, indent=2) + "\n")
        for file in temporary.iterdir():
            _sync(file)
        _sync(temporary)
        if target.exists():
            _set_aside(target)
        temporary.rename(target)
        _sync(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(f"cannot write the checkpoint {target}: {error}") from error
    for old in list_checkpoints(folder)[:-keep]:
        _set_aside(old)
    for leftover in folder.glob(".step-*"):  # of killed writes too
        shutil.rmtree(leftover)
    return target


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints in `folder`, oldest first."""
    return sorted(p for p in folder.glob("step-*") if _NAME.fullmatch(p.name)) if folder.exists() else []


def load(path: Path) -> Checkpoint:
    """Read a checkpoint folder; no file of it can run code.

    Raises:
        CheckpointError: missing or damaged.
    """
    try:
        values = json.loads((path / "state.json").read_text())
        tensors = load_file(path / "state.safetensors")
        return Checkpoint(int(values.pop("step")), tensors, values)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise CheckpointError(f"the checkpoint {path} cannot be read: {error}") from error


def load_latest(folder: Path) -> Checkpoint:
    """Read the newest checkpoint in `folder`.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    found = list_checkpoints(folder)
    if not found:
        raise CheckpointError(f"there is no checkpoint in {folder}")
    return load(found[-1])


def _set_aside(path: Path) -> None:
    """Take a checkpoint's name away before it is deleted, so that no half of it is taken for a whole one."""
    nameless = path.with_name(f".{path.name}.old")
    shutil.rmtree(nameless, ignore_errors=True)
    path.rename(nameless)


def _sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
