"""A small but complete comparison folder: three recipes, one of them without text, two learning rates, two seeds."""

import json
from pathlib import Path
from typing import Any

import torch

from aclip.report.snapshots import Snapshot, snapshot_path, write_snapshot

RESULTS = {  # recipe -> learning rate -> values of the first set's R@1 by seed
    "clip": {5e-4: (0.20, 0.30), 1e-3: (0.10,)},
    "flip": {5e-4: (0.40,), 1e-3: (0.50, 0.54)},
}
COSTS = {"clip": (1.0, 100.0e6), "flip": (0.5, 55.0e6), "mae": (0.75, 80.0e6)}


def retrieval(value: float) -> dict[str, Any]:
    return {"image_to_text_r1": value, "image_to_text_median_rank": 10.0 * value}


def run_record(name: str, recipe: str, lr: float, seed: int, counts: bool, metrics: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "recipe": recipe, "lr": lr, "seed": seed, "counts": counts, "finished": True, "error": None,
            "samples_seen": 64.0, "steps": 8.0, "total_steps": 8, "training_seconds": 60.0 + seed,
            "peak_memory": 1e9 + seed * 5e8, "metrics": metrics,
            "chance": {"val": {"retrieval": {"image_to_text_r1": 0.01}}}}


def write_comparison_folder(folder: Path, evil: str = "") -> Path:
    """Write a comparison's files; `evil` stands wherever text comes from a user or from data."""
    folder.mkdir()
    runs = []
    for recipe, by_lr in RESULTS.items():
        chosen = max(by_lr, key=lambda lr: len(by_lr[lr]))
        for lr, values in by_lr.items():
            for seed, value in enumerate(values):
                name = f"{recipe}-lr{lr:g}-s{seed}"
                metrics = {"val": {"retrieval": retrieval(value), "knn": {"top1": value / 2}}}
                runs.append(run_record(name, recipe, lr, seed, lr == chosen, metrics))
                write_run_folder(folder / "runs" / name, value, recipe != "clip", evil)
    runs.append(run_record("mae-lr0.0005-s0", "mae", 5e-4, 0, True, {"val": {"knn": {"top1": 0.3}}}))
    runs.append({"name": "mae-lr0.0005-s1", "recipe": "mae", "lr": 5e-4, "seed": 1, "counts": True, "finished": False,
                 "error": f"it broke {evil}"})
    comparison = {
        "command": f"aclip compare {evil}", "baseline": "clip", "model": "vit-tiny",
        "data": [f"pairs.csv {evil}", "b.tar=1"],
        "settings": {"epochs": 2.0, "samples": None, "minutes": None, "seeds": [0, 1], "lr": [5e-4, 1e-3]},
        "num_pairs": 32, "sets": ["val"], "batch_size": 8, "precision": "fp32", "device": "cpu", "threads": 1,
        "text_tokens": 12.5,
        "recipes": {name: {"title": name, "macs": macs, "relative_cost": macs / 100e6}
                    for name, (_, macs) in COSTS.items()},
        "chosen_lr": {"clip": {"lr": 5e-4}, "flip": {"lr": 1e-3}, "mae": {"lr": 5e-4}}, "runs": runs}
    (folder / "comparison.json").write_text(json.dumps(comparison))
    step = {"first_quartile": 0.9, "third_quartile": 1.2, "rounds": 10}
    (folder / "timing.json").write_text(json.dumps({
        "device": "cpu", "threads": 1, "warmup_rounds": 3,
        "steps": {"clip": step | {"median": 1.0}, "flip": step | {"median": 0.25}, "flip, unmasked": step | {
            "median": 1.0}, "mae": step | {"median": 0.75}},
        "stages": {"clip": [{"share": 1.0, "seconds": 1.0}], "mae": [{"share": 1.0, "seconds": 0.75}],
                   "flip": [{"share": 0.5, "seconds": 0.25}, {"share": 0.5, "seconds": 0.75}]},
        "step_seconds": {"clip": 1.0, "flip": 0.5, "mae": 0.75},
        "relative": {"clip": 1.0, "flip": 0.5, "mae": 0.75}}))
    return folder


def write_run_folder(folder: Path, value: float, masks: bool, evil: str) -> None:
    """Write as much of a run's folder as the page of a comparison reads."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "report.html").touch()
    records = [{"step": step, "samples_seen": 8 * step, "set": "val", "evaluator": "retrieval", "weights": "online",
                "metrics": retrieval(value * step / 8), "chance": {}} for step in (4, 8)]
    (folder / "evaluations.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    keep = torch.arange(4 if masks else 8).expand(2, -1)
    snapshot = Snapshot(torch.zeros(2, 3, 16, 32, dtype=torch.uint8), torch.ones(2, 8), keep, (2, 4),
                        ("a cat", f"a dog {evil}"), 8)
    write_snapshot(snapshot_path(folder / "snapshots", 8), snapshot)
