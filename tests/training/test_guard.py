"""Skipped steps, as the host learns of them, losses at chance level, and running out of memory."""

import math
from typing import Any

import pytest
import torch
from torch import nn

from aclip.config import RunConfig
from aclip.errors import OutOfMemoryError
from aclip.recipes import RECIPES
from aclip.training.guard import CHANCE_RECORDS, CHANCE_STEPS, ChanceLevel, Guard, explain_oom

NAN, INF = float("nan"), float("inf")


def guard(**scaler: Any) -> Guard:
    return Guard(nn.BatchNorm1d(2), torch.amp.GradScaler("cpu", **({"enabled": False} | scaler)))


def take(seen: Guard, step: int, loss: float = 3.0, norm: float = 1.0) -> list[dict[str, Any]]:
    seen.begin()
    seen.check(torch.tensor(loss), torch.tensor(norm), step, (f"key {step}",))
    return seen.incidents(wait=True)


def test_skipped_steps_are_counted_in_a_row_and_reported() -> None:
    seen = guard()
    assert take(seen, 1, INF) == [{"step": 1, "kind": "non_finite", "skipped_in_a_row": 1, "loss": "inf",
                                   "grad_norm": 1.0, "ranks": [0], "keys": [["key 1"]]}]
    (second,) = take(seen, 2, 3.0, norm=NAN)
    assert (second["skipped_in_a_row"], second["grad_norm"], second["ranks"]) == (2, "nan", [])
    assert take(seen, 3) == []
    assert (seen.skipped, seen.skipped_in_a_row) == (2, 0)


def test_buffers_are_restored_in_a_skipped_step() -> None:
    norm = nn.BatchNorm1d(2)
    seen = Guard(norm, torch.amp.GradScaler("cpu", enabled=False))
    seen.begin()
    norm(torch.randn(4, 2))
    assert seen.check(torch.tensor(NAN), torch.tensor(1.0), 1, ()) == 1
    assert norm.running_mean.tolist() == [0.0, 0.0]
    assert norm.num_batches_tracked == 0


def test_overflows_that_the_scaler_handles_are_no_incidents() -> None:
    seen = guard(enabled=True, init_scale=1024.0)
    seen._scaler.scale(torch.ones(()))  # it starts with the first loss
    assert [take(seen, step, 3.0, norm=INF) for step in range(9)] == [[]] * 9
    assert (seen.skipped, seen.skipped_in_a_row) == (9, 0)
    assert len(take(seen, 9, NAN)) == 1
    lowest = guard(enabled=True, init_scale=1.0)
    lowest._scaler.scale(torch.ones(()))
    assert len(take(lowest, 1, 3.0, norm=INF)) == 1


def record(step: int, contrastive: float) -> dict[str, Any]:
    return {"step": step, "parts": {"contrastive": contrastive}, "chance_loss": math.log(64)}


def test_a_loss_at_chance_is_reported_once(caplog: pytest.LogCaptureFixture) -> None:
    level = ChanceLevel(warmup_steps=10)
    reported = []
    for step in range(10, 1000, 10):
        level.check(record(step, 4.15))
        reported.append(len(caplog.records))
    assert reported.count(0) == CHANCE_STEPS // 10 - 1 + CHANCE_RECORDS - 1
    assert reported[-1] == 1
    assert "chance is 4.16" in caplog.text
    assert "--overfit-one-batch" in caplog.text


def test_a_short_run_that_ends_at_chance_is_told_to_train_longer(caplog: pytest.LogCaptureFixture) -> None:
    for step in (10, 25):
        ChanceLevel(warmup_steps=10).check(record(step, 4.15), last=True)
    ChanceLevel(warmup_steps=10).check(record(25, 3.9), last=True)
    assert [text.partition(":")[0] for text in caplog.messages] == ["25 steps were too few"]


def test_a_falling_loss_is_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    level = ChanceLevel(warmup_steps=500)
    for step in range(0, 500, 10):  # not yet
        level.check(record(step, 4.15))
    for step in range(500, 1000, 10):
        level.check(record(step, 3.9))
        level.check({"step": step, "parts": {"byol": 4.0}})
    assert not caplog.records


@pytest.mark.parametrize(("micro_batch", "recompute", "helps"), [
    (None, False, "use --micro-batch 128, --recompute (the step stays the same), or a smaller --batch-size"),
    (32, True, "use --micro-batch 16 (the step stays the same), or a smaller --batch-size"),
])
def test_running_out_of_memory_says_what_was_held_and_what_helps(
    micro_batch: int | None, recompute: bool, helps: str
) -> None:
    config = RunConfig(recipe=RECIPES["clip"], model="vit-micro", data="x", output="x", batch_size=256,
                       micro_batch=micro_batch, recompute=recompute)
    with pytest.raises(OutOfMemoryError) as caught, explain_oom(config, torch.device("cpu")):
        torch.empty(2**60, dtype=torch.uint8)
    assert str(caught.value).startswith(f"out of memory in a step of 256 pairs, {micro_batch or 256} at a time, on cpu")
    assert helps in str(caught.value)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), explain_oom(config, torch.device("cpu")):
        torch.ones(2, 3) @ torch.ones(2, 3)
