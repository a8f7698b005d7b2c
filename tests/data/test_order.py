"""The order of samples: permutations, whole epochs, ranks that add up."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aclip import rng
from aclip.data.order import BatchSampler, Groups, grouped
from aclip.data.sources.base import WINDOW
from aclip.data.sources.combined import Mixture
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


# groups of samples that are alike


@given(
    clusters=st.lists(st.integers(-1, 4), min_size=1, max_size=80), size=st.integers(2, 6), seed=SEEDS,
    cuts=st.lists(st.integers(0, 80), max_size=4),
)
def test_groups_are_of_one_cluster_and_only_what_is_left_is_mixed(
    clusters: list[int], size: int, seed: int, cuts: list[int]
) -> None:
    ends = sorted({min(cut, len(clusters)) for cut in cuts} | {len(clusters)})
    spans = np.diff([0, *ends]).tolist()
    places = grouped(np.array(clusters), size, spans, rng.generator(seed, "groups"))
    assert np.array_equal(places, grouped(np.array(clusters), size, spans, rng.generator(seed, "groups")))
    assert sorted(places.tolist()) == list(range(len(clusters)))
    starts = [0, *(end // size * size for end in ends[:-1])]
    for start, end in zip(starts, [*starts[1:], len(clusters)], strict=True):
        assert sorted(places[start:end].tolist()) == list(range(start, end))  # spans stay where they are
        seen = [clusters[place] for place in places[start:end].tolist()]
        groups = [seen[first : first + size] for first in range(0, len(seen) // size * size, size)]
        alike = [group[0] for group in groups if len(set(group)) == 1 and group[0] >= 0]
        for cluster in range(5):  # of each as many as its samples fill; chance may make more of what is left
            assert alike.count(cluster) >= clusters[start:end].count(cluster) // size


def test_groups_and_their_places_differ_from_epoch_to_epoch() -> None:
    source, groups = Numbers(64), Groups(np.arange(64, dtype=np.int32) % 4, 4)
    epochs = [[[sample for _, sample in step] for step in BatchSampler(
        source, batch_size=8, seed=seed, total_steps=16, groups=groups)] for seed in range(2)]
    assert epochs[0] != epochs[1]
    for steps in epochs:
        for first in (0, 8):
            assert sorted(sample for step in steps[first : first + 8] for sample in step) == list(range(64))
        fours = [tuple(step[at : at + 4]) for step in steps for at in (0, 4)]
        assert all(len({sample % 4 for sample in four}) == 1 for four in fours)
        assert len(set(map(frozenset, fours))) > 28  # of 32: hardly a group comes twice


@given(ranks=st.sampled_from([1, 2, 3]), start=st.integers(0, 12), seed=SEEDS, shards=st.booleans())
def test_ranks_and_resumption_see_the_same_groups(ranks: int, start: int, seed: int, shards: bool) -> None:
    count = 50
    clusters = rng.generator(seed, "test").integers(-1, 5, count).astype(np.int32)
    source = Numbers(count, groups=(3,) * 16 + (2,) if shards else ())

    def stream(start_step: int = 0, **place: int) -> list[list[tuple[int, int]]]:
        return list(BatchSampler(source, batch_size=12, seed=seed, start_step=start_step, total_steps=13,
                                 groups=Groups(clusters, 4), **place))

    whole = stream()
    assert stream(start) == whole[start:]
    shares = zip(*(stream(rank=rank, world_size=ranks) for rank in range(ranks)), strict=True)
    assert [[request for part in step for request in part] for step in shares] == whole


def test_samples_stay_in_their_window_of_groups() -> None:
    shards = (10,) * 30
    source = Numbers(300, shards)
    assert source.spans(3, 1) == [10 * WINDOW] * 3 + [60]
    (sampler,) = [BatchSampler(source, batch_size=20, seed=3, total_steps=15, groups=Groups(
        np.arange(300, dtype=np.int32) % 7, 4))]
    seen = [sample for step in sampler for _, sample in step]
    order = source.order(3, 0)[0].tolist()
    for first in range(0, 300, 10 * WINDOW):
        assert set(seen[first : first + 10 * WINDOW]) == set(order[first : first + 10 * WINDOW])
    assert seen != order


def test_a_mixture_is_rearranged_as_a_whole_unless_it_is_read_by_groups() -> None:
    mixture = Mixture("both", [Numbers(30), Numbers(10)], [1, 1])
    clusters = np.arange(40, dtype=np.int32) % 2
    sampler = BatchSampler(mixture, batch_size=20, seed=0, total_steps=4, groups=Groups(clusters, 4))
    for number, step in enumerate(sampler):
        epoch, half = divmod(number, 2)
        if half == 0:
            whole = sorted(zip(*(column.tolist() for column in mixture.order(0, epoch)), strict=True))
            seen = []
        seen += [(request.sample, request.epoch) for request in step]
        if half:
            assert sorted(seen) == whole
    with pytest.raises(ConfigError, match=r"cannot be drawn from a mixture with remote shards or row groups, as both"):
        Mixture("both", [Numbers(30), Numbers(10, (5, 5))], [1, 1]).spans(0, 0)
