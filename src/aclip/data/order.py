"""In which order samples are seen: a function of (seed, epoch), sliced into the batches of a run."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

from aclip import rng
from aclip.data.sources.base import WINDOW, Grouped, Source
from aclip.errors import ConfigError, DataError


class Request(NamedTuple):
    """A place in a run that one sample fills.

    Attributes:
        epoch: how often the sample has come before, from which its crops and caption are drawn; that of the run,
            except in a mixture.
        sample: its number in the source.
    """

    epoch: int
    sample: int


Order = Callable[[int, int], tuple[np.ndarray, np.ndarray]]
"""Maps (seed, epoch) to the samples of an epoch and, for each, the `Request.epoch` to read it with: (n,) int64."""


@runtime_checkable
class Ordered(Protocol):
    """A source with an order of its own; whatever it is, it is a function of its arguments alone."""

    def order(self, seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return an epoch as `Order` has it, as long as the source."""
        ...


def order_of(source: Source) -> Order:
    """Return how a source is gone through: in its own order, within windows of its groups, or all mixed."""

    def order(seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        if isinstance(source, Ordered):
            return source.order(seed, epoch)
        if isinstance(source, Grouped):
            samples = window_order(source.groups, seed, epoch)
        else:
            samples = epoch_order(len(source), seed, epoch)
        return samples, np.full(len(samples), epoch, dtype=np.int64)

    return order


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
        source: Source,
        *,
        batch_size: int,
        seed: int,
        start_step: int = 0,
        total_steps: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """Plan the steps.

        Args:
            source: whose samples are requested, in the order of `order_of`.
            batch_size: pairs in a step, over all ranks.
            seed: of the order.
            start_step, total_steps: first step, and the one after the last.
            rank, world_size: of this process.

        Raises:
            ConfigError: a batch size that is not positive or not divisible by the number of ranks.
            DataError: fewer samples than one batch.
        """
        if batch_size < 1 or batch_size % world_size:
            raise ConfigError(
                f"batch_size must be a positive multiple of the number of processes, not {batch_size} "
                f"for {world_size}"
            )
        if len(source) < batch_size:
            raise DataError(
                f"{len(source)} pairs do not fill one batch of {batch_size}: lower the batch size or add pairs"
            )
        self.steps_per_epoch = len(source) // batch_size
        self._order = order_of(source)
        self._batch_size = batch_size
        self._seed = seed
        self._steps = range(start_step, total_steps)
        local = batch_size // world_size
        self._slice = range(rank * local, (rank + 1) * local)

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
                (samples, passes), ordered_epoch = self._order(self._seed, epoch), epoch
            first = position * self._batch_size
            mine = slice(first + self._slice.start, first + self._slice.stop)
            yield list(map(Request, passes[mine].tolist(), samples[mine].tolist()))
