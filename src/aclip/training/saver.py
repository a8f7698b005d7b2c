"""Checkpoints written in the background: training waits only for a copy in memory."""

import os
import shutil
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aclip import checkpoint, dist

RANKS_TIMEOUT = 1800.0
"""Seconds for which rank 0 waits for the files of the other ranks."""


class Saver:
    """Saves training states over all ranks, one at a time; every rank calls every method equally often.

    1. Each rank copies its part to host memory: only here does training wait.
    2. A thread of each rank writes it into a temporary folder that all ranks share, and marks its end.
    3. Rank 0's thread waits for all marks, adds `state.json` and renames the folder.

    A failure on any rank leaves older checkpoints alone, and is returned by `failures`.

    Args:
        folder: of the checkpoints.
        keep, keep_every: see `checkpoint.prune`.
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
        part = {name: (self._copied(name, tensor), offset) for name, (tensor, offset) in
                checkpoint.own_part(tensors).items()}
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
            checkpoint.write_rank_file(temporary, part)
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
            checkpoint.commit(self._folder, temporary, step, values)
            checkpoint.prune(self._folder, self._keep, self._keep_every)
        finally:
            for leftover in self._folder.glob(".step-*"):  # its own, after a failure, and those of killed attempts
                shutil.rmtree(leftover, ignore_errors=True)


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
