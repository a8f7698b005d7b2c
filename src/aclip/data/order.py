"""In which order samples are seen: a function of (seed, epoch), sliced into the batches of a run."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from aclip.data.sources.base import Source
from aclip.errors import ConfigError, DataError


class Request(NamedTuple):
    """One place in a batch."""

    epoch: int  # of the run, or in a mixture the pass over the sample's own source; crops and caption depend on it
    sample: int  # its number in the source


class BatchSampler:
    """The requests of the optimizer steps [`start_step`, `total_steps`), for one rank.

    An epoch is `steps_per_epoch` batches of its own order; the last places, which do not fill a batch, are dropped,
    and their samples come again in the next epoch, or in a mixture in the next pass over their source. A global batch
    is cut into contiguous slices, one per rank: together the ranks see what one process would.

    Args:
        source: its samples are requested, in the order of `source.order`.
        batch_size: pairs in a step, over all ranks.
        seed: of the order.
        start_step, total_steps: first step, and the one after the last.
        rank, world_size: of this process.

    Raises:
        ConfigError: a batch size that is not positive or not divisible by the number of ranks.
        DataError: fewer samples than one batch.
    """

    def __init__(self, source: Source, *, batch_size: int, seed: int, total_steps: int, start_step: int = 0,
                 rank: int = 0, world_size: int = 1) -> None:
        if batch_size < 1 or batch_size % world_size:
            raise ConfigError(
                f"batch_size must be a positive multiple of the number of processes, not {batch_size} for {world_size}")
        if len(source) < batch_size:
            raise DataError(
                f"{len(source)} pairs do not fill one batch of {batch_size}: lower the batch size or add pairs")
        self.steps_per_epoch = len(source) // batch_size
        self._source, self._seed, self._batch_size = source, seed, batch_size
        self._steps = range(start_step, total_steps)
        self._start, self._end = rank * batch_size // world_size, (rank + 1) * batch_size // world_size

    def __len__(self) -> int:
        """Return the number of steps."""
        return len(self._steps)

    def __iter__(self) -> Iterator[list[Request]]:
        """Yield this rank's requests, step by step."""
        samples = passes = np.empty(0, dtype=np.int64)
        ordered_epoch = -1
        for step in self._steps:
            epoch, position = divmod(step, self.steps_per_epoch)
            if epoch != ordered_epoch:
                (samples, passes), ordered_epoch = self._source.order(self._seed, epoch), epoch
            first = position * self._batch_size
            mine = slice(first + self._start, first + self._end)
            yield list(map(Request, passes[mine].tolist(), samples[mine].tolist()))
