"""A run's folder: its files, its line-by-line journals, and what a resume removes from them."""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from aclip.errors import ConfigError
from aclip.files import write_atomically

TAIL_BYTES = 8192


class RunFolder:
    """Paths and journals of one run.

    Attributes:
        path: the folder.
    """

    JOURNALS = ("metrics", "evaluations", "skipped")

    def __init__(self, path: Path) -> None:
        self.path = path

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

    def create(self) -> None:
        """Make the folder.

        Raises:
            ConfigError: it holds a run already, or cannot be written.
        """
        if (self.path / "config.json").exists():
            raise ConfigError(f"{self.path} holds a run already: continue it with --resume, or choose another --output")
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
        """Add one line to a journal; a line is written in one call, so that at most the last is torn."""
        with (self.path / f"{journal}.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")

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

    def rewind(self, step: int) -> None:
        """Drop everything journalled after optimizer step `step`, and any torn line."""
        for journal in self.JOURNALS:
            if not (self.path / f"{journal}.jsonl").exists():
                continue
            kept = [r for r in self.records(journal) if r.get("step", 0) <= step]
            lines = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in kept)
            write_atomically(self.path / f"{journal}.jsonl", lines)
