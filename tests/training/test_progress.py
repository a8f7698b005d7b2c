"""What a run says in the terminal."""

import io
from typing import Any

import pytest
from rich.console import Console

from aclip.training import progress
from aclip.training.progress import TrainingProgress


def record(step: int) -> dict[str, Any]:
    return {"step": step, "loss": step / 10, "parts": {"contrastive": step / 10}, "samples_per_second": 8.0,
            "data_wait": 0.25, "chance_loss": 2.0}


def test_the_line_of_a_step_shows_its_own_record(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    out = io.StringIO()
    with TrainingProgress(Console(file=out, width=200), total_steps=2, done=0) as shown:
        shown.show(1, record(1))
        shown.show(2, record(2))
    lines = out.getvalue().splitlines()
    assert "step 1/2, loss 0.10, 8 pairs/s, 25% waiting for data, contrastive 0.10 (chance 2.00)" in lines[0]
    assert lines[1].startswith("step 2/2, loss 0.20")


def test_a_narrow_terminal_gets_one_line() -> None:
    out = io.StringIO()
    with TrainingProgress(Console(file=out, width=80, force_terminal=True), total_steps=5, done=0) as shown:
        shown.show(1, record(1))
    assert "…" in out.getvalue()
