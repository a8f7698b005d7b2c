"""Counter-based randomness: every draw is a function of (seed, epoch, sample, purpose).

No generator state is shared, so a sample gets the same crop, colours and mask in any process, at any position of a
batch, with any number of workers or micro-batches, and after a resume.
"""

import zlib

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

# Multipliers and increments of the splitmix64 finaliser (Steele, Lea, Flood: "Fast splittable
# pseudorandom number generators", OOPSLA 2014), as signed 64-bit integers for torch.
_GAMMA = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX_2 = 0x94D049BB133111EB - (1 << 64)


def stable_hash(text: str) -> int:
    """Return a 32-bit hash of `text` that is the same in every process and release."""
    return zlib.crc32(text.encode())


def generator(seed: int, *purpose: int | str) -> np.random.Generator:
    """Return numpy's generator for one purpose, e.g. `generator(seed, "crop", epoch, sample, "a")`."""
    words = [word if isinstance(word, int) else stable_hash(word) for word in purpose]
    return np.random.Generator(np.random.Philox(_sequence(seed, *words)))


def _sequence(*words: int) -> np.random.SeedSequence:
    """Return `SeedSequence(words)`, built twice as fast from an array where every word has 32 bits."""
    small = min(words) >= 0 and max(words) < 2**32
    return np.random.SeedSequence(np.array(words, dtype=np.uint32) if small else words)


def sample_seed(seed: int, epoch: int, sample: int) -> int:
    """Return the non-negative 63-bit seed of all draws on the device for this sample in this epoch."""
    state = _sequence(seed, epoch, sample, stable_hash("device")).generate_state(1, np.uint64)
    return int(state[0] >> np.uint64(1))


def uniform(seeds: Int[Tensor, " B"], count: int, purpose: str) -> Float[Tensor, "B count"]:
    """Return uniform draws in [0, 1), row b a function of (seeds[b], purpose) alone.

    The splitmix64 finaliser of `seed * mix + (hash(purpose) + i + 1) * gamma` in wrapping int64 arithmetic: the same
    bits on every device, without generator state and without host synchronisation.

    Args:
        seeds: (B,) int64, one per sample, see `sample_seed`.
        count: draws per sample.
        purpose: separates streams that share a seed, e.g. "mask/0/a".

    Returns:
        (B, count) float32 with 24 random bits each.
    """
    counter = torch.arange(1, count + 1, device=seeds.device, dtype=torch.int64) * _GAMMA
    offset = (stable_hash(purpose) * _GAMMA + 2**63) % 2**64 - 2**63  # wrapped like int64 tensors
    x = seeds[:, None] * _MIX_1 + offset + counter
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    x = x ^ _shift_right(x, 31)
    return _shift_right(x, 40).to(torch.float32) * 2.0**-24


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Shift logically; torch's >> on int64 is arithmetic."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
