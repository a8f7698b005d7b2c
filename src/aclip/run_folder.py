"""A run's folder: its files, its line-by-line journals, and what a resume removes from them."""

import errno
import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from aclip.errors import ConfigError
from aclip.files import write_atomically

TAIL_BYTES = 8192

_log = logging.getLogger(__name__)


class RunFolder:
    """Paths and journals of one run.

    Attributes:
        path: the folder.
    """

    JOURNALS = ("metrics", "evaluations", "skipped")
    """Those that tell what was computed, and follow it back to a checkpoint; `incidents` tells what has happened."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._patient = self._told = False
        self._unwritten: dict[str, list[bytes]] = {}

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def final(self) -> Path:
        """Folder of the finished model, which open_clip loads."""
        return self.path / "final"

    @property
    def snapshots(self) -> Path:
        """Folder of what the model looked at over training."""
        return self.path / "snapshots"

    def check_free(self) -> None:
        """Refuse a folder that is taken.

        Raises:
            ConfigError: it holds a run already.
        """
        if (self.path / "config.json").exists():
            raise ConfigError(f"{self.path} holds a run already: continue it with --resume, or choose another --output")

    def create(self) -> None:
        """Make the folder.

        Raises:
            ConfigError: it holds a run already, or cannot be written.
        """
        self.check_free()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"cannot make the run folder {self.path}: {error.strerror}") from error

    def write_json(self, name: str, value: Any) -> None:
        """Write `value` to a file of the folder, all or nothing."""
        write_atomically(self.path / name, json.dumps(value, indent=2, ensure_ascii=False) + "\n")

    def read_json(self, name: str) -> Any:
        """Read a file of the folder.

        Raises:
            ConfigError: the folder is no run, or the file is damaged.
        """
        try:
            return json.loads((self.path / name).read_text())
        except FileNotFoundError as error:
            raise ConfigError(f"{self.path} is not a run folder: it has no {name}") from error
        except json.JSONDecodeError as error:
            raise ConfigError(f"{self.path / name} is damaged: {error}") from error

    def append(self, journal: str, record: Mapping[str, Any]) -> None:
        """Add one line to a journal; a line is written in one call, so that at most the last is torn.

        Raises:
            OSError: it cannot be written, unless the folder is `patient`.
        """
        waiting = self._unwritten.setdefault(journal, [])
        waiting.append((json.dumps(record, ensure_ascii=False) + "\n").encode())
        try:
            with (self.path / f"{journal}.jsonl").open("ab", buffering=0) as file:
                _add_lines(file, waiting)
        except OSError as error:
            if not self._patient:
                waiting.clear()
                raise
            if not self._told:
                _log.warning("%s.jsonl cannot be written (%s): its lines are kept and written when that is possible",
                             journal, error.strerror or error)
            self._told = True

    @contextmanager
    def patient(self) -> Iterator[None]:
        """Within this context journals that cannot be written, on a full disk, keep their lines until they can.

        Raises:
            OSError: at its end, they still cannot.
        """
        self._patient, self._told = True, False
        try:
            yield
        finally:
            self._patient = False
            for journal in list(self._unwritten):
                if self._unwritten[journal]:
                    with (self.path / f"{journal}.jsonl").open("ab", buffering=0) as file:
                        _add_lines(file, self._unwritten[journal])

    def records(self, journal: str) -> Iterator[dict[str, Any]]:
        """Yield a journal's records; a torn last line is left out."""
        path = self.path / f"{journal}.jsonl"
        if path.exists():
            # not splitlines: a caption may hold U+2028 and its like, which JSON leaves as they are
            for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
                try:
                    record = json.loads(line)
                except json.JSONDecodeError:
                    continue
                if isinstance(record, dict):
                    yield record

    def last(self, journal: str) -> dict[str, Any]:
        """Return the newest whole record among the last few kilobytes of a journal, or an empty one."""
        try:
            with (self.path / f"{journal}.jsonl").open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
                lines = file.read().split(b"\n")
        except OSError:
            return {}
        for line in reversed(lines):
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict):
                return record
        return {}

    def rewind(self, step: int, *, evaluated: bool = True) -> None:
        """Drop everything journalled after optimizer step `step`, and any torn line.

        Args:
            step: done.
            evaluated: whether its evaluation is done, too; otherwise what there is of it is dropped.
        """
        for journal in self.JOURNALS:
            self._unwritten.pop(journal, None)
            if not (self.path / f"{journal}.jsonl").exists():
                continue
            last = step if evaluated or journal != "evaluations" else step - 1
            kept = [r for r in self.records(journal) if r.get("step", 0) <= last]
            lines = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in kept)
            write_atomically(self.path / f"{journal}.jsonl", lines)


def _add_lines(file: BinaryIO, lines: list[bytes]) -> None:
    """Write lines and take them off the list one by one; of a line that could not be written whole, nothing stays."""
    while lines:
        end = file.seek(0, os.SEEK_END)
        if file.write(lines[0]) < len(lines[0]):
            file.truncate(end)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        del lines[0]
