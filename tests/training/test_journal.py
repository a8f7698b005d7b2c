"""What a run says in the terminal, and its peak memory."""

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from aclip.run_folder import RunFolder
from aclip.training import journal
from aclip.training.journal import TrainingProgress, write_peak_memory


def record(step: int) -> dict[str, Any]:
    return {"step": step, "loss": step / 10, "parts": {"contrastive": step / 10}, "samples_per_second": 8.0,
            "data_wait": 0.25, "chance_loss": 2.0}


def test_the_line_of_a_step_shows_its_own_record(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "SECONDS_BETWEEN_LINES", 0.0)
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


def test_the_maximum_over_all_processes_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, device = RunFolder(tmp_path), torch.device("cpu")
    for now, noted in ((5, 5), (9, 9), (7, 9)):
        monkeypatch.setattr(journal, "peak_memory", lambda _, now=now: now)
        write_peak_memory(folder, device)
        assert folder.read_json("memory.json") == {"peak_memory": noted, "device": "cpu"}
    (tmp_path / "memory.json").write_text('{"peak_mem')
    write_peak_memory(folder, device)
    assert folder.read_json("memory.json")["peak_memory"] == 7
