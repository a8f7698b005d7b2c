"""A small but complete run folder, with hostile text wherever text comes from data."""

import base64
import io
import json
import math
from pathlib import Path

import pytest
import torch
from html_page import EVIL, write_lines
from PIL import Image

from aclip.report.snapshots import Snapshot, snapshot_path, write_snapshot


def thumbnail() -> str:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    (folder / "examples").mkdir(parents=True)
    recipe = {"name": "a-clip", "title": EVIL, "paper": EVIL, "passes": {"online": {"views": ["v1", "v2"]}}}
    config = {"recipe": recipe, "model": "vit-tiny", "data": EVIL, "batch_size": 256, "command": f"aclip train {EVIL}",
              "dataflow": f"a → b {EVIL}", "versions": {"torch": "2.9", EVIL: EVIL}}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "memory.json").write_text('{"peak_memory": 1234567890, "device": "cpu"}')
    write_lines(folder / "metrics.jsonl", [
        {"step": s, "samples_seen": 256 * s, "loss": 9.0 / s, "parts": {"contrastive": 5.0 / s, EVIL: 1.0},
         "lr": 5e-4, "logit_scale": 14.0, "ema_momentum": 0.996, "samples_per_second": 128.0,
         "data_wait": 0.03, "chance_loss": math.log(256), "grad_norm": 2.0} for s in range(1, 21)])
    write_lines(folder / "evaluations.jsonl", [
        {"step": s, "samples_seen": 256 * s, "weights": "online", "evaluator": "retrieval", "set": name,
         "metrics": {"image_to_text_r1": s / 100, "image_to_text_r5": s / 50, "text_to_image_r1": 0.1,
                     "image_to_text_median_rank": 7.5},
         "chance": {"image_to_text_r1": 0.01}, "counts": {"pictures": 200, "captions": 100}}
        for s in (10, 20) for name in ("val_b", "val_a", EVIL)])
    skipped = {"step": 1, "key": f"bad {EVIL}", "reason": f"truncated\u2028{EVIL}"}
    write_lines(folder / "skipped.jsonl", [skipped, skipped])
    write_lines(folder / "incidents.jsonl", [
        {"step": 3, "kind": "non_finite", "loss": "nan", "grad_norm": 0.25, "skipped_in_a_row": 1, "ranks": [0],
         "keys": [["a"]]},
        {"step": 4, "kind": "save_failed", "reason": f"1 steps {EVIL}"},
        {"step": 4, "kind": "damaged_checkpoint", "name": "step-00000006", "reason": "cut off"}])
    images, keep = torch.zeros(2, 3, 16, 32, dtype=torch.uint8), torch.arange(8).view(2, 4)
    for step in (10, 15, 20):
        write_snapshot(snapshot_path(folder / "snapshots", step),
                       Snapshot(images, torch.rand(2, 8), keep, (2, 4), ("a cat", EVIL), step, torch.rand(2, 8)))
    example = {"key": EVIL, "caption": EVIL, "rank": 1, "thumbnail": thumbnail(),
               "top": [{"caption": EVIL, "similarity": 0.5}]}
    for name in ("val_a", "val_b"):
        written = [{"kind": "best"} | example, {"kind": "worst"} | example | {"rank": 77}]
        (folder / "examples" / f"{name}.json").write_text(json.dumps(written), encoding="utf-8")
    return folder
