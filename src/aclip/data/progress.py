"""How far a long operation is: a bar on a terminal, log lines elsewhere."""

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

DELAY = 2.0
"""Seconds before anything is shown."""

PAUSE = 30.0
"""Seconds between two log lines."""

_log = logging.getLogger(__name__)


@contextmanager
def progress(doing: str, total: int, unit: str = "samples") -> Iterator[Callable[[int], None]]:
    """Report how far an operation is, once it has taken two seconds.

    Args:
        doing: what is done, e.g. "packing pairs.csv".
        total: how much there is to do.
        unit: what is counted; "bytes" are shown as sizes.

    Yields:
        A function to call with the amount done since its last call.
    """
    from aclip import dist

    report = _ignore if dist.rank() else _Bar(doing, total, unit) if sys.stderr.isatty() else _Lines(doing, total, unit)
    try:
        yield report
    finally:
        if isinstance(report, _Bar):
            report.stop()


def _ignore(_: int) -> None:
    pass


class _Lines:
    def __init__(self, doing: str, total: int, unit: str) -> None:
        self._doing, self._total, self._unit = doing, total, unit
        self._done = 0
        self._start = time.monotonic()
        self._next = self._start + DELAY

    def __call__(self, amount: int) -> None:
        self._done += amount
        now = time.monotonic()
        if now >= self._next:
            self._next = now + PAUSE
            left = timedelta(seconds=round((now - self._start) * (self._total - self._done) / max(1, self._done)))
            _log.info("%s: %s of %s %s, %s left", self._doing, f"{self._done:,}", f"{self._total:,}", self._unit, left)


class _Bar:
    def __init__(self, doing: str, total: int, unit: str) -> None:
        self._doing, self._total, self._unit = doing, total, unit
        self._done = 0
        self._start = time.monotonic()
        self._bar: Any = None

    def __call__(self, amount: int) -> None:
        self._done += amount
        if self._bar is None and time.monotonic() - self._start >= DELAY:
            self._bar = self._show()
        if self._bar is not None:
            self._bar.update(0, completed=self._done)

    def stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()

    def _show(self) -> Any:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        counts = ([DownloadColumn(), TransferSpeedColumn()] if self._unit == "bytes"
                  else [MofNCompleteColumn(), TextColumn(self._unit)])
        bar = Progress(TextColumn("{task.description}", markup=False), BarColumn(), *counts, TimeRemainingColumn(),
                       console=Console(stderr=True))
        bar.add_task(self._doing, total=self._total)
        bar.start()
        return bar
