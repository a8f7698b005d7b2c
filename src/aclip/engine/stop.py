"""Stopping when asked to: by Ctrl-C, by a scheduler, by torchrun."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SECONDS_BETWEEN_REPEATS = 30.0
"""A launcher passes on what it is sent, so that a process may hear of one request several times within this time."""


class Interrupted(KeyboardInterrupt):
    """A run was asked to stop and has saved itself."""


class StopRequest:
    """Turns SIGINT, SIGTERM and Slurm's SIGUSR1 into a flag, so that the step in progress is finished and saved.

    A second signal of the same kind acts as it did before; below a launcher only if it comes much later, for there it
    is more likely the first one passed on.

    Args:
        below_launcher: whether torchrun or Slurm started this process.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

    def __init__(self, below_launcher: bool = False) -> None:
        self.requested = False
        self._below_launcher = below_launcher
        self._at_once = False
        self._first: dict[int, float] = {}
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        for number in self.SIGNALS:
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Within this context a request raises `Interrupted` where it comes; for work that can be done anew."""
        self._at_once = True
        try:
            yield
        finally:
            self._at_once = False

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        repeated = now - self._first.setdefault(number, now)
        if self.requested and self._below_launcher and repeated < SECONDS_BETWEEN_REPEATS:
            return
        self.requested = True
        if not self._below_launcher:
            signal.signal(number, self._before[number])
        elif repeated >= SECONDS_BETWEEN_REPEATS:
            signal.signal(number, self._before[number])
            os.kill(os.getpid(), number)
        if self._at_once:
            raise Interrupted


def below_launcher(world_size: int) -> bool:
    """Return whether a launcher passes signals on to this process."""
    return world_size > 1 or "TORCHELASTIC_RUN_ID" in os.environ
