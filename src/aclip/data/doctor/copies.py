"""Which pictures of one or several sources are the same, by their bytes or by their looks."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from aclip.data.doctor.measure import Measurements
from aclip.data.doctor.near_duplicates import look_alikes


@dataclass(frozen=True)
class Copies:
    """The pictures of all sources, numbered through, in groups of the same.

    Attributes:
        starts: (sources + 1,) the number of each source's first sample.
        by_file: (n,) the smallest number among samples of the same bytes; -1 where the picture cannot be decoded.
        by_look: (n,) likewise among those that look the same, or have the same bytes.
    """

    starts: np.ndarray
    by_file: np.ndarray
    by_look: np.ndarray


def find_copies(measured: Sequence[Measurements]) -> Copies:
    """Compare all pictures of all sources with each other; blank ones are compared by their bytes alone."""
    samples = np.concatenate([one.samples for one in measured])
    starts = np.cumsum([0, *(len(one.samples) for one in measured)])
    by_file = np.full(len(samples), -1, dtype=np.int64)
    decoded = np.flatnonzero(samples["decoded"])
    _, first, inverse = np.unique(samples["content"][decoded], return_index=True, return_inverse=True)
    by_file[decoded] = decoded[first[inverse]]

    distinct = decoded[np.sort(first)]
    distinct = distinct[~samples["blank"][distinct]]
    prints = _Gathered([one.fingerprints for one in measured], starts, distinct)
    groups = look_alikes(samples["across"][distinct], samples["down"][distinct], prints)
    look_of = np.arange(len(samples))
    look_of[distinct] = distinct[groups]
    return Copies(starts, by_file, np.where(by_file < 0, -1, look_of[by_file]))


class _Gathered:
    """Reads rows of several arrays as if they were one, with some of the rows left out."""

    def __init__(self, parts: Sequence[np.ndarray], starts: np.ndarray, rows: np.ndarray) -> None:
        self._parts, self._starts, self._rows = parts, starts, rows

    def __getitem__(self, wanted: np.ndarray) -> np.ndarray:
        rows = self._rows[wanted]
        found = np.empty((len(rows), self._parts[0].shape[1]), self._parts[0].dtype)
        for part, start, end in zip(self._parts, self._starts[:-1], self._starts[1:], strict=True):
            inside = (rows >= start) & (rows < end)
            found[inside] = part[rows[inside] - start]
        return found
