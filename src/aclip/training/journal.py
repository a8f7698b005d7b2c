"""What a run tells: bad samples, incidents, where its time and memory went, and its progress in the terminal."""

import json
import logging
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from datetime import timedelta
from itertools import chain
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from aclip import dist
from aclip.devices import peak_memory
from aclip.run_folder import RunFolder
from aclip.structs import Batch

SECONDS_BETWEEN_LINES = 20.0
BAR_WIDTH = 62
"""Columns that label, bar, count and remaining time take, for up to a million steps."""

_log = logging.getLogger(__name__)


def report_incident(folder: RunFolder, incident: dict[str, Any], message: str, *values: object) -> None:
    """Journal and log an incident, on rank 0."""
    if dist.rank() == 0:
        folder.append("incidents", incident)
        _log.warning(message, *values)


class Clock:
    """Where the time since the last record went."""

    def __init__(self) -> None:
        self.samples = 0
        self._started = time.perf_counter()
        self._waited = 0.0

    def waiting_for(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Yield the batches, and count the time spent waiting for them."""
        with closing(iter(batches)) as iterator:  # type: ignore[type-var]
            while True:
                begun = time.perf_counter()
                try:
                    batch = next(iterator)
                except StopIteration:
                    return
                self._waited += time.perf_counter() - begun
                yield batch

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Do not count the time within this context."""
        begun = time.perf_counter()
        yield
        self._started += time.perf_counter() - begun

    def restart(self) -> dict[str, float]:
        """Return samples per second and the fraction of time spent waiting for data; start anew."""
        elapsed = max(time.perf_counter() - self._started, 1e-9)
        rates = {"samples_per_second": self.samples / elapsed, "data_wait": self._waited / elapsed}
        self.samples, self._started, self._waited = 0, time.perf_counter(), 0.0
        return rates


class BadSamples:
    """Journals bad samples by name, each once, whichever rank met them."""

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder
        self._known = {record["key"] for record in folder.records("skipped")}
        self._met: list[dict[str, Any]] = []

    def add(self, batch: Batch, step: int) -> None:
        """Take the bad samples met while the batch of optimizer step `step` was filled."""
        self._met += [{"step": step, "key": key, "reason": reason} for key, reason in batch.skipped]

    def journal(self) -> dict[str, int]:
        """Journal what was met since the last call; return how many were met so far. All ranks call it."""
        for record in chain.from_iterable(dist.collect(self._met)):
            if record["key"] not in self._known:
                self._known.add(record["key"])
                if dist.rank() == 0:
                    self._folder.append("skipped", record)
        self._met = []
        return {"skipped_samples": len(self._known)}


def write_peak_memory(folder: RunFolder, device: torch.device) -> None:
    """Write `memory.json`: `peak_memory` in bytes, the most over all processes that have worked on the run."""
    path = folder.path / "memory.json"
    try:
        before = int(json.loads(path.read_text(encoding="utf-8"))["peak_memory"])
    except (OSError, ValueError, KeyError, TypeError):  # the first process, or a torn file of a killed one
        before = 0
    folder.write_json(path.name, {"peak_memory": max(before, peak_memory(device)), "device": device.type})


class TrainingProgress:
    """Shows loss, rate, data-wait fraction and remaining time; a context manager.

    Without a terminal (a log file, CI) it prints a line now and then instead of drawing a bar.
    """

    def __init__(self, console: Console, total_steps: int, done: int) -> None:
        self.console = console
        self._total = total_steps
        self._begun, self._first = time.monotonic(), done
        self._printed = 0.0
        self._note = ""
        self._bar = Progress(
            TextColumn("[bold]training"), BarColumn(bar_width=20), MofNCompleteColumn(), TimeRemainingColumn(),
            TextColumn("left"), TextColumn("{task.fields[note]}", markup=False),
            console=console, disable=not console.is_terminal, speed_estimate_period=60,
        )
        self._task = self._bar.add_task("train", total=total_steps, completed=done, note="")

    def __enter__(self) -> "TrainingProgress":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def show(self, step: int, record: Mapping[str, Any] | None) -> None:
        """Show that optimizer step `step` is done, and the record of metrics.jsonl that was written for it, if any."""
        if record is not None:
            self._note = describe(record)
        room = max(self.console.width - BAR_WIDTH, 0)
        short = self._note if len(self._note) <= room else self._note[: max(room - 1, 0)] + "…"
        self._bar.update(self._task, completed=step, note=short)
        now = time.monotonic()
        due = record is not None and now - self._printed > SECONDS_BETWEEN_LINES
        if not self.console.is_terminal and (due or step == self._total):
            self._printed = now
            rate = (step - self._first) / max(now - self._begun, 1e-9)
            left = timedelta(seconds=round((self._total - step) / max(rate, 1e-9)))
            parts = (f"step {step}/{self._total}", self._note, f"{left} left")
            self.console.print(", ".join(filter(None, parts)), markup=False, soft_wrap=True)


def describe(record: Mapping[str, Any]) -> str:
    """Return a record of metrics.jsonl in one line."""
    parts = ", ".join(f"{name} {value:.2f}" for name, value in record["parts"].items())
    chance = f" (chance {record['chance_loss']:.2f})" if "chance_loss" in record else ""
    return (f"loss {record['loss']:.2f}, {record['samples_per_second']:.0f} pairs/s, {record['data_wait']:.0%} waiting "
            f"for data, {parts}{chance}")
