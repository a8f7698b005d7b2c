"""Checkpoints: safetensors and JSON, written atomically, verified wherever they are read, loaded without pickle.

    step-00001000/
        rank-00000-of-00002.safetensors   one file a rank, in the layout of torch.distributed.checkpoint
        rank-00001-of-00002.safetensors
        state.json                        step, plain values, size and CRC-32 of every file

A checkpoint is written beside its place and renamed into it, so a folder with that name was whole when it was written;
the checksums tell what happened to it since. Any number of ranks can read what any other number has written. `Saver`
writes in the background: training waits only for a copy in memory.
"""

import json
import math
import os
import re
import shutil
import time
import warnings
import zlib
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aclip import dist
from aclip.errors import CheckpointError

_NAME = re.compile(r"step-(\d{8,})")
_FILE = re.compile(r"rank-\d{5}-of-\d{5}\.safetensors")
_STATE = "state.json"
_BLOCK = 2**24

RANKS_TIMEOUT = 1800.0
"""Seconds for which rank 0 waits for the files of the other ranks."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk, verified; tensors are read when asked for.

    Attributes:
        path: its folder.
        step: optimizer steps done.
        values: plain JSON values, "samples_seen" among them.
        shapes: name -> shape of every whole tensor.
    """

    path: Path
    step: int
    values: Mapping[str, Any]
    shapes: Mapping[str, torch.Size]
    _dtypes: Mapping[str, torch.dtype] = field(repr=False)

    def load_into(self, targets: Mapping[str, Tensor]) -> None:
        """Copy stored tensors into `targets` in place, by name; a sharded `DTensor` reads its own part alone.

        Raises:
            CheckpointError: a name that is missing here or there, another shape, or an unreadable file.
        """
        from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
        from torch.distributed.checkpoint.state_dict_loader import load

        for name, target in targets.items():
            if name not in self.shapes:
                raise CheckpointError(f"the checkpoint {self.path} has no tensor '{name}'")
            if self.shapes[name] != target.shape:
                raise CheckpointError(f"'{name}' has shape {list(self.shapes[name])} in the checkpoint {self.path} "
                                      f"and {list(target.shape)} here")
        try:
            state: dict[str, Any] = {name: target.detach() for name, target in targets.items()}
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # on purpose: no_dist
                load(state, storage_reader=HuggingFaceStorageReader(str(self.path)), no_dist=True)
        except Exception as error:  # whatever torch's reader meets in a file
            raise CheckpointError(f"the checkpoint {self.path} cannot be read: {error}") from error

    def tensors(self, prefix: str = "") -> dict[str, Tensor]:
        """Return the whole tensors below `prefix` on the CPU, by their names without it."""
        names = [name for name in self.shapes if name.startswith(prefix)]
        found = {name: torch.empty(self.shapes[name], dtype=self._dtypes[name]) for name in names}
        self.load_into(found)
        return {name.removeprefix(prefix): tensor for name, tensor in found.items()}


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a checkpoint after verifying its checksums; CheckpointError if it is missing or damaged."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    try:
        state = _verify(path)
        metadata: dict[str, Any] = HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata
        for name, tensor in metadata.items():
            if sum(math.prod(chunk.sizes) for chunk in tensor.chunks) != math.prod(tensor.size):
                raise ValueError(f"parts of '{name}' are missing")
        return Checkpoint(path, int(state["step"]), state["values"], {name: m.size for name, m in metadata.items()},
                          {name: m.properties.dtype for name, m in metadata.items()})
    except Exception as error:  # whatever the readers of JSON and safetensors meet in a damaged file
        raise CheckpointError(f"the checkpoint {path} is damaged: {error or type(error).__name__}") from error


def open_newest(folder: Path) -> Checkpoint:
    """Open the newest undamaged checkpoint in `folder`; CheckpointError if there is none."""
    found, damaged = find_newest(folder)
    if found is None:
        raise no_undamaged(folder, damaged)
    return found


def find_newest(folder: Path) -> tuple[Checkpoint | None, list[tuple[Path, str]]]:
    """Return the newest undamaged checkpoint in `folder`, if any, and the newer damaged ones with what is wrong."""
    damaged: list[tuple[Path, str]] = []
    for path in reversed(list_checkpoints(folder)):
        try:
            return open_checkpoint(path), damaged
        except CheckpointError as error:
            damaged.append((path, str(error)))
    return None, damaged


def no_undamaged(folder: Path, damaged: Sequence[tuple[Path, str]]) -> CheckpointError:
    return CheckpointError(f"no checkpoint in {folder} is undamaged{f': {damaged[0][1]}' if damaged else ''}")


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints in `folder`, oldest first, undamaged or not."""
    return sorted((p for p in folder.glob("step-*") if _NAME.fullmatch(p.name)), key=step_of)


def step_of(path: Path) -> int:
    """Return the step in a checkpoint's name."""
    return int(path.name.removeprefix("step-"))


def own_part(tensors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, list[int]]]:
    """Return the tensors that this rank writes, each with its offset in the whole tensor.

    Of a sharded tensor every rank writes its shard; replicated tensors are divided evenly over the ranks. No
    communication: every rank computes the same division.
    """
    from torch.distributed.tensor import DTensor

    mine: dict[str, tuple[Tensor, list[int]]] = {}
    load = [0] * dist.world_size()
    for name, tensor in tensors.items():
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        if isinstance(tensor, DTensor) and not all(placement.is_replicate() for placement in tensor.placements):
            (chunk,) = tensor.__create_chunk_list__()
            if local.numel():
                mine[name] = local.detach(), list(chunk.offsets)
            continue
        writer = load.index(min(load))
        load[writer] += local.nbytes
        if writer == dist.rank():
            mine[name] = local.detach(), [0] * local.ndim
    return mine


def write_rank_file(folder: Path, part: Mapping[str, tuple[Tensor, list[int]]]) -> Path:
    """Write this rank's tensors, already on the CPU, into a checkpoint's temporary folder; return the file."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path = folder / f"rank-{dist.rank():05}-of-{dist.world_size():05}.safetensors"
    offsets = {name: {"saved_offsets": offset} for name, (_, offset) in part.items()}
    metadata = {"format": "pt", "DCP_SHARDING_INFO": json.dumps(offsets), "DCP_VERSION": "1.0"}
    try:
        save_file({name: tensor.contiguous() for name, (tensor, _) in part.items()}, path, metadata)
    except SafetensorError as error:  # its message holds the system's
        raise OSError(str(error)) from error
    _sync(path)
    return path


def commit(folder: Path, temporary: Path, step: int, values: Mapping[str, Any]) -> Path:
    """Turn a temporary folder that holds the files of all ranks into the checkpoint of `step`; one rank calls it."""
    files = {path.name: {"size": path.stat().st_size, "crc32": crc32(path)}
             for path in sorted(temporary.iterdir()) if _FILE.fullmatch(path.name)}
    content = {"step": step, "values": dict(values), "files": files}
    (temporary / _STATE).write_text(json.dumps({**content, "crc32": _checksum(content)}, indent=2), encoding="utf-8")
    _sync(temporary / _STATE)
    _sync(temporary)
    target = folder / f"step-{step:08d}"
    if target.exists():
        _remove(target)
    temporary.rename(target)
    _sync(folder)
    return target


def prune(folder: Path, keep: int, keep_every: int = 0) -> None:
    """Delete all but the `keep` newest checkpoints; those at multiples of `keep_every` steps stay too (0: none)."""
    for path in list_checkpoints(folder)[:-keep]:
        if not (keep_every and step_of(path) % keep_every == 0):
            _remove(path)


class Saver:
    """Saves training states over all ranks, one at a time; every rank calls every method equally often.

    1. Each rank copies its part to host memory: only here does training wait.
    2. A thread of each rank writes it into a temporary folder that all ranks share, and marks its end.
    3. Rank 0's thread waits for all marks, adds `state.json` and renames the folder.

    A failure on any rank leaves older checkpoints alone, and is returned by `failures`. `keep` and `keep_every` as for
    `prune`.
    """

    def __init__(self, folder: Path, keep: int, keep_every: int = 0) -> None:
        self._folder, self._keep, self._keep_every = folder, keep, keep_every
        self._attempt = dist.collect(os.urandom(4).hex())[0]  # never write into what an earlier attempt left
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._buffers: dict[str, Tensor] = {}
        self._writing: tuple[int, Future[None]] | None = None
        self._failures: list[tuple[int, str]] = []

    def save(self, step: int, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Begin to save a state; waits for the save before it."""
        self.wait()
        part = {name: (self._copied(name, tensor), offset) for name, (tensor, offset) in own_part(tensors).items()}
        self._writing = step, self._thread.submit(self._write, step, part, values)

    def wait(self) -> None:
        """Wait until everything is on disk, or has failed, on all ranks."""
        if self._writing is not None:
            self._settle()
        dist.barrier()

    def failures(self) -> list[tuple[int, str]]:
        """Return the step of every save that failed since the last call, and why; on rank 0 for all ranks."""
        if self._writing is not None and self._writing[1].done():
            self._settle()
        failed, self._failures = self._failures, []
        return failed

    def close(self) -> None:
        """End the thread, after what it is writing."""
        self._thread.shutdown()

    def _settle(self) -> None:
        assert self._writing is not None
        step, writing = self._writing
        self._writing = None
        error = writing.exception()
        if error is not None:
            self._failures.append((step, str(error) or type(error).__name__))

    def _copied(self, name: str, tensor: Tensor) -> Tensor:
        """Copy a tensor into a buffer that is reused from one checkpoint to the next."""
        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            buffer = self._buffers[name] = torch.empty(tensor.shape, dtype=tensor.dtype)
        return buffer.copy_(tensor)

    def _write(self, step: int, part: Mapping[str, tuple[Tensor, list[int]]], values: Mapping[str, Any]) -> None:
        temporary = self._folder / f".step-{step:08d}-{self._attempt}.tmp"
        error = ""
        try:
            temporary.mkdir(parents=True, exist_ok=True)
            write_rank_file(temporary, part)
        except Exception as problem:
            error = str(problem) or type(problem).__name__
        if dist.rank() > 0:
            mark = temporary / f"{dist.rank()}.{'failed' if error else 'done'}"
            with suppress(OSError):  # an empty file often fits on a full disk
                mark.touch()
                mark.write_text(error, encoding="utf-8")
            return
        try:
            errors = [error, *_other_ranks(temporary)] if temporary.exists() else [error]
            if any(errors):
                raise OSError("; ".join(filter(None, errors)))
            commit(self._folder, temporary, step, values)
            prune(self._folder, self._keep, self._keep_every)
        finally:
            for leftover in self._folder.glob(".step-*"):  # its own, after a failure, and those of killed attempts
                shutil.rmtree(leftover, ignore_errors=True)


def _verify(path: Path) -> dict[str, Any]:
    """Return the content of `state.json` after comparing all sizes and checksums; any error says what is wrong."""
    content: dict[str, Any] = json.loads((path / _STATE).read_text(encoding="utf-8"))
    if content.pop("crc32") != _checksum(content):
        raise ValueError(f"{_STATE} has changed since it was written")
    present = {p.name for p in path.iterdir() if p.suffix == ".safetensors"}
    if present != set(content["files"]):
        raise ValueError(f"it should hold {sorted(content['files'])} and holds {sorted(present)}")
    for name, mark in content["files"].items():
        size = (path / name).stat().st_size
        if size != mark["size"]:
            raise ValueError(f"{name} has {size:,} bytes instead of {mark['size']:,}")
        if crc32(path / name) != mark["crc32"]:
            raise ValueError(f"{name} has changed since it was written")
    return content


def _checksum(content: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def crc32(path: Path) -> int:
    """Return the CRC-32 of a file."""
    crc = 0
    with path.open("rb", buffering=0) as file:
        while block := file.read(_BLOCK):
            crc = zlib.crc32(block, crc)
    return crc


def _remove(path: Path) -> None:
    """Rename before deleting, so that no half-deleted folder passes for a checkpoint."""
    doomed = path.with_name(f".{path.name}.old")
    shutil.rmtree(doomed, ignore_errors=True)
    path.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _sync(path: Path) -> None:
    """Flush a file, or a folder's directory entries, to the disk."""
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _other_ranks(temporary: Path) -> list[str]:
    """Wait until the other ranks have marked the end of their writing; return what went wrong, "" where nothing did."""
    errors, until = [], time.monotonic() + RANKS_TIMEOUT
    for rank in range(1, dist.world_size()):
        done, failed = temporary / f"{rank}.done", temporary / f"{rank}.failed"
        while not (done.exists() or failed.exists() or time.monotonic() > until):
            time.sleep(0.01)
        if not done.exists():
            reason = failed.read_text(encoding="utf-8") if failed.exists() else "wrote nothing in time"
            errors.append(f"rank {rank}: {reason or 'failed'}")
        done.unlink(missing_ok=True)
    return errors
