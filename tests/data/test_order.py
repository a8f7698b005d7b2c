"""The order of samples: permutations, whole epochs, ranks that add up."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aclip.data.order import BatchSampler
from aclip.errors import ConfigError, DataError
from tests_support import Numbers

COUNTS = st.integers(1, 60)
SEEDS = st.integers(0, 2**40)


@given(count=COUNTS, seed=SEEDS, epoch=st.integers(0, 9))
def test_an_epoch_is_a_permutation_and_a_function_of_its_arguments(count: int, seed: int, epoch: int) -> None:
    order, passes = Numbers(count).order(seed, epoch)
    assert sorted(order.tolist()) == list(range(count))
    assert passes.tolist() == [epoch] * count
    assert np.array_equal(order, Numbers(count).order(seed, epoch)[0])


def test_epochs_and_seeds_differ() -> None:
    orders = {tuple(Numbers(50).order(seed, epoch)[0]) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


@given(
    batches=st.integers(1, 5),
    local=st.integers(1, 4),
    ranks=st.integers(1, 4),
    extra=st.integers(0, 3),
    start=st.integers(0, 12),
    seed=SEEDS,
)
def test_streams(batches: int, local: int, ranks: int, extra: int, start: int, seed: int) -> None:
    batch_size = local * ranks
    count = batches * batch_size + min(extra, batch_size - 1)

    def stream(start_step: int, rank: int = 0, world_size: int = 1) -> list[list[tuple[int, int]]]:
        sampler = BatchSampler(
            Numbers(count),
            batch_size=batch_size,
            seed=seed,
            start_step=start_step,
            total_steps=13,
            rank=rank,
            world_size=world_size,
        )
        assert sampler.steps_per_epoch == batches
        steps = list(sampler)
        assert len(steps) == len(sampler)
        return steps

    whole = stream(0)
    assert len(whole) == 13
    assert [{epoch for epoch, _ in step} for step in whole] == [{step // batches} for step in range(13)]
    requests = [request for step in whole for request in step]
    assert len(set(requests)) == len(requests) == 13 * batch_size  # each sample at most once an epoch
    assert stream(start) == whole[start:]
    shares = zip(*(stream(0, rank, ranks) for rank in range(ranks)), strict=True)
    assert [[request for part in step for request in part] for step in shares] == whole


def test_two_epochs_leave_out_different_samples() -> None:
    sampler = BatchSampler(Numbers(101), batch_size=100, seed=0, total_steps=30)
    left_out = {(set(range(101)) - {sample for _, sample in step}).pop() for step in sampler}
    assert len(left_out) > 15


def test_impossible_batches() -> None:
    with pytest.raises(ConfigError, match="not 10 for 4"):
        BatchSampler(Numbers(100), batch_size=10, seed=0, total_steps=1, world_size=4)
    with pytest.raises(ConfigError, match="not 0"):
        BatchSampler(Numbers(100), batch_size=0, seed=0, total_steps=1)
    with pytest.raises(DataError, match="7 pairs do not fill one batch of 8"):
        BatchSampler(Numbers(7), batch_size=8, seed=0, total_steps=1)
