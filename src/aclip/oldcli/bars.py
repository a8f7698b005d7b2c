"""The columns of progress bars that count something: how much, at what rate, how long still."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress, ProgressColumn


def unit_columns(unit: str) -> list[ProgressColumn]:
    """Return how much is done and the rate, in `unit`; "bytes" are shown as sizes."""
    from rich.progress import DownloadColumn, MofNCompleteColumn, ProgressColumn, Task, TransferSpeedColumn
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Task) -> Text:
            speed = task.finished_speed or task.speed
            return Text(f"{speed:,.0f} {unit}/s" if speed else f"? {unit}/s", style="progress.data.speed")

    if unit == "bytes":
        return [DownloadColumn(), TransferSpeedColumn()]
    return [MofNCompleteColumn(), Rate()]


def counting_bar(unit: str = "samples") -> Progress:
    """Return a bar that counts `unit`, with rate and remaining time, on standard error."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    return Progress(TextColumn("{task.description}"), BarColumn(), *unit_columns(unit), TimeRemainingColumn(),
                    console=Console(stderr=True))
