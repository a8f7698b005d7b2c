"""A run's folder: its files and its JSON-lines journals, which a resume cuts back to the checkpoint."""

import errno
import json
import logging
import os
import shlex
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from aclip.config import RunConfig, from_dict
from aclip.errors import ConfigError
from aclip.files import read_json_lines, write_atomically

TAIL_BYTES = 8192

_log = logging.getLogger(__name__)


def command_line() -> str:
    """Return the command that this process runs: of `aclip`, or of a user's own script."""
    program = Path(sys.argv[0])
    if "aclip" in (program.name, program.parent.name):
        return shlex.join(["aclip", *sys.argv[1:]])
    return shlex.join(["python", *sys.argv])


class RunFolder:
    """Paths and journals of one run.

    Attributes:
        path: the folder.
        checkpoints: folder of the checkpoints. snapshots: folder of what the model attended to over training.
        final: folder of the finished model, which open_clip loads. best: that of the best evaluation, in the same form.
        clusters: the cluster of every training sample, where batches are made of groups of them (`hard_negatives`).
    """

    JOURNALS = ("metrics", "evaluations", "skipped")
    """Those that are cut back on resume; `incidents` is not."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints, self.snapshots = path / "checkpoints", path / "snapshots"
        self.final, self.best, self.clusters = path / "final", path / "best", path / "clusters.npy"
        self._patient = self._warned = False
        self._unwritten: dict[str, list[bytes]] = {}

    def exists(self) -> bool:
        """Return whether the folder holds a run."""
        return (self.path / "config.json").exists()

    def config(self) -> RunConfig:
        """Return the run's configuration; ConfigError if the folder is no run, or one of an incompatible version."""
        values = self.read_json("config.json")
        known = RunConfig.__dataclass_fields__
        return from_dict(RunConfig, {name: value for name, value in values.items() if name in known},
                         where=f"{self.path}/config.json")

    def check_free(self) -> None:
        """Refuse, by a ConfigError, a folder that already holds a run."""
        if self.exists():
            raise ConfigError(f"{self.path} already holds a run: continue it with --resume, or choose another --output")

    def create(self) -> None:
        """Make the folder; ConfigError if it holds a run already, or cannot be written."""
        self.check_free()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"cannot make the run folder {self.path}: {error.strerror}") from error

    def write_json(self, name: str, value: Any) -> None:
        """Write `value` to a file of the folder, atomically."""
        write_atomically(self.path / name, json.dumps(value, indent=2, ensure_ascii=False) + "\n")

    def read_json(self, name: str) -> Any:
        """Read a file of the folder; ConfigError if the folder is no run, or the file is damaged."""
        try:
            return json.loads((self.path / name).read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise ConfigError(f"{self.path} is not a run folder: it has no {name}") from error
        except json.JSONDecodeError as error:
            raise ConfigError(f"{self.path / name} is damaged: {error}") from error

    def append(self, journal: str, record: Mapping[str, Any]) -> None:
        """Append one line to a journal, in one write, so that at most the last line is torn.

        Raises:
            OSError: it cannot be written, unless the folder is `patient`.
        """
        waiting = self._unwritten.setdefault(journal, [])
        waiting.append((json.dumps(record, ensure_ascii=False) + "\n").encode())
        try:
            self._write(journal, waiting)
        except OSError as error:
            if not self._patient:
                waiting.clear()
                raise
            if not self._warned:
                _log.warning("%s.jsonl cannot be written (%s): its lines are kept in memory and retried", journal,
                             error.strerror or error)
            self._warned = True

    @contextmanager
    def patient(self) -> Iterator[None]:
        """Within this context lines that cannot be written, on a full disk, are kept in memory and retried.

        Raises:
            OSError: at its end they still cannot be written.
        """
        self._patient, self._warned = True, False
        try:
            yield
        finally:
            self._patient = False
            for journal, waiting in self._unwritten.items():
                if waiting:
                    self._write(journal, waiting)

    def records(self, journal: str) -> list[dict[str, Any]]:
        """Return a journal's records without a torn last line."""
        return read_json_lines(self.path / f"{journal}.jsonl")[0]

    def last(self, journal: str) -> dict[str, Any]:
        """Return the last whole record of a journal, or an empty one."""
        try:
            with (self.path / f"{journal}.jsonl").open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
                lines = file.read().split(b"\n")
        except OSError:
            return {}
        for line in reversed(lines):
            with suppress(ValueError):
                if isinstance(record := json.loads(line), dict):
                    return record
        return {}

    def rewind(self, step: int, *, evaluated: bool = True) -> None:
        """Drop everything journalled after optimizer step `step`, and any torn line.

        Args:
            step: optimizer steps done.
            evaluated: whether its evaluation was completed; otherwise its records are dropped too.
        """
        for journal in self.JOURNALS:
            self._unwritten.pop(journal, None)
            if not (self.path / f"{journal}.jsonl").exists():
                continue
            last = step if evaluated or journal != "evaluations" else step - 1
            kept = [r for r in self.records(journal) if r.get("step", 0) <= last]
            lines = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in kept)
            write_atomically(self.path / f"{journal}.jsonl", lines)

    def _write(self, journal: str, lines: list[bytes]) -> None:
        """Append lines and remove them from the list one by one; a line that does not fit is truncated away again."""
        with (self.path / f"{journal}.jsonl").open("ab", buffering=0) as file:
            while lines:
                end = file.seek(0, os.SEEK_END)
                if file.write(lines[0]) < len(lines[0]):
                    file.truncate(end)
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                del lines[0]
