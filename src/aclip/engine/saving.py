"""Checkpoints written beside the training: it stands still for a copy in memory alone."""

import os
import shutil
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from aclip import dist
from aclip.engine.checkpoint import Checkpoint, commit, temporary_folder
from aclip.engine.shards import FileMark, Piece, file_name, own_pieces, write_shard


@dataclass(frozen=True)
class _Written:
    """What became of one rank's share, or of the checkpoint: a file, nothing, or what went wrong."""

    mark: FileMark | None = None
    error: str = ""


class Saver:
    """Saves training states over all ranks, one at a time; every rank calls every method equally often.

        1. each rank copies its share to its host's memory: here, and only here, the training waits
        2. a thread of each rank writes it to a file in a temporary folder that they share
        3. once all have, rank 0 adds `state.json` and gives the folder its name, in its thread

    A failure on any rank leaves the older checkpoints as they are, and is told by `failures`.

    Args:
        folder: of the checkpoints.
        keep, keep_step: see `checkpoint.prune`.
    """

    def __init__(self, folder: Path, keep: int, keep_step: int = 0) -> None:
        self._folder, self._keep, self._keep_step = folder, keep, keep_step
        self._attempt = dist.collect(os.urandom(4).hex())[0]  # what an earlier attempt left is never written to
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._buffers: dict[str, Tensor] = {}
        self._state: Checkpoint | None = None  # without its tensors; the one that is being written
        self._writing: Future[_Written] | None = None
        self._naming: tuple[int, Future[_Written]] | None = None
        self._vote, self._votes = dist.Vote(), 0
        self._failures: list[tuple[int, str]] = []
        self.seconds = 0.0
        """How long the training has stood still for the latest checkpoint, in `save`."""

    def save(self, state: Checkpoint) -> None:
        """Begin to save a state; waits until the one before is written."""
        begun = time.perf_counter()
        self.finish()
        pieces = self._copied(own_pieces(state.tensors))
        self._state, self._votes = replace(state, tensors={}), 0
        self._writing = self._thread.submit(self._write, self._state, pieces)
        self.seconds = time.perf_counter() - begun

    @property
    def writing(self) -> bool:
        """Whether a checkpoint is being written or named; the end of the writing is noticed by `advance`."""
        return self._writing is not None or (self._naming is not None and not self._naming[1].done())

    def advance(self) -> None:
        """Take notice that another step is done; waits for nothing."""
        if self._writing is None:
            return
        busy = self._vote.cast(not self._writing.done())
        self._votes += 1
        # over ranks the answer is that of the call before
        if not busy and (dist.world_size() == 1 or self._votes > 1):
            self._conclude()

    def finish(self) -> None:
        """Wait until everything is on the disk, or has failed, on all ranks."""
        if self._writing is not None:
            self._conclude()
        if self._naming is not None:
            self._note_naming()
        dist.wait_for_all()

    def failures(self) -> list[tuple[int, str]]:
        """Return the step of every save that has failed since the last call, and what went wrong, on rank 0."""
        if self._naming is not None and self._naming[1].done():
            self._note_naming()
        failed, self._failures = self._failures, []
        return failed

    def close(self) -> None:
        """End the thread, after what it is at."""
        self._thread.shutdown()

    def _copied(self, pieces: Sequence[Piece]) -> list[Piece]:
        """Copy pieces to the host's memory, the same from one checkpoint to the next."""
        on_gpu = False
        copies = []
        for piece in pieces:
            buffer, tensor = self._buffers.get(piece.name), piece.tensor
            if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
                buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
                self._buffers[piece.name] = buffer
            buffer.copy_(tensor, non_blocking=tensor.is_cuda)
            on_gpu |= tensor.is_cuda
            copies.append(replace(piece, tensor=buffer))
        if on_gpu:
            torch.cuda.synchronize()
        return copies

    def _write(self, state: Checkpoint, pieces: Sequence[Piece]) -> _Written:
        """In the thread: write this rank's share; a single process has the whole, and names it at once."""
        temporary = temporary_folder(self._folder, state.step, self._attempt)
        try:
            temporary.mkdir(parents=True, exist_ok=True)
            mark = write_shard(temporary / file_name(dist.rank(), dist.world_size()), pieces)
        except Exception as error:  # whatever it is, the training goes on
            return _Written(error=str(error) or type(error).__name__)
        return self._name(state, [mark]) if dist.world_size() == 1 else _Written(mark)

    def _name(self, state: Checkpoint, marks: Sequence[FileMark]) -> _Written:
        """In rank 0's thread: make a checkpoint of the files that all ranks have written."""
        temporary = temporary_folder(self._folder, state.step, self._attempt)
        try:
            commit(self._folder, temporary, state.step, state.values, marks, self._keep, self._keep_step)
        except Exception as error:
            shutil.rmtree(temporary, ignore_errors=True)
            return _Written(error=str(error) or type(error).__name__)
        return _Written(marks[0])

    def _conclude(self) -> None:
        """Learn what became of every rank's share, and let rank 0 name the checkpoint if all is well."""
        assert self._writing is not None
        assert self._state is not None
        self._vote.close()
        written = dist.collect(self._writing.result())
        state, self._state, self._writing = self._state, None, None
        errors = [f"rank {rank}: {w.error}" if len(written) > 1 else w.error
                  for rank, w in enumerate(written) if w.error]
        if errors:
            self._failures.append((state.step, "; ".join(errors)))
            if dist.rank() == 0:
                shutil.rmtree(temporary_folder(self._folder, state.step, self._attempt), ignore_errors=True)
        elif len(written) > 1 and dist.rank() == 0:
            self._naming = state.step, self._thread.submit(self._name, state, [w.mark for w in written if w.mark])

    def _note_naming(self) -> None:
        assert self._naming is not None
        step, naming = self._naming
        error = naming.result().error
        if error:
            self._failures.append((step, error))
        self._naming = None
