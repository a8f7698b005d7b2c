"""Draws are functions of seed, epoch, sample and purpose alone."""

import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
import torch

from aclip import rng

SPLITMIX64_FROM_0 = (0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F)  # the published vectors


def splitmix64(state: int, count: int) -> list[int]:
    """The generator of Steele, Lea and Flood, in Python's unbounded integers."""
    outputs, word = [], 2**64 - 1
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) & word
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & word
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & word
        outputs.append(z ^ (z >> 31))
    return outputs


def test_uniform_gives_the_published_splitmix64_vectors() -> None:
    draws = rng.uniform(torch.tensor([0]), 3, "")  # crc32("") is 0, so the state starts at 0
    assert draws[0].tolist() == [(z >> 40) / 2**24 for z in SPLITMIX64_FROM_0]


@pytest.mark.parametrize("seed", [0, 1, 12345, 2**63 - 1])
@pytest.mark.parametrize("purpose", ["", "mask/masked/a", "patches"])
def test_uniform_equals_splitmix64_in_unbounded_integers(seed: int, purpose: str) -> None:
    start = seed * 0xBF58476D1CE4E5B9 + rng.stable_hash(purpose) * 0x9E3779B97F4A7C15
    expected = [(z >> 40) / 2**24 for z in splitmix64(start % 2**64, 20)]
    assert rng.uniform(torch.tensor([seed]), 20, purpose)[0].tolist() == expected


def test_uniform_rows_do_not_depend_on_the_batch() -> None:
    seeds = torch.arange(100, 120)
    full = rng.uniform(seeds, 49, "mask")
    assert torch.equal(rng.uniform(seeds[[7, 3]], 49, "mask"), full[[7, 3]])
    assert torch.equal(rng.uniform(seeds, 7, "mask"), full[:, :7])


def test_uniform_is_uniform_and_uncorrelated_over_sequential_seeds() -> None:
    draws = rng.uniform(torch.arange(2000), 50, "mask").double()
    assert draws.min() >= 0
    assert draws.max() < 1
    counts = torch.histc(draws, bins=100, min=0, max=1)
    assert ((counts - 1000) ** 2 / 1000).sum() < 170  # 99 degrees of freedom: 1 in 10^5
    for other in (draws.roll(1, 0), draws.roll(1, 1), rng.uniform(torch.arange(2000), 50, "other").double()):
        assert abs(torch.corrcoef(torch.stack([draws.flatten(), other.flatten()]))[0, 1]) < 0.015


def test_global_generators_are_neither_read_nor_advanced() -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002 - the state under test
    first = rng.uniform(torch.tensor([5]), 9, "x"), rng.generator(1, "crop", 2).random(9)
    torch.manual_seed(99)
    again = rng.uniform(torch.tensor([5]), 9, "x"), rng.generator(1, "crop", 2).random(9)
    torch.set_rng_state(before[0])
    assert torch.equal(first[0], again[0])
    assert np.array_equal(first[1], again[1])
    assert np.array_equal(np.random.get_state()[1], before[1])  # noqa: NPY002


def test_every_part_of_a_purpose_changes_the_draw() -> None:
    purposes = [
        (0, "crop", 1, 2, "a"),
        (1, "crop", 1, 2, "a"),
        (0, "blur", 1, 2, "a"),
        (0, "crop", 2, 2, "a"),
        (0, "crop", 1, 3, "a"),
        (0, "crop", 1, 2, "b"),
        (0, "crop", 2, 1, "a"),
    ]
    draws = [rng.generator(*p).random(4) for p in purposes]
    assert all(not np.isclose(a, b).any() for i, a in enumerate(draws) for b in draws[:i])


def test_sample_seeds_fit_int64_and_differ() -> None:
    seeds = [rng.sample_seed(s, e, i) for s in range(5) for e in range(5) for i in range(100)]
    assert len(set(seeds)) == len(seeds)
    assert min(seeds) >= 0
    assert max(seeds) < 2**63
    assert max(seeds) > 2**61  # most of the range is used
    assert any(b < a for a, b in pairwise(seeds))


def test_draws_are_the_same_in_another_process() -> None:
    code = (
        "from aclip import rng; import torch; "
        "print(rng.sample_seed(1, 2, 3), rng.generator(1, 'crop', 4).integers(10**9), "
        "rng.uniform(torch.tensor([7]), 1, 'mask').item())"
    )
    # Python randomises hash() per process, which must have no effect
    out = subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        capture_output=True,
        text=True,
        env={"PYTHONHASHSEED": "4242", "OMP_NUM_THREADS": "1"},
    ).stdout
    expected = (
        rng.sample_seed(1, 2, 3),
        rng.generator(1, "crop", 4).integers(10**9),
        rng.uniform(torch.tensor([7]), 1, "mask").item(),
    )
    assert out.split() == [str(value) for value in expected]
