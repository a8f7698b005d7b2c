"""In which order samples are seen: a function of (seed, epoch), sliced into the batches of a run."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from aclip import rng
from aclip.data.sources.base import Source
from aclip.errors import ConfigError, DataError


class Request(NamedTuple):
    """One place in a batch."""

    epoch: int  # of the run, or in a mixture the pass over the sample's own source; crops and caption depend on it
    sample: int  # its number in the source


class Groups(NamedTuple):
    """Samples that are alike come into batches together, as each other's hard negatives."""

    clusters: np.ndarray  # (N,) int32, the cluster of every sample of the source; -1: of none
    size: int  # samples of one cluster in a group


class BatchSampler:
    """The requests of the optimizer steps [`start_step`, `total_steps`), for one rank.

    An epoch is `steps_per_epoch` batches of its own order; the last places, which do not fill a batch, are dropped,
    and their samples come again in the next epoch, or in a mixture in the next pass over their source. A global batch
    is cut into contiguous slices, one per rank: together the ranks see what one process would. With `groups` the order
    is rearranged into groups (`grouped`) within the spans of the source (`Source.spans`).

    Raises:
        ConfigError: a batch size that is not positive or not divisible by the number of ranks.
        DataError: fewer samples than one batch.
    """

    def __init__(self, source: Source, *, batch_size: int, seed: int, total_steps: int, start_step: int = 0,
                 rank: int = 0, world_size: int = 1, groups: Groups | None = None) -> None:
        if batch_size < 1 or batch_size % world_size:
            raise ConfigError(
                f"batch_size must be a positive multiple of the number of processes, not {batch_size} for {world_size}")
        if len(source) < batch_size:
            raise DataError(
                f"{len(source)} pairs do not fill one batch of {batch_size}: lower the batch size or add pairs")
        self.steps_per_epoch = len(source) // batch_size
        self._source, self._seed, self._batch_size, self._groups = source, seed, batch_size, groups
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
                (samples, passes), ordered_epoch = self._order(epoch), epoch
            first = position * self._batch_size
            mine = slice(first + self._start, first + self._end)
            yield list(map(Request, passes[mine].tolist(), samples[mine].tolist()))

    def _order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        samples, passes = self._source.order(self._seed, epoch)
        if self._groups is None:
            return samples, passes
        places = grouped(self._groups.clusters[samples], self._groups.size, self._source.spans(self._seed, epoch),
                         rng.generator(self._seed, "groups", epoch))
        return samples[places], passes[places]


def grouped(clusters: np.ndarray, size: int, spans: Sequence[int], generator: np.random.Generator) -> np.ndarray:
    """Return a permutation that brings samples of one cluster together, `size` at a time.

    In every span the samples of each cluster are cut into groups in the order in which they are; what is left of the
    clusters, and the samples of none, make groups of whatever comes next; and the groups are shuffled. Spans end at
    multiples of `size`, so that every group begins at one.

    Args:
        clusters: (n,) int, of the samples in a random order; -1: of none.
        spans: lengths, n together.

    Returns:
        (n,) int64; the last n % size places hold the last of what is left.
    """
    ends = np.cumsum(spans) // size * size
    ends[-1] = len(clusters)
    places = []
    for start, end in zip([0, *ends[:-1].tolist()], ends.tolist(), strict=True):
        by_cluster = start + np.argsort(clusters[start:end], kind="stable")
        found, first, counts = np.unique(clusters[by_cluster], return_index=True, return_counts=True)
        whole = np.where(found < 0, 0, counts // size * size)  # samples of each cluster that fill its groups
        in_groups = np.arange(len(by_cluster)) - np.repeat(first, counts) < np.repeat(whole, counts)
        rest = np.sort(by_cluster[~in_groups])
        filled = len(rest) // size * size
        groups = np.concatenate([by_cluster[in_groups], rest[:filled]]).reshape(-1, size)
        places += [generator.permutation(groups).ravel(), rest[filled:]]
    return np.concatenate(places)
