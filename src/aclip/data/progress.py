"""How far a long operation is: a bar on a terminal, log lines elsewhere."""

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress

_DELAY = 2.0  # seconds before anything is shown
_PAUSE = 30.0  # seconds between two log lines

_log = logging.getLogger(__name__)


@contextmanager
def progress(doing: str, total: int, unit: str = "samples") -> Iterator[Callable[[int], None]]:
    """Report how far an operation is, on rank 0 and once it has taken two seconds.

    Args:
        doing: what is done, e.g. "packing pairs.csv".
        total: how much there is to do.
        unit: what is counted; "bytes" are shown as sizes.

    Yields:
        A function to call with the amount done since its last call.
    """
    from aclip import dist

    done, start = 0, time.monotonic()
    next_report = start + _DELAY
    bar: Progress | None = None

    def advance(amount: int) -> None:
        nonlocal bar, done, next_report
        done += amount
        now = time.monotonic()
        if now < next_report or dist.rank():
            return
        if sys.stderr.isatty():
            bar = bar or _start_bar(doing, total, unit)
            bar.update(bar.task_ids[0], completed=done)
            return
        next_report = now + _PAUSE
        left = timedelta(seconds=round((now - start) * (total - done) / max(1, done)))
        _log.info("%s: %s of %s %s, %s left", doing, f"{done:,}", f"{total:,}", unit, left)

    try:
        yield advance
    finally:
        if bar is not None:
            bar.stop()


def _start_bar(doing: str, total: int, unit: str) -> "Progress":
    from rich import progress as rich
    from rich.console import Console

    counts = ([rich.DownloadColumn(), rich.TransferSpeedColumn()] if unit == "bytes"
              else [rich.MofNCompleteColumn(), rich.TextColumn(unit)])
    bar = rich.Progress(rich.TextColumn("{task.description}", markup=False), rich.BarColumn(), *counts,
                        rich.TimeRemainingColumn(), console=Console(stderr=True))
    bar.add_task(doing, total=total)
    bar.start()
    return bar
