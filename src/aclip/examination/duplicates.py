"""Which images of one or several sources are the same, by their bytes or by their looks."""

from collections.abc import Sequence

import numpy as np
import pandas

from aclip.examination.measure import Measurements

RADIUS = 10  # bits of 128 by which the hashes of two copies may differ

# Levels of 255 by which the fingerprints of two copies may differ: brightness on average, any cell's brightness,
# any cell's colour. Wider limits find more strongly compressed copies, and join drawings such as keycap # and *.
LUMA_MEAN, LUMA_MAX, CHROMA_MAX = 4.0, 20, 12

_WINDOW = 64  # neighbours in sorted order that an image is compared with, for each of the bands
_LUMA_CELLS = 16 * 16


def find_duplicates(measured: Sequence[Measurements]) -> tuple[np.ndarray, ...]:
    """Compare all images of all sources with each other; blank and dark ones by their bytes alone.

    Returns:
        For each source the (n,) int64 group of every image, -1 if it cannot be decoded: images of one group, in any
        source, have the same bytes or look the same.
    """
    samples = pandas.concat([one.samples for one in measured], ignore_index=True)
    rows = samples.index.to_series()
    first = rows.groupby(samples["content"]).transform("min").to_numpy()  # of the same file
    distinct = np.flatnonzero(samples["decoded"] & (first == rows) & ~samples["blank"] & ~samples["dark"])
    fingerprints = np.concatenate([one.fingerprints for one in measured])[distinct]
    hashes = (samples[name].to_numpy()[distinct] for name in ("across", "down"))
    look_of = rows.to_numpy().copy()
    look_of[distinct] = distinct[look_alikes(*hashes, fingerprints)]
    groups = np.where(samples["decoded"], look_of[first], -1)
    return tuple(np.split(groups, np.cumsum([len(one.samples) for one in measured])[:-1]))


def look_alikes(across: np.ndarray, down: np.ndarray, fingerprints: np.ndarray) -> np.ndarray:
    """Return the group of every image: groups are the connected components of pairs that look the same.

    The images are sorted by their hash, rotated so that each of its four 16-bit bands leads once, and each is compared
    with the next 64 that share the band. Hashes across that differ in up to three bits share a band, so a pair
    is missed only where a band has more images than the window. Time and memory grow as n log n and n.

    Args:
        across, down: (n,) uint64 hashes; see `look_at`.
        fingerprints: (n, PRINT_BYTES) uint8; they confirm what the hashes propose.

    Returns:
        (n,) int64: the smallest number of an image in the same group.
    """
    groups = np.arange(len(across), dtype=np.int64)
    for turn in (0, 16, 32, 48):
        turned = (across << np.uint64(turn)) | (across >> np.uint64((64 - turn) % 64))
        order = np.lexsort((down, turned))
        lead = turned[order] >> np.uint64(48)
        for step in range(1, min(_WINDOW, len(order) - 1) + 1):
            at = np.flatnonzero(lead[:-step] == lead[step:])
            if not len(at):
                break
            first, second = order[at], order[at + step]
            apart = groups[first] != groups[second]
            first, second = first[apart], second[apart]
            distance = np.bitwise_count(across[first] ^ across[second]).astype(np.int16)
            distance += np.bitwise_count(down[first] ^ down[second])
            close = distance <= RADIUS
            first, second = _confirmed(first[close], second[close], fingerprints)
            if len(first):
                groups = _join(groups, first, second)
    return groups


def _confirmed(first: np.ndarray, second: np.ndarray, fingerprints: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the pairs whose fingerprints agree."""
    agree = np.zeros(len(first), dtype=bool)
    for start in range(0, len(first), 4096):
        part = slice(start, start + 4096)
        difference = np.abs(fingerprints[first[part]].astype(np.int16) - fingerprints[second[part]])
        luma, chroma = difference[:, :_LUMA_CELLS], difference[:, _LUMA_CELLS:]
        agree[part] = (luma.mean(1) <= LUMA_MEAN) & (luma.max(1) <= LUMA_MAX) & (chroma.max(1) <= CHROMA_MAX)
    return first[agree], second[agree]


def _join(groups: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return the groups with those of each pair joined."""
    from scipy.sparse import coo_array  # type: ignore[import-untyped]
    from scipy.sparse.csgraph import connected_components  # type: ignore[import-untyped]

    edges = coo_array((np.ones(len(first)), (groups[first], groups[second])), shape=(len(groups), len(groups)))
    _, labels = connected_components(edges, directed=False)
    _, smallest, inverse = np.unique(labels[groups], return_index=True, return_inverse=True)
    joined: np.ndarray = smallest[inverse]
    return joined
