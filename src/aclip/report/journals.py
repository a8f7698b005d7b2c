"""Read a run folder for reports and comparisons: all there is, and a note for what is missing or damaged."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aclip.errors import CheckpointError, ConfigError
from aclip.files import read_json_lines

if TYPE_CHECKING:
    from aclip.report.snapshots import Snapshot

Record = dict[str, Any]

Metric = tuple[str, str, str]  # set, evaluator, name

# the first evaluator that was run on a set stands for the run, by this metric
PRIMARY = {"retrieval": "image_to_text_r1", "zero_shot": "top1", "linear_probe": "top1", "knn": "top1"}
JOURNALS = ("metrics", "evaluations", "skipped", "robustness", "incidents")


@dataclass(frozen=True)
class RunFiles:
    """The contents of a run folder, as far as they could be read."""

    config: Record
    metrics: list[Record]
    evaluations: list[Record]
    skipped: list[Record]
    robustness: list[Record]
    incidents: list[Record]
    peak_memory: float | None  # bytes
    examples: dict[str, list[Record]]  # file name of a set -> images
    details: list[Record]  # class by class numbers, reliability diagrams
    snapshots: "list[Snapshot]"  # of the first, the middle and the last step that has one
    notes: list[str]  # sentences about what is missing or damaged

    @property
    def training_seconds(self) -> float | None:
        """Time in training steps: the sum of samples / rate, so that a resumed run counts each step once."""
        total, before = 0.0, 0.0
        for record in self.metrics:
            seen, rate = number(record, "samples_seen"), number(record, "samples_per_second")
            if seen is None or not rate:
                continue
            total += max(seen - before, 0.0) / rate
            before = seen
        return total or None


def read_run(folder: Path, *, journals_only: bool = False) -> RunFiles:
    """Read a run folder in any state; a `ConfigError` if it is none. `journals_only` leaves out images and details."""
    if not folder.is_dir():
        raise ConfigError(f"there is no run folder '{folder}'")
    notes: list[str] = []
    config = read_json(folder / "config.json", notes)
    metrics, evaluations, skipped, robustness, incidents = (
        read_journal(folder / f"{name}.jsonl", notes) for name in JOURNALS)
    recorded = any((folder / f"{name}.jsonl").exists() for name in JOURNALS[:3])
    if not recorded and not (isinstance(config, dict) and mapping(config, "recipe")):
        raise ConfigError(f"'{folder}' is no run: it has neither a config.json of aclip nor journals; give the "
                          "--output folder of `aclip train` or `aclip compare`")
    if not isinstance(config, dict):
        config = {}
        notes.append("The configuration (config.json) is missing.")
    notes += ["No training step has been logged yet."] * (not metrics)
    notes += ["Nothing has been evaluated yet."] * (not evaluations)
    memory = read_json(folder / "memory.json", notes)
    examples, details = ({} if journals_only else {
        path.stem: found for path in sorted((folder / name).glob("*.json")) if (found := read_json(path, notes))}
        for name in ("examples", "details"))
    return RunFiles(config, metrics, evaluations, skipped, robustness, incidents, number(memory or {}, "peak_memory"),
                    examples, list(details.values()),
                    [] if journals_only else _snapshots(folder / "snapshots", notes), notes)


def outcome(folder: Path) -> Record:
    """Return the final state of a run as plain JSON values; what is not known is None, or missing among the metrics.

    `metrics` and `chance` are set -> evaluator -> metric -> value, of the last evaluation of the online weights.
    """
    run = read_run(folder, journals_only=True)
    # a last step that was skipped has no line among the metrics, but is evaluated
    last = max([*run.metrics[-1:], *run.evaluations], key=lambda record: number(record, "step") or 0, default={})
    steps = number(last, "step")
    metrics: dict[str, dict[str, Record]] = {}
    chance: dict[str, dict[str, Record]] = {}
    for record in run.evaluations:
        if record.get("weights") == "online" and number(record, "step") == steps:
            name, evaluator = str(record.get("set")), str(record.get("evaluator"))
            metrics.setdefault(name, {})[evaluator] = mapping(record, "metrics")
            chance.setdefault(name, {})[evaluator] = mapping(record, "chance")
    return {"samples_seen": number(last, "samples_seen"), "steps": steps, "training_seconds": run.training_seconds,
            "peak_memory": run.peak_memory, "metrics": metrics, "chance": chance}


def primary(result: Record, sets: Sequence[str]) -> tuple[Metric, float] | None:
    """Return the first metric of `PRIMARY` on the first set where any was measured, and its value."""
    for name in sets:
        measured = mapping(mapping(result, "metrics"), name)
        for evaluator, metric in PRIMARY.items():
            value = number(mapping(measured, evaluator), metric)
            if value is not None:
                return (name, evaluator, metric), value
    return None


def at_start(evaluations: Sequence[Record], record: Record) -> Record:
    """Return the metrics of the same evaluation before the first step, of the model that training started from."""
    same = ("set", "evaluator", "weights")
    return next((mapping(one, "metrics") for one in evaluations if record.get("step") and one.get("step") == 0
                 and all(one.get(key) == record.get(key) for key in same)), {})


def number(record: Record, name: str) -> float | None:
    """Return a finite number of a record, or None for anything else."""
    value = record.get(name)
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def mapping(record: Record, name: str) -> Record:
    """Return an object of a record, or an empty one."""
    value = record.get(name)
    return value if isinstance(value, dict) else {}


def read_json(path: Path, notes: list[str]) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        notes.append(f"{path.name} is damaged and was left out.")
        return None


def read_journal(path: Path, notes: list[str]) -> list[Record]:
    """Read JSON lines; truncated ones, which an interruption leaves, are left out and counted."""
    records, damaged = read_json_lines(path)
    if damaged:
        notes.append(f"{path.name}: {damaged} truncated {'line was' if damaged == 1 else 'lines were'} left out.")
    return records


def _snapshots(folder: Path, notes: list[str]) -> "list[Snapshot]":
    from aclip.report.snapshots import read_snapshot  # imports torch

    paths = sorted(folder.glob("step-*.safetensors"))
    snapshots = []
    for i in sorted({0, len(paths) // 2, len(paths) - 1}) if paths else []:
        try:
            snapshots.append(read_snapshot(paths[i]))
        except CheckpointError:
            notes.append(f"{paths[i].name} is damaged and was left out.")
    return snapshots
