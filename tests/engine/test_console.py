"""What a comparison says while it runs."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from aclip.engine import console
from aclip.engine.comparison import Measured, PlannedRun
from aclip.engine.console import RunsProgress
from aclip.engine.run_config import RunConfig
from aclip.recipes import RECIPES


class Time:
    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Time:
    made = Time()
    monkeypatch.setattr(console, "time", made)
    return made


def planned(folder: Path, steps: int) -> PlannedRun:
    config = RunConfig(recipe=RECIPES["clip"], model="vit-tiny", data="x", output=str(folder))
    folder.mkdir()
    return PlannedRun((), config, steps, 24, Measured((), ()), Measured((), ()))


def test_the_end_of_every_run_is_told_with_the_time_left(tmp_path: Path, clock: Time) -> None:
    out = io.StringIO()
    fast, slow, done = (planned(tmp_path / name, 10) for name in ("fast", "slow", "done"))
    fast.folder.append("metrics", {"step": 5})  # from before an interruption
    with RunsProgress(Console(file=out, width=60)) as progress:
        progress.expect(runs=4, seconds=10 * 1.0 + 10 * 3.0 + 10 * 1.0 + 10 * 5.0)
        for run, seconds in ((fast, 1.0), (slow, 3.0), (done, 1.0)):
            progress.add(run, seconds, finished=run is done)
        clock.now += 10.0  # 5 seconds of work in 10
        progress.ended("fast", None)
        progress.ended("timing", None)  # no run: nothing to tell
        slow.folder.append("metrics", {"step": 5, "samples_per_second": 12.0})
        clock.now += 20.0  # and 15 more in 20
        progress.watch(["slow"])
        progress.ended("slow", "it [broke]")
    assert out.getvalue().splitlines() == [
        "2 of 4 runs: fast is done, 0:02:40 left",  # 80 seconds of work at half speed
        # a run that failed is over: 35 seconds of work in 30, 50 remain
        "3 of 4 runs: slow failed: it [broke], 0:00:43 left"]


def test_a_terminal_shows_runs_and_rates(tmp_path: Path, clock: Time) -> None:
    out = io.StringIO()
    run = planned(tmp_path / "clip-lr0.001-s0", 2000)
    with RunsProgress(Console(file=out, width=140, force_terminal=True)) as progress:
        progress.expect(runs=1, seconds=2000.0)
        progress.add(run, 1.0, finished=False)
        run.folder.append("metrics", {"step": 1500, "samples_per_second": 12.0})
        clock.now += 2.0
        progress.watch([run.name])
        progress.stopping([run.name])
    for words in ("0/1 runs", "clip-lr0.001-s0", "1,500/2,000 steps", "12 pairs/s", "will save a checkpoint"):
        assert words in out.getvalue()
