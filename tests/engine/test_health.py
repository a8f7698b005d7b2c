"""What is noticed about a run's numbers, and said."""

import math
from typing import Any

import pytest
import torch

from aclip.engine.health import CHANCE_RECORDS, CHANCE_STEPS, ChanceLevel, Reading, Spikes, Watch


def reading(step: int, loss: float = 3.0, finite: bool = True) -> Reading:
    return Reading(step, finite, loss, 1.0, math.isfinite(loss), (f"key {step}",))


def watch(**scaler: Any) -> Watch:
    return Watch(2, torch.amp.GradScaler("cpu", **({"enabled": False} | scaler)))


def test_a_jump_is_noticed_once_and_a_slow_rise_is_not() -> None:
    spikes = Spikes()
    assert [spikes.median_before(3.0 + 0.02 * step) for step in range(100)] == [None] * 100
    median = spikes.median_before(9.0)
    assert median == pytest.approx(3.99, abs=0.02)
    assert spikes.median_before(9.0) is None
    assert [spikes.median_before(3.0) for _ in range(100)] == [None] * 100
    assert spikes.median_before(9.0) is not None


def test_small_losses_may_double() -> None:
    spikes = Spikes()
    for _ in range(100):
        spikes.median_before(0.01)
    assert spikes.median_before(0.4) is None
    assert spikes.median_before(0.6) == pytest.approx(0.01)


def test_spikes_are_journalled_with_their_samples() -> None:
    incidents = watch().incidents([*(reading(step) for step in range(30)), reading(30, loss=7.0)])
    assert incidents == [{"step": 30, "kind": "loss_spike", "loss": 7.0, "grad_norm": 1.0, "median": 3.0, "ranks": [],
                          "keys": [["key 30"]]}]


def test_skipped_steps_in_a_row_are_too_many_at_some_point() -> None:
    seen = watch()
    for step in range(2):
        (incident,) = seen.incidents([reading(step, float("inf"), finite=False)])
        assert incident["loss"] == "inf"
        assert not seen.too_many(last=False)
    seen.incidents([reading(2)])
    seen.incidents([reading(step, float("nan"), finite=False) for step in range(3, 5)])
    assert not seen.too_many(last=False)
    seen.incidents([reading(5, float("nan"), finite=False)])
    assert seen.too_many(last=False)
    assert seen.skipped == 5


def test_a_run_may_not_end_in_a_row_of_skipped_steps_however_short() -> None:
    seen = watch()  # two in a row are allowed
    seen.incidents([reading(1, finite=False)])
    assert not seen.too_many(last=True)  # one bad batch at the end
    seen.incidents([reading(2, finite=False)])
    assert seen.too_many(last=True)
    assert not seen.too_many(last=False)


def test_a_scaler_at_work_is_no_incident() -> None:
    overflowing = [reading(step, 3.0, finite=False) for step in range(9)]
    assert len(watch().incidents(overflowing)) == 9
    seen = watch(enabled=True, init_scale=1024.0)
    assert seen.incidents(overflowing) == []
    assert seen.skipped == 9
    assert not seen.too_many(last=False)
    assert len(seen.incidents([reading(9, float("nan"), finite=False)])) == 1
    assert len(watch(enabled=True, init_scale=1.0).incidents(overflowing)) == 9


def record(step: int, contrastive: float) -> dict[str, Any]:
    return {"step": step, "parts": {"contrastive": contrastive}, "chance_loss": math.log(64)}


def test_a_loss_at_chance_is_said_in_words_once() -> None:
    level = ChanceLevel(warmup_steps=10)
    said = [level.warning(record(step, 4.15)) for step in range(10, 1000, 10)]
    spoken = [text for text in said if text]
    assert len(spoken) == 1
    assert said.index(spoken[0]) == CHANCE_STEPS // 10 - 1 + CHANCE_RECORDS - 1
    assert "guessing gives 4.16" in spoken[0]
    assert "--overfit-one-batch" in spoken[0]


def test_a_loss_that_falls_is_left_alone() -> None:
    level = ChanceLevel(warmup_steps=500)
    assert not any(level.warning(record(step, 4.15)) for step in range(0, 500, 10))  # not yet
    assert not any(level.warning(record(step, 3.9)) for step in range(500, 1000, 10))
    assert not any(level.warning({"step": step, "parts": {"byol": 4.0}}) for step in range(500, 1000, 10))
