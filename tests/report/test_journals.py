"""Reading a run folder: its outcome, and the metric that stands for it."""

import json
from pathlib import Path
from typing import Any

import pytest

from aclip.report.journals import outcome, primary


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
        record | {"step": 4, "metrics": {"image_to_text_r1": 0.4}},  # evaluated again: the last one counts
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
    (run / "config.json").write_text('{"recipe": {"name": "clip"}}')
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
