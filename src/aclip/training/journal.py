"""What a run writes down besides metrics: bad samples, incidents, and where its time went."""

import logging
import time
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from typing import Any

from aclip import dist
from aclip.run_folder import RunFolder
from aclip.structs import Batch

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
        for record in (record for of_rank in dist.collect(self._met) for record in of_rank):
            if record["key"] not in self._known:
                self._known.add(record["key"])
                if dist.rank() == 0:
                    self._folder.append("skipped", record)
        self._met = []
        return {"skipped_samples": len(self._known)}
