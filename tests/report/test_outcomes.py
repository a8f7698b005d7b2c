"""The statistics of a comparison, against numbers made by hand, and reading what came out of a run."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aclip.report.outcomes import exceeds_spread, outcome, pooled_spread, primary, spread


def test_spread_is_the_sample_standard_deviation() -> None:
    assert spread([2.0, 4.0, 4.0, 4.0, 5.0, 5.0, 7.0, 9.0]) == pytest.approx(math.sqrt(32 / 7))  # squares add up to 32
    assert spread([0.1, 0.3]) == pytest.approx(math.sqrt(0.02))
    assert spread([0.1]) is None
    assert spread([]) is None


def test_pooled_spread_by_hand() -> None:
    # sums of squares 2 (mean 2) and 8 (mean 6), 3 + 2 - 2 = 3 degrees of freedom
    assert pooled_spread([1.0, 2.0, 3.0], [4.0, 8.0]) == pytest.approx(math.sqrt((2 + 8) / 3))
    assert pooled_spread([1.0, 2.0], [4.0]) is None
    assert pooled_spread([], [4.0, 5.0]) is None


@pytest.mark.parametrize(("second", "verdict"), [
    ([4.1, 5.1, 6.1], True),    # s = 1, the difference 2.1
    ([3.9, 4.9, 5.9], False),   # 1.9
    ([4.0, 5.0, 6.0], False),   # 2.0, exactly twice the spread
    ([9.0], None),
])
def test_a_difference_must_exceed_twice_the_spread(second: list[float], verdict: bool | None) -> None:
    assert exceeds_spread([2.0, 3.0, 4.0], second) is verdict


@given(st.lists(st.floats(0, 1), min_size=2, max_size=6), st.lists(st.floats(0, 1), min_size=2, max_size=6))
def test_the_verdict_has_no_direction(first: list[float], second: list[float]) -> None:
    assert exceeds_spread(first, second) == exceeds_spread(second, first)
    assert pooled_spread(first, second) == pytest.approx(pooled_spread(second, first))


def journal(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "memory.json").write_text('{"peak_memory": 12345, "device": "cpu"}')
    journal(tmp_path / "metrics.jsonl", [
        {"step": 2, "samples_seen": 16, "samples_per_second": 8.0},
        {"step": 4, "samples_seen": 32, "samples_per_second": 4.0}])
    record = {"evaluator": "retrieval", "set": "held", "weights": "online", "chance": {"image_to_text_r1": 0.1}}
    journal(tmp_path / "evaluations.jsonl", [
        record | {"step": 2, "metrics": {"image_to_text_r1": 0.2}},
        record | {"step": 4, "metrics": {"image_to_text_r1": 0.3}},
        record | {"step": 4, "metrics": {"image_to_text_r1": 0.4}},  # evaluated again: the last word counts
        record | {"step": 4, "metrics": {"image_to_text_r1": 0.9}, "weights": "ema"},
        record | {"step": 2, "metrics": {"top1": 0.8}, "evaluator": "knn"}])
    return tmp_path


def test_an_outcome_is_what_the_last_step_left(run: Path) -> None:
    found = outcome(run)
    assert found == {
        "samples_seen": 32.0, "steps": 4.0, "training_seconds": 16 / 8 + 16 / 4, "peak_memory": 12345.0,
        "metrics": {"held": {"retrieval": {"image_to_text_r1": 0.4}}},
        "chance": {"held": {"retrieval": {"image_to_text_r1": 0.1}}}}
    assert json.loads(json.dumps(found)) == found


def test_a_last_step_that_was_skipped_has_results_all_the_same(run: Path) -> None:
    with (run / "evaluations.jsonl").open("a") as lines:
        lines.write(json.dumps({"evaluator": "retrieval", "set": "held", "weights": "online", "step": 5,
                                "samples_seen": 40, "metrics": {"image_to_text_r1": 0.5}}) + "\n")
    found = outcome(run)
    assert (found["steps"], found["samples_seen"]) == (5.0, 40.0)
    assert found["metrics"] == {"held": {"retrieval": {"image_to_text_r1": 0.5}}}


def test_what_is_missing_is_none(run: Path) -> None:
    for name in ("metrics.jsonl", "evaluations.jsonl", "memory.json"):
        (run / name).unlink()
    assert outcome(run) == {"samples_seen": None, "steps": None, "training_seconds": None, "peak_memory": None,
                            "metrics": {}, "chance": {}}


def test_the_primary_metric_is_the_first_of_its_order_on_the_first_set() -> None:
    retrieval, knn, probe = {"image_to_text_r1": 0.2}, {"top1": 0.6}, {"top1": 0.7}
    both = {"metrics": {"a": {"knn": knn, "linear_probe": probe}, "b": {"retrieval": retrieval, "knn": knn}}}
    assert primary(both, ["a", "b"]) == (("a", "linear_probe", "top1"), 0.7)
    assert primary(both, ["b", "a"]) == (("b", "retrieval", "image_to_text_r1"), 0.2)
    assert primary(both, ["c", "b"]) == (("b", "retrieval", "image_to_text_r1"), 0.2)
    assert primary(both, ["c"]) is None
    assert primary({}, ["a"]) is None
