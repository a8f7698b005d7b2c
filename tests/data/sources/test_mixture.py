"""Mixtures: shares are kept, no sample comes twice before all have come, and weights are read as they are meant."""

from collections import Counter
from itertools import accumulate
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from aclip.data import open_training
from aclip.data.sources import Mixture, Part, Source
from aclip.data.sources.base import window_order
from aclip.data.sources.combined import open_mixture
from aclip.data.spec import parse_spec
from aclip.errors import AclipError, ConfigError, DataError
from tests_support import Numbers


def owners(mixture: Mixture) -> list[int]:
    return [number for number, source in enumerate(mixture.parts) for _ in range(len(source))]


@settings(deadline=None)
@given(
    sources=st.lists(st.tuples(st.integers(1, 30), st.floats(0.05, 20)), min_size=1, max_size=4),
    epochs=st.integers(1, 5), seed=st.integers(0, 2**40),
)  # fmt: skip
def test_shares_and_passes(sources: list[tuple[int, float]], epochs: int, seed: int) -> None:
    sizes, weights = zip(*sources, strict=True)
    assume(sum(sizes) * max(weights) / sum(weights) >= len(sizes))
    mixture = Mixture("m", [Numbers(size) for size in sizes], weights)
    owner = owners(mixture)
    seen: list[Counter[int]] = [Counter() for _ in sizes]
    requests = set()
    for epoch in range(epochs):
        samples, passes = mixture.order(seed, epoch)
        assert len(samples) == len(passes) == len(mixture)
        requests |= set(zip(samples.tolist(), passes.tolist(), strict=True))
        for sample in samples.tolist():
            seen[owner[sample]][sample] += 1
    assert len(requests) == epochs * len(mixture)  # never the same crops of the same sample again
    for number, size in enumerate(sizes):
        expected = epochs * len(mixture) * mixture.shares[number]
        assert abs(seen[number].total() - expected) <= len(sizes)
        first = sum(sizes[:number])
        counts = [seen[number][sample] for sample in range(first, first + size)]
        assert max(counts) - min(counts) <= 1  # all of a source before any of it again, whatever the epoch


def test_without_weights_an_epoch_is_every_sample_once() -> None:
    mixture = open_mixture(["5", "17", "40"], lambda spec: Numbers(int(spec)))
    for epoch in range(3):
        samples, passes = mixture.order(1, epoch)
        assert sorted(samples.tolist()) == list(range(62))
        assert set(passes.tolist()) == {epoch}


def test_sources_are_mixed_and_keep_the_order_that_suits_them() -> None:
    grouped = Numbers(400, groups=(20,) * 20)
    mixture = Mixture("m", [Numbers(100), grouped], [1, 1])
    samples = mixture.order(3, 0)[0].tolist()
    halves = [sum(sample < 100 for sample in samples[start : start + 100]) for start in range(0, 500, 100)]
    assert all(30 <= half <= 70 for half in halves)
    groups = [(sample - 100) // 20 for sample in samples if sample >= 100]
    assert all(len(set(groups[start : start + 20])) <= 16 for start in range(0, len(groups) - 20, 20))
    assert mixture.order(3, 1)[0].tolist() != samples
    assert mixture.order(4, 0)[0].tolist() != samples


def test_a_part_of_a_grouped_source_is_grouped() -> None:
    source = Numbers(23, groups=(10, 0, 5, 8))

    def groups_of(first: int, last: int | None) -> tuple[int, ...]:
        part = Part(source, first, last)
        assert sum(part.groups) == len(part)
        return part.groups

    assert groups_of(0, None) == (10, 5, 8)
    assert groups_of(4, 12) == (6, 2)
    assert groups_of(10, 15) == (5,)
    assert groups_of(11, 12) == (1,)
    edges = list(accumulate((6, 2)))
    assert sorted(window_order(groups_of(4, 12), 0, 0).tolist()) == list(range(edges[-1]))
    assert not Part(Numbers(4), 0, 2).groups


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("a.csv", ("a.csv", None)),
        ("a.csv=2", ("a.csv", 2.0)),
        ("b/{000..012}.tar=.25", ("b/{000..012}.tar", 0.25)),
        ("emoji:train[:100]=1e2", ("emoji:train[:100]", 100.0)),
        ("a.csv?image=2", ("a.csv?image=2", None)),
        ("a.csv?image=x&caption=3", ("a.csv?image=x&caption=3", None)),
        ("a.csv?image=x&caption=3=4", ("a.csv?image=x&caption=3", 4.0)),
        ("a=b.csv", ("a=b.csv", None)),
    ],
)
def test_weights_are_read(spec: str, expected: tuple[str, float | None]) -> None:
    parsed = parse_spec(spec)
    assert (spec.removesuffix(f"={spec.rpartition('=')[2]}") if parsed.weight else spec, parsed.weight) == expected


def test_a_path_that_ends_like_a_weight_is_a_path(tmp_path: Path) -> None:
    (tmp_path / "run=3").mkdir()
    assert parse_spec(f"{tmp_path}/run=3").weight is None


@pytest.mark.parametrize("weight", ["0", "-1", "nan", "inf", "1e999"])
def test_weights_that_make_no_sense(weight: str) -> None:
    with pytest.raises(ConfigError, match=f"the weight of 'a.csv' must be a positive number, not {weight}"):
        parse_spec(f"a.csv={weight}")


def test_all_or_no_source_has_a_weight(pair_folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"the source 'b\.csv' has no weight, and others have"):
        open_training(["a.csv=2", "b.csv"])
    alone: Source = open_training(f"{pair_folder}=7")
    assert not isinstance(alone, Mixture)
    both = open_training([f"{pair_folder}=1", f"{pair_folder}[:10]=3"])
    assert isinstance(both, Mixture)
    assert (len(both), both.shares) == (50, (0.25, 0.75))
    assert both.read(41).captions == ("picture 1",)
    assert both.name(41) == f"{pair_folder}[0:10]: 001.png"
    with pytest.raises(AclipError, match="nowhere"):
        open_training([f"{pair_folder}=1", "nowhere=3"])


def test_too_few_samples_to_mix() -> None:
    with pytest.raises(DataError, match="2 samples are too few to mix 2 sources"):
        Mixture("m", [Numbers(1), Numbers(1)], [1, 1.5])
