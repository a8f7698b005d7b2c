"""Stopping on request: by Ctrl-C, a scheduler or torchrun."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from aclip import dist

REPEAT_SECONDS = 30.0
"""torchrun passes on the signals it gets, so that a process may hear of one request several times within this time."""


class Interrupted(KeyboardInterrupt):
    """A run was asked to stop and has saved itself."""


class StopRequest:
    """Turns SIGINT, SIGTERM and Slurm's SIGUSR1 into a flag, so that the current step is finished and saved.

    A second signal of the same kind acts as it did before; under torchrun only if it comes much later, for there it is
    more likely the first one passed on. Outside the main thread signals are left alone.
    """

    def __init__(self) -> None:
        self.requested = False
        self._launched = dist.launched()
        self._immediately = False
        self._first: dict[int, float] = {}
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
                number = getattr(signal, name, None)
                if number is not None:
                    self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextmanager
    def immediately(self) -> Iterator[None]:
        """Within this context a request raises `Interrupted` at once; for work that can be repeated."""
        self._immediately = True
        try:
            yield
        finally:
            self._immediately = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        since_first = now - self._first.setdefault(number, now)
        if self.requested and self._launched and since_first < REPEAT_SECONDS:
            return
        self.requested = True
        if not self._launched:
            signal.signal(number, self._before[number])
        elif since_first >= REPEAT_SECONDS:
            signal.signal(number, self._before[number])
            os.kill(os.getpid(), number)
        if self._immediately:
            raise Interrupted
