"""What a run says in the terminal: a header, a progress bar, plain lines where there is no terminal."""

import time
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from aclip.engine.comparison import PlannedRun
from aclip.run_folder import RunFolder

SECONDS_BETWEEN_LINES = 20.0
BAR_WIDTH = 62
"""Columns of the terminal that label, bar, count and remaining time take, for up to a million steps."""


class ProgressSink:
    """Shows loss, rate, data-wait share and remaining time; a context manager.

    Without a terminal (a log file, CI) it prints a line now and then instead of drawing a bar.
    """

    def __init__(self, console: Console, total_steps: int, done: int) -> None:
        self.console = console
        self._total = total_steps
        self._begun, self._first = time.monotonic(), done
        self._printed = 0.0
        self._record: dict[str, Any] = {}
        self._progress = Progress(
            TextColumn("[bold]training"), BarColumn(bar_width=20), MofNCompleteColumn(), TimeRemainingColumn(),
            TextColumn("left"), TextColumn("{task.fields[note]}", markup=False),
            console=console, disable=not console.is_terminal, speed_estimate_period=60,
        )
        self._task = self._progress.add_task("train", total=total_steps, completed=done, note="")

    def __enter__(self) -> "ProgressSink":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def advance(self, step: int) -> None:
        """Move the bar."""
        self._progress.update(self._task, completed=step)
        if not self.console.is_terminal and (
            time.monotonic() - self._printed > SECONDS_BETWEEN_LINES or step == self._total
        ):
            self._printed = time.monotonic()
            rate = (step - self._first) / max(self._printed - self._begun, 1e-9)
            left = timedelta(seconds=round((self._total - step) / max(rate, 1e-9)))
            self.console.print(f"step {step}/{self._total} {self._note()} left {left}",
                               highlight=False, markup=False, soft_wrap=True)

    def log(self, record: dict[str, Any]) -> None:
        """Take the newest numbers."""
        self._record = record
        # the bar, the count and the time left have their places; the rest of the line is cut to the terminal
        note, room = self._note(), max(self.console.width - BAR_WIDTH, 0)
        self._progress.update(self._task, note=note if len(note) <= room else note[: max(room - 1, 0)] + "…")

    def _note(self) -> str:
        record = self._record
        if not record:
            return ""
        parts = ", ".join(f"{name} {value:.2f}" for name, value in record["parts"].items())
        chance = f" (chance {record['chance_loss']:.2f})" if "chance_loss" in record else ""
        return (f"loss {record['loss']:.2f}, {record['samples_per_second']:.0f} pairs/s, {record['data_wait']:.0%} "
                f"waiting for data, {parts}{chance}")


class TensorBoardSink:
    """Writes the numbers of metrics.jsonl as TensorBoard scalars."""

    def __init__(self, writer: Any) -> None:
        self._writer = writer

    def advance(self, step: int) -> None:
        """Nothing to do between logged steps."""

    def log(self, record: dict[str, Any]) -> None:
        """Write one record."""
        for name, value in record.items():
            if name == "parts":
                for part, loss in value.items():
                    self._writer.add_scalar(f"loss/{part}", loss, record["step"])
            elif name != "step":
                self._writer.add_scalar(name, value, record["step"])


class RunsProgress:
    """Shows all runs of a comparison in one bar, and a line for each that is at work; a context manager.

    The bar counts expected seconds of training steps, so that slow recipes weigh more than fast ones. Without a
    terminal only the end of every run is told.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self._progress = Progress(
            TextColumn("[bold]{task.description}"), BarColumn(bar_width=24), TextColumn("{task.fields[count]}"),
            TimeRemainingColumn(), TextColumn("left"), TextColumn("{task.fields[note]}", markup=False),
            console=console, disable=not console.is_terminal, speed_estimate_period=600,
        )
        self._all: TaskID | None = None
        self._runs: dict[str, tuple[PlannedRun, float]] = {}
        self._steps: dict[str, int] = {}
        self._lines: dict[str, TaskID] = {}
        self._total_runs, self._total, self._before = 0, 0.0, 0.0
        self._ended: set[str] = set()
        self._begun = self._looked = time.monotonic()

    def __enter__(self) -> "RunsProgress":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def expect(self, runs: int, seconds: float) -> None:
        """Say how many runs there will be, and how long their steps are expected to take one after the other."""
        self._total_runs, self._total, self._begun = runs, seconds, time.monotonic()
        self._all = self._progress.add_task("all runs", total=seconds, count="", note="")

    def add(self, run: PlannedRun, step_seconds: float, *, finished: bool) -> None:
        """Take notice of a run that is about to be worked on, or is finished already."""
        self._runs[run.name] = run, step_seconds
        self._steps[run.name] = run.total_steps if finished else steps_done(run.folder)
        self._before += self._steps[run.name] * step_seconds
        if finished:
            self._ended.add(run.name)
        self._show()

    def watch(self, at_work: list[str]) -> None:
        """Look how far the runs at work are, at most once a second."""
        if time.monotonic() - self._looked < 1.0:
            return
        self._looked = time.monotonic()
        for name in at_work:
            if name not in self._runs:
                continue
            run, _ = self._runs[name]
            self._steps[name] = steps_done(run.folder)
            if name not in self._lines:
                self._lines[name] = self._progress.add_task(name, total=run.total_steps, count="", note="")
            rate = run.folder.last("metrics").get("samples_per_second")
            self._progress.update(self._lines[name], completed=self._steps[name],
                                  count=f"{self._steps[name]:,}/{run.total_steps:,} steps",
                                  note=f"{rate:.0f} pairs/s" if rate else "")
        self._show()

    def ended(self, name: str, error: str | None) -> None:
        """Take notice of a run's end, and tell."""
        if name not in self._runs:
            return
        run, _ = self._runs[name]
        self._ended.add(name)
        self._steps[name] = run.total_steps
        if name in self._lines:
            self._progress.remove_task(self._lines.pop(name))
        self._show()
        done = self._work_done()
        rate = (done - self._before) / max(time.monotonic() - self._begun, 1e-9)
        left = f", {timedelta(seconds=round((self._total - done) / rate))} left" if rate > 0 else ""
        self.console.print(f"{len(self._ended)} of {self._total_runs} runs: {name} "
                           + (f"failed: {error}" if error else "is done") + left, markup=False, soft_wrap=True)

    def stopping(self, at_work: list[str]) -> None:
        """Say that the runs at work have been asked to stop."""
        self.console.print(f"stopping: {', '.join(at_work)} will save a checkpoint after the step in progress; "
                           "a second time does not wait for that", markup=False, soft_wrap=True)

    def _work_done(self) -> float:
        return sum(self._steps[name] * seconds for name, (_, seconds) in self._runs.items())

    def _show(self) -> None:
        if self._all is not None:
            self._progress.update(self._all, completed=self._work_done(),
                                  count=f"{len(self._ended)}/{self._total_runs} runs")


def steps_done(folder: RunFolder) -> int:
    """Return the optimizer steps that a run has logged."""
    return int(folder.last("metrics").get("step", 0))
