"""Scores that serve for several epochs: a byte a patch and sample, in a file of the run folder."""

import errno
import logging
import os
import platform
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from aclip import dist
from aclip.engine.run_config import Parallel
from aclip.errors import ConfigError
from aclip.plan import PassPlan, Plan
from aclip.structs import KnownScores

SETTLED = 4
"""Steps after which a row that was scored is read."""

_log = logging.getLogger(__name__)


class ScoreCache:
    """The scores of one pass, by the samples' numbers in the source.

    Epochs are counted in periods of `refresh`. A row holds a score map and the number of the batch in which it was
    scored (batches are counted over the whole run; after a rollback they go on, so that the count never falls). For
    batch t, whose period begins at batch s, a row of batch u is

        known if s <= u <= t - SETTLED, else the sample is scored in this batch, and the row replaced.

    So a row that is known stays as it is to the end of its period, and what is known is a function of t alone, however
    often the run was stopped: rows of batches that a resumed run has yet to take are not known, and replaced by the
    same bytes when it takes them. Periods take turns at two slots, so that this holds for a resume from any checkpoint
    of the period in which the run was stopped, or of the one before.

    Nothing waits for the device: what was scored is copied to the host beside the step, and written two steps later,
    or by `flush` before a checkpoint. Ranks write their own samples' rows into the same file. At batch t all have come
    to the end of batch t - 2 (`dist.Vote`), in whose beginning they have written what they scored up to t - 4: hence
    SETTLED.

    Args:
        path: of a file that `create` made.
        samples, patches: its size.
        refresh: epochs in a period.
        steps_per_epoch: batches in an epoch.
    """

    def __init__(self, path: Path, *, samples: int, patches: int, refresh: int, steps_per_epoch: int) -> None:
        self._path = path
        self._row = row_of(patches)
        self._samples = samples
        self._period = refresh * steps_per_epoch
        # Read through memory, and written by calls: on a full disk these fail, and writing to memory would kill.
        self._file = os.open(path, os.O_RDWR)
        self._rows = np.memmap(path, self._row, mode="r", shape=(2, samples))
        self._pending: deque[_Scored] = deque()
        self._told = False

    def recall(self, numbers: Sequence[int], batch: int) -> KnownScores:
        """Return what is known for batch number `batch`, of these samples, on the host."""
        self._write(batch - 2)
        start = batch // self._period * self._period
        rows = np.asarray(self._rows[self._slot(batch), np.array(numbers)])
        scored = rows["stamp"] - 1
        known = (start <= scored) & (scored <= batch - SETTLED)
        return KnownScores(torch.from_numpy(np.ascontiguousarray(rows["map"])), tuple(np.flatnonzero(~known).tolist()))

    def keep(self, numbers: Sequence[int], missing: Sequence[int], maps: UInt8[Tensor, "B N"], batch: int) -> None:
        """Take over the rows `missing` of what batch number `batch` scored.

        Args:
            numbers: of all samples of the batch.
            missing: rows that were not known, at least one.
            maps: (B, N) on any device, which is not waited for.
            batch: its number.
        """
        arrived = None
        if maps.is_cuda:
            host = torch.empty(maps.shape, dtype=maps.dtype, pin_memory=True)
            maps, arrived = host.copy_(maps, non_blocking=True), torch.cuda.Event()
            arrived.record()
        self._pending.append(_Scored(batch, [numbers[row] for row in missing], list(missing), maps, arrived))

    def flush(self) -> None:
        """Return when all that was kept is on the disk, from where a resume reads it."""
        if self._pending:
            self._write(self._pending[-1].batch)
        try:
            os.fsync(self._file)
        except OSError as error:
            self._tell(error)

    def remove(self) -> None:
        """Let go of the file, and remove it: no step of the run is left."""
        os.close(self._file)
        self._path.unlink(missing_ok=True)

    def _slot(self, batch: int) -> int:
        return batch // self._period % 2

    def _write(self, last: int) -> None:
        """Write what was scored up to batch number `last`."""
        while self._pending and self._pending[0].batch <= last:
            scored = self._pending.popleft()
            if scored.arrived is not None:
                scored.arrived.synchronize()
            rows = np.empty(len(scored.numbers), self._row)
            rows["map"], rows["stamp"] = scored.maps.numpy()[scored.rows], scored.batch + 1
            first = self._slot(scored.batch) * self._samples
            try:
                for number, row in zip(scored.numbers, rows, strict=True):
                    place = (first + number) * self._row.itemsize
                    if os.pwrite(self._file, row.tobytes(), place) < self._row.itemsize:
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError as error:
                self._tell(error)

    def _tell(self, error: OSError) -> None:
        """Warn, once: a row that is not there is scored when it is needed."""
        if not self._told:
            _log.warning("scores cannot be kept (%s): they are computed anew, and a resumed run may differ in rounding "
                         "and beyond", error.strerror or error)
        self._told = True


class _Scored(NamedTuple):
    """What a batch has scored, on its way to the host: rows of its maps, and the numbers of their samples."""

    batch: int
    numbers: list[int]
    rows: list[int]
    maps: Tensor
    arrived: Any


def row_of(patches: int) -> np.dtype[Any]:
    """Return how a sample lies in the file; the stamp, a batch's number and 1, comes last, so that a row that was not
    written whole has its old one; 0 where none was ever written."""
    return np.dtype([("map", np.uint8, (patches,)), ("stamp", np.int64)])


def check_processes(plan: Plan, parallel: Parallel) -> None:
    """Refuse what cannot keep scores; all ranks must call it.

    Raises:
        ConfigError: sharded weights, or processes on several machines.
    """
    kept = [p for p in plan.passes if p.spec.refresh > 1]
    if not kept or dist.world_size() == 1:
        return
    what = f"pass '{kept[0].spec.name}' has its scores serve for {kept[0].spec.refresh} epochs"
    if parallel == "fsdp":
        raise ConfigError(f"{what}, which --parallel fsdp cannot do, for processes that have nothing to score would be "
                          "waited for where weights are gathered: use --parallel ddp, or refresh=1")
    machines = len(set(dist.collect(_machine())))
    if machines > 1:
        raise ConfigError(f"{what}, in a file that all processes read and write, which they cannot do from {machines} "
                          "machines: use one, or refresh=1")


def open_caches(
    folder: Path, plan: Plan, *, samples: int, steps_per_epoch: int, fresh: bool
) -> dict[str, ScoreCache]:
    """Return the caches of a run by their passes' names; all ranks must call it.

    Args:
        folder: of the run.
        plan: says which passes keep their scores, and on how many patches.
        samples: in the training source.
        steps_per_epoch: whole batches in an epoch.
        fresh: whether the run starts, so that what lies there is none of its own.

    Raises:
        ConfigError: the file cannot be made.
    """
    kept = [p for p in plan.passes if p.spec.refresh > 1]
    for p in kept:
        if dist.rank() == 0:
            _provide(_path(folder, p), 2 * samples * row_of(p.num_patches).itemsize, fresh)
    if kept:
        dist.wait_for_all()
    return {p.spec.name: ScoreCache(_path(folder, p), samples=samples, patches=p.num_patches,
                                    refresh=p.spec.refresh, steps_per_epoch=steps_per_epoch) for p in kept}


def _path(folder: Path, p: PassPlan) -> Path:
    """Return where in a run's folder the scores of a pass lie."""
    return folder / f"scores-{p.spec.name}.rows"


def _provide(path: Path, size: int, fresh: bool) -> None:
    """Make the file, all zeros, unless it is there; it takes room on the disk as it is filled."""
    found = path.stat().st_size if path.exists() else None
    if found == size and not fresh:
        return
    if not fresh:
        what = "is gone" if found is None else f"has {found:,} bytes, not {size:,}"
        _log.warning("%s %s: scores are computed anew, and what follows is not bit for bit what it would have been",
                     path, what)
    try:
        path.unlink(missing_ok=True)
        with path.open("wb") as file:
            file.truncate(size)
    except OSError as error:
        raise ConfigError(f"cannot make {path}, where scores are kept: {error.strerror or error}") from error


def _machine() -> str:
    """Return what tells this machine, as it has been running, from others."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return boot.read_text() if boot.exists() else platform.node()
