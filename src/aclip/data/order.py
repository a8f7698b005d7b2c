"""In which order samples are seen: a function of (seed, epoch), sliced into the batches of a run."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from aclip import rng
from aclip.data.sources.base import WINDOW
from aclip.errors import ConfigError, DataError


class Request(NamedTuple):
    """A place in a run that one sample fills.

    Attributes:
        epoch: counted from 0.
        sample: its number in the source.
    """

    epoch: int
    sample: int


def epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    """Return a permutation of `range(count)`, (count,) int64, that depends on (seed, epoch) alone."""
    return rng.generator(seed, "order", epoch).permutation(count)


def window_order(groups: Sequence[int], seed: int, epoch: int, *, window: int = WINDOW) -> np.ndarray:
    """Return a permutation that stays within a few groups of consecutive samples at a time.

    The groups are permuted, taken `window` at a time, and the samples of each window are permuted: every sample
    once, and at any moment at most `window` groups (two windows' at a border) are needed.

    Args:
        groups: samples in each group.
        seed, epoch: what the order depends on, with the two above.
        window: groups that are mixed.

    Returns:
        (sum of groups,) int64.
    """
    generator = rng.generator(seed, "order", epoch)
    ends = np.cumsum(groups, dtype=np.int64)
    ranges = [np.arange(end - size, end) for size, end in zip(groups, ends.tolist(), strict=True)]
    order = generator.permutation(len(groups)).tolist()
    windows = [order[first : first + window] for first in range(0, len(order), window)]
    return np.concatenate([generator.permutation(np.concatenate([ranges[i] for i in chosen])) for chosen in windows])


class BatchSampler:
    """The requests of every optimizer step in [`start_step`, `total_steps`), for one rank.

    An epoch is `steps_per_epoch` batches of its own order; the pairs that do not fill a last batch are
    left out, other ones in every epoch. Epochs follow one another in one stream, so that nothing stops
    or restarts between them. A global batch is cut into contiguous slices, one a rank: together the
    ranks see exactly what one process would.

    Attributes:
        steps_per_epoch: whole batches in an epoch.
    """

    def __init__(
        self,
        count: int,
        *,
        batch_size: int,
        seed: int,
        start_step: int = 0,
        total_steps: int,
        rank: int = 0,
        world_size: int = 1,
        groups: Sequence[int] | None = None,
    ) -> None:
        """Plan the steps.

        Args:
            count: samples in the source.
            batch_size: pairs in a step, over all ranks.
            seed: of the order.
            start_step, total_steps: first step, and the one after the last.
            rank, world_size: of this process.
            groups: of a `Grouped` source: the order is then `window_order`, else `epoch_order`.

        Raises:
            ConfigError: a batch size that is not positive or not divisible by the number of ranks.
            DataError: fewer samples than one batch.
        """
        if batch_size < 1 or batch_size % world_size:
            raise ConfigError(
                f"batch_size must be a positive multiple of the number of processes, not {batch_size} "
                f"for {world_size}"
            )
        if count < batch_size:
            raise DataError(
                f"{count} pairs do not fill one batch of {batch_size}: lower the batch size or add pairs"
            )
        self.steps_per_epoch = count // batch_size
        self._count = count
        self._batch_size = batch_size
        self._seed = seed
        self._groups = groups
        self._steps = range(start_step, total_steps)
        local = batch_size // world_size
        self._slice = range(rank * local, (rank + 1) * local)

    def __len__(self) -> int:
        """Return the number of steps."""
        return len(self._steps)

    def __iter__(self) -> Iterator[list[Request]]:
        """Yield this rank's requests, step by step."""
        order, ordered_epoch = np.empty(0, dtype=np.int64), -1
        for step in self._steps:
            epoch, position = divmod(step, self.steps_per_epoch)
            if epoch != ordered_epoch:
                order, ordered_epoch = self._order(epoch), epoch
            first = position * self._batch_size
            mine = order[first + self._slice.start : first + self._slice.stop]
            yield [Request(epoch, sample) for sample in mine.tolist()]

    def _order(self, epoch: int) -> np.ndarray:
        if self._groups is None:
            return epoch_order(self._count, self._seed, epoch)
        return window_order(self._groups, self._seed, epoch)
