"""What a run says in the terminal: a header, a progress bar, plain lines where there is no terminal."""

import time
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

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
