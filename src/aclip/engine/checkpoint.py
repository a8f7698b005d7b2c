"""Checkpoints: safetensors and JSON, written atomically, told from damaged ones, loaded without pickle.

A checkpoint is a folder `step-XXXXXXXX/` with the tensors (`tensor_files`: one file a rank, readable by any number of
ranks) and `state.json` (the rest, and the sizes and checksums of the files). It is written beside its place and renamed
into it, so that a folder with that name is whole when it comes to be; the checksums tell what happens to it later.
"""

import json
import os
import re
import shutil
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from aclip import dist
from aclip.errors import CheckpointError
from aclip.tensor_files import FILE_NAME, FileMark, StoredTensors, file_name, mark_of, own_pieces, write_shard

_NAME = re.compile(r"step-(\d{8})")
_VALUES = "state.json"


@dataclass(frozen=True)
class Checkpoint:
    """A training state at rest.

    Attributes:
        step: optimizer steps done.
        tensors: name -> tensor; `StoredTensors` where it was read from a folder.
        values: JSON values (samples seen, scaler).
    """

    step: int
    tensors: Mapping[str, Tensor]
    values: Mapping[str, Any]


def save(folder: Path, checkpoint: Checkpoint, keep: int, keep_step: int = 0) -> Path:
    """Write a checkpoint of one process into `folder`, then delete older ones (`prune`); return its path.

    `saving.Saver` does the same beside the training, and over ranks.

    Raises:
        CheckpointError: the disk is full or the folder cannot be written; older checkpoints stay.
    """
    temporary = temporary_folder(folder, checkpoint.step)
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        mark = write_shard(temporary / file_name(0, 1), own_pieces(
            {name: tensor.detach().cpu() for name, tensor in checkpoint.tensors.items()}))
        return commit(folder, temporary, checkpoint.step, checkpoint.values, [mark], keep, keep_step)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(f"cannot write the checkpoint of step {checkpoint.step} in {folder}: {error}") from error


def temporary_folder(folder: Path, step: int, attempt: str = "") -> Path:
    """Return where a checkpoint is written before it has its name."""
    return folder / f".step-{step:08d}{attempt and '-'}{attempt}.tmp"


def commit(
    folder: Path, temporary: Path, step: int, values: Mapping[str, Any], marks: Sequence[FileMark], keep: int,
    keep_step: int = 0,
) -> Path:
    """Turn a temporary folder with all files of all ranks into a checkpoint, then delete older ones; one rank does it.

    Raises:
        OSError: it cannot be written; older checkpoints stay.
    """
    content = {"step": step, **values, "files": [asdict(mark) for mark in marks]}
    (temporary / _VALUES).write_text(json.dumps({**content, "crc32": _checksum(content)}, indent=2) + "\n")
    _sync(temporary / _VALUES)
    _sync(temporary)
    target = folder / f"step-{step:08d}"
    if target.exists():
        _set_aside(target)
    temporary.rename(target)
    _sync(folder)
    prune(folder, step, keep, keep_step)
    return target


def prune(folder: Path, newest: int, keep: int, keep_step: int = 0) -> None:
    """Delete what need not be kept of the checkpoints up to step `newest`, and what killed writes left.

    Args:
        folder: of the checkpoints.
        newest: the step of one known to be good; later ones, if any, are left alone.
        keep: how many of the newest stay.
        keep_step: those of its multiples stay too; 0 for none.
    """
    found = [path for path in list_checkpoints(folder) if step_of(path) <= newest]
    for old in found[:-keep]:
        if not (keep_step and step_of(old) % keep_step == 0):
            _set_aside(old)
    for leftover in folder.glob(".step-*"):
        shutil.rmtree(leftover, ignore_errors=True)  # another try comes with the next checkpoint


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints in `folder`, oldest first."""
    return sorted(p for p in folder.glob("step-*") if _NAME.fullmatch(p.name)) if folder.exists() else []


def step_of(path: Path) -> int:
    """Return the step that a checkpoint's name tells."""
    return int(path.name.removeprefix("step-"))


def load(path: Path) -> Checkpoint:
    """Open a checkpoint folder, its checksums verified; no file of it can run code.

    Its tensors are read when they are asked for.

    Raises:
        CheckpointError: missing or damaged.
    """
    reason = damage(path)
    if reason:
        raise CheckpointError(f"the checkpoint {path} cannot be read: {reason}")
    return opened(path)


def opened(path: Path) -> Checkpoint:
    """Open a checkpoint folder that `damage` was looked for in.

    Raises:
        CheckpointError: missing, or damaged so that it cannot be opened.
    """
    try:
        values, marks = _values(path)
        tensors = StoredTensors(path / mark.name for mark in marks)
        return Checkpoint(int(values.pop("step")), tensors, values)
    except (OSError, ValueError, KeyError, TypeError, RecursionError, SafetensorError) as error:
        raise CheckpointError(f"the checkpoint {path} cannot be read: {error}") from error


def damage(path: Path, part: int = 0, parts: int = 1) -> str:
    """Return what is wrong with a checkpoint folder, empty if nothing.

    Args:
        path: the folder.
        part, parts: verify only every `parts`-th file, from number `part` on: ranks share the work.
    """
    try:
        _, marks = _values(path)
        for mark in marks[part::parts]:
            found = mark_of(path / mark.name)
            if found.size != mark.size:
                return f"{mark.name} has {found.size:,} bytes, not {mark.size:,}"
            if found.crc32 != mark.crc32:
                return f"{mark.name} has changed since it was written"
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        return str(error) or type(error).__name__
    return ""


def newest_good(folder: Path) -> tuple[Path | None, list[tuple[Path, str]]]:
    """Return the newest checkpoint that is whole, or None, and the damaged ones after it with what is wrong.

    All ranks must call it; they share the reading and come to the same answer.
    """
    damaged: list[tuple[Path, str]] = []
    for path in reversed(dist.collect(list_checkpoints(folder))[0]):
        reasons = dist.collect(damage(path, dist.rank(), dist.world_size()))
        reason = next(filter(None, reasons), "")
        if not reason:
            return path, damaged
        damaged.append((path, reason))
    return None, damaged


def load_newest(folder: Path) -> tuple[Checkpoint, list[tuple[Path, str]]]:
    """Open the newest checkpoint in `folder` that is whole, and tell the damaged ones after it; all ranks must call it.

    Raises:
        CheckpointError: there is none.
    """
    path, damaged = newest_good(folder)
    if path is None:
        whole = f"no whole one among them: {damaged[0][0].name} ({damaged[0][1]})" if damaged else "none"
        raise CheckpointError(f"there is no checkpoint in {folder} to start from, {whole}")
    return opened(path), damaged


def put_away(path: Path) -> Path:
    """Take a damaged checkpoint's name away, so that it is neither tried nor counted again; return where it is now."""
    place = path.with_name(f"{path.name}.damaged")
    shutil.rmtree(place, ignore_errors=True)
    path.rename(place)
    return place


def _values(path: Path) -> tuple[dict[str, Any], list[FileMark]]:
    """Return what `state.json` holds.

    Raises:
        OSError, ValueError, KeyError, TypeError: it is missing or damaged.
    """
    values: dict[str, Any] = json.loads((path / _VALUES).read_bytes())
    expected = values.pop("crc32")
    if expected != _checksum(values):
        raise ValueError(f"{_VALUES} has changed since it was written")
    marks = [FileMark(str(file["name"]), int(file["size"]), int(file["crc32"])) for file in values.pop("files")]
    for mark in marks:
        if not FILE_NAME.fullmatch(mark.name):  # no path out of the folder
            raise ValueError(f"{_VALUES} names a file '{mark.name}'")
    return values, marks


def _checksum(values: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(values, sort_keys=True).encode())


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
