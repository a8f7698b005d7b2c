"""Pictures that look the same: candidates by hash, each confirmed by its fingerprint."""

from typing import Protocol

import numpy as np

RADIUS = 10
"""Bits of 128 by which the hashes of two copies may differ."""

LUMA_MEAN, LUMA_MAX, CHROMA_MAX = 4.0, 20, 12
"""Levels of 255 by which the fingerprints of two copies may differ: brightness on average, any cell's brightness,
any cell's colour. Wider limits find more strongly compressed copies, and join drawings such as keycap # and *."""

WINDOW = 64
"""Neighbours in sorted order that a picture is compared with, for each of the bands."""

_LUMA_CELLS = 16 * 16
_BANDS = 4
_BITS = 16


class Fingerprints(Protocol):
    """(n, PRINT_BYTES) uint8, in memory or on disk."""

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        """Return the fingerprints of some pictures."""
        ...


def look_alikes(across: np.ndarray, down: np.ndarray, fingerprints: Fingerprints) -> np.ndarray:
    """Return the group of every picture: groups are the connected components of pairs that look the same.

    The pictures are sorted by their hash, rotated so that each of its four 16-bit bands leads once, and each is
    compared with the next `WINDOW` that share the band. Hashes across that differ in up to three bits share a band,
    so a pair is missed only where a band has more pictures than the window. Time and memory grow as n log n and n.

    Args:
        across: (n,) uint64 hashes; see `PictureHashes`.
        down: (n,) uint64.
        fingerprints: (n, PRINT_BYTES) uint8, in memory or on disk: only those of candidates are read.

    Returns:
        (n,) int64: the smallest number of a picture in the same group.
    """
    parents = np.arange(len(across), dtype=np.int64)
    for band in range(_BANDS):
        turn = np.uint64(band * _BITS)
        back = np.uint64((64 - band * _BITS) % 64)
        turned = across if band == 0 else (across << turn) | (across >> back)
        order = np.lexsort((down, turned))
        lead = turned[order] >> np.uint64(64 - _BITS)
        for step in range(1, min(WINDOW, len(order) - 1) + 1):
            at = np.flatnonzero(lead[:-step] == lead[step:])
            if not len(at):
                break
            first, second = order[at], order[at + step]
            apart = parents[first] != parents[second]  # spares what is joined already; not exact, and need not be
            first, second = first[apart], second[apart]
            distance = np.bitwise_count(across[first] ^ across[second]).astype(np.int16)
            distance += np.bitwise_count(down[first] ^ down[second])
            close = distance <= RADIUS
            _join(parents, *_confirmed(first[close], second[close], fingerprints))
    return _roots(parents)


def _confirmed(first: np.ndarray, second: np.ndarray, fingerprints: Fingerprints) -> tuple[np.ndarray, np.ndarray]:
    """Return the pairs whose fingerprints agree."""
    agree = np.zeros(len(first), dtype=bool)
    for start in range(0, len(first), 4096):
        part = slice(start, start + 4096)
        difference = np.abs(fingerprints[first[part]].astype(np.int16) - fingerprints[second[part]])
        luma, chroma = difference[:, : _LUMA_CELLS], difference[:, _LUMA_CELLS :]
        agree[part] = (luma.mean(1) <= LUMA_MEAN) & (luma.max(1) <= LUMA_MAX) & (chroma.max(1) <= CHROMA_MAX)
    return first[agree], second[agree]


def _join(parents: np.ndarray, first: np.ndarray, second: np.ndarray) -> None:
    for a, b in zip(first.tolist(), second.tolist(), strict=True):
        low, high = sorted((_root(parents, a), _root(parents, b)))
        parents[high] = low


def _root(parents: np.ndarray, one: int) -> int:
    while parents[one] != one:
        parents[one] = parents[parents[one]]
        one = int(parents[one])
    return one


def _roots(parents: np.ndarray) -> np.ndarray:
    while True:
        above = parents[parents]
        if np.array_equal(above, parents):
            return parents
        parents = above
