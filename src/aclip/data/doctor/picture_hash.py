"""What a picture looks like in a few numbers: to find copies of it in another size, format or quality."""

from typing import NamedTuple

import numpy as np
from PIL import Image

DECODED_SIDE = 64
"""A JPEG is decoded no larger than needed for both sides to have so many pixels."""

PRINT_BYTES = 16 * 16 + 2 * 4 * 4
"""Cells of a fingerprint."""

SHRUNK = (16, 16, 3)
"""Shape of what `shrink` returns."""

_MARGIN = 2.0  # levels of 255 that a cell must be brighter by: in flat areas noise decides about less
_BLANK = 8  # levels of 255
_TO_YCC = np.array([[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]], np.float32)
"""RGB to brightness and two colour differences; ITU-T T.871 (JFIF), section 7."""


class PictureHashes(NamedTuple):
    """What is kept of B pictures.

    Attributes:
        across, down: (B,) uint64 difference hashes: bit (r, c) says whether cell (r, c) of 8 x 8 is brighter than the
            next to the right, or below; the last cell's next is the first.
        fingerprints: (B, PRINT_BYTES) uint8: 16 x 16 cells of brightness, then 4 x 4 of Cb and of Cr.
        blank: (B,) whether no cell differs from another by more than 8 levels of 255: the hashes then say nothing.
    """

    across: np.ndarray
    down: np.ndarray
    fingerprints: np.ndarray
    blank: np.ndarray


def shrink(image: Image.Image) -> np.ndarray:
    """Return an RGB picture squeezed into (16, 16, 3) uint8, for `hash_pictures`."""
    return np.asarray(image.resize(SHRUNK[:2], Image.Resampling.BILINEAR, reducing_gap=1.0))


def hash_pictures(shrunk: np.ndarray) -> PictureHashes:
    """Return hashes and fingerprints of (B, 16, 16, 3) uint8 pictures from `shrink`."""
    colours = shrunk.astype(np.float32) @ _TO_YCC.T + np.array([0, 128, 128], np.float32)
    cells = colours[..., 0]
    chroma = [_cells(colours[..., i], 4).reshape(len(shrunk), -1) for i in (1, 2)]
    coarse = _cells(cells, 8)
    fingerprints = np.concatenate([cells.reshape(len(shrunk), -1), *chroma], axis=1)
    fingerprints = fingerprints.round().clip(0, 255).astype(np.uint8)
    spread = np.stack([np.ptp(part, axis=1) for part in np.split(fingerprints, [256, 272], axis=1)])
    return PictureHashes(
        _pack(coarse > np.roll(coarse, -1, axis=2) + _MARGIN),
        _pack(coarse > np.roll(coarse, -1, axis=1) + _MARGIN),
        fingerprints,
        spread.max(axis=0) <= _BLANK,
    )


def _cells(values: np.ndarray, side: int) -> np.ndarray:
    """Return the means of side x side cells of (B, H, H) values."""
    step = values.shape[1] // side
    means: np.ndarray = values.reshape(len(values), side, step, side, step).mean(axis=(2, 4))
    return means


def _pack(bits: np.ndarray) -> np.ndarray:
    return np.packbits(bits.reshape(len(bits), 64), axis=1).view(np.uint64)[:, 0]
