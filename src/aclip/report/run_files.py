"""Read a run folder for its report: all there is, and a note for everything that is missing or damaged."""

import json
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from aclip.errors import CheckpointError, ConfigError
from aclip.report.snapshots import Snapshot, read_snapshot

Record = dict[str, Any]


@dataclass(frozen=True)
class RunFiles:
    """The contents of a run folder, as far as they could be read.

    Attributes:
        path: the folder.
        config: `config.json`, or empty.
        metrics, evaluations, skipped: the lines of the journals of these names, in order.
        examples: name of a file of `examples/`, which is its set's (`as_file_name`) -> the pictures in it.
        robustness: the lines of `robustness.jsonl`, evaluations of masked pictures.
        incidents: the lines of `incidents.jsonl`, what went wrong.
        details: the files of `details/`, what evaluations draw besides numbers.
        snapshots: of the first, the middle and the last step that has one.
        notes: sentences about what is missing or damaged.
    """

    path: Path
    config: Record
    metrics: list[Record]
    evaluations: list[Record]
    skipped: list[Record]
    examples: dict[str, list[Record]]
    snapshots: list[Snapshot]
    notes: list[str] = field(default_factory=list)
    robustness: list[Record] = field(default_factory=list)
    incidents: list[Record] = field(default_factory=list)
    details: list[Record] = field(default_factory=list)

    def training_seconds(self) -> float | None:
        """Return the time spent in training steps, evaluation aside, or None if it was not logged.

        Summed over the logged intervals as samples / rate, so that a resumed run counts each step once.
        """
        total, before = 0.0, 0.0
        for record in self.metrics:
            seen, rate = number(record, "samples_seen"), number(record, "samples_per_second")
            if seen is None or not rate:
                continue
            total += max(seen - before, 0.0) / rate
            before = seen
        return total or None


def read_run(folder: Path) -> RunFiles:
    """Read a run folder, whatever state it is in.

    Raises:
        ConfigError: there is no such folder.
    """
    run = read_journals(folder)
    if not run.metrics:
        run.notes.append("No training step has been logged yet.")
    if not run.evaluations:
        run.notes.append("Nothing has been evaluated yet.")
    return replace(run, robustness=_journal(folder / "robustness.jsonl", run.notes),
                   incidents=_journal(folder / "incidents.jsonl", run.notes),
                   details=_details(folder / "details", run.notes),
                   examples=_examples(folder / "examples", run.notes),
                   snapshots=_snapshots(folder / "snapshots", run.notes))


def read_journals(folder: Path) -> RunFiles:
    """Read the configuration and the journals of a run folder alone.

    Raises:
        ConfigError: there is no such folder.
    """
    if not folder.is_dir():
        raise ConfigError(f"there is no run folder '{folder}' to report on")
    notes: list[str] = []
    config = _json(folder / "config.json", notes)
    if not isinstance(config, dict):
        config = {}
        notes.append("The configuration (config.json) is missing.")
    metrics, evaluations, skipped = (
        _journal(folder / f"{name}.jsonl", notes) for name in ("metrics", "evaluations", "skipped"))
    return RunFiles(folder, config, metrics, evaluations, skipped, examples={}, snapshots=[], notes=notes)


def number(record: Record, name: str) -> float | None:
    """Return a finite number of a record, or None for anything else."""
    value = record.get(name)
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    return None


def mapping(record: Record, name: str) -> Record:
    """Return an object of a record, or an empty one for anything else."""
    value = record.get(name)
    return value if isinstance(value, dict) else {}


def _json(path: Path, notes: list[str]) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        notes.append(f"{path.name} is damaged and was left out.")
        return None


def _journal(path: Path, notes: list[str]) -> list[Record]:
    """Read JSON lines. A torn last line is what an interruption leaves; it is left out like any other."""
    try:
        # Not splitlines: a caption may hold U+2028 and its like, which JSON leaves as they are.
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError:
        return []
    records, torn = [], 0
    for line in filter(str.strip, lines):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if isinstance(record, dict):
            records.append(record)
        else:
            torn += 1
    if torn:
        notes.append(f"{path.name}: {torn} torn {'line was' if torn == 1 else 'lines were'} left out.")
    return records


def _examples(folder: Path, notes: list[str]) -> dict[str, list[Record]]:
    found = {}
    for path in sorted(folder.glob("*.json")):
        examples = _json(path, notes)
        if isinstance(examples, list):
            found[path.stem] = [example for example in examples if isinstance(example, dict)]
    return found


def _details(folder: Path, notes: list[str]) -> list[Record]:
    found = (_json(path, notes) for path in sorted(folder.glob("*.json")))
    return [details for details in found if isinstance(details, dict)]


def _snapshots(folder: Path, notes: list[str]) -> list[Snapshot]:
    paths = sorted(folder.glob("step-*.safetensors"))
    chosen = sorted({0, len(paths) // 2, len(paths) - 1}) if paths else []
    snapshots = []
    for i in chosen:
        try:
            snapshots.append(read_snapshot(paths[i]))
        except CheckpointError:
            notes.append(f"{paths[i].name} is damaged and was left out.")
    return snapshots
