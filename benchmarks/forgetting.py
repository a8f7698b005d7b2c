"""What fine-tuning gains on new pairs and loses of what the model knew, by method, with the start merged in or not.

    aclip data fetch icons && aclip data fetch emoji
    aclip train --recipe clip --optimizer muon --model vit-tiny --data icons:train --epochs 2 --batch-size 128 \
                --resolution-schedule 0.6:0.5 --output runs/icons       # 12 min on one core; the next line an hour
    python benchmarks/forgetting.py runs/icons --data 'emoji:train[:691]' --epochs 10 --output forgetting

Each method trains every seed; its model is interpolated with the start (`aclip merge`), and old and new held-out sets
are measured: the mean of R@1 and R@5 in both directions. Called again with the same --output, it goes on. Writes
results.jsonl and frontier.svg there, and prints the table as Markdown. The rates are one each for AdamW; the two of
`clip` and the shares of the start say how a method compares with just learning less.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from rich.console import Console

import aclip
from aclip import data, merging, models
from aclip.evaluation.features import TextEncoder, encode_image_set
from aclip.evaluation.retrieval import Retrieval
from growth import GAP, LEFT, PANEL, TOP, panel, svg
from step import markdown

METHODS: dict[str, dict[str, Any]] = {
    "clip": {"recipe": "clip", "lr": 5e-4},
    "clip, a fifth of the rate": {"recipe": "clip", "lr": 1e-4},
    "clip, image tower frozen": {"recipe": "clip", "lr": 5e-4, "freeze": ("visual.*",)},
    "clip, LoRA 8": {"recipe": "clip", "lr": 2e-3, "lora": 8},
    "finetune": {"recipe": "finetune", "lr": 5e-4},
    "finetune, image tower frozen": {"recipe": "finetune", "lr": 5e-4, "freeze": ("visual.*",)},
    "finetune-attentive": {"recipe": "finetune-attentive", "lr": 5e-4, "unmasked_tuning": 0.15},
}
SHARES = 0.25, 0.5, 1.0
"""Of the fine-tuned model in the merged one."""

MEASURED = tuple(f"{way}_{k}" for way in ("image_to_text", "text_to_image") for k in ("r1", "r5"))
COLOURS = ["#0b6cb0", "#7fb8dd", "#00845e", "#8a8a8a", "#d55e00", "#8c2d04", "#e8a33d"]


def main() -> None:
    """Train, merge, measure, print and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("start", help="MODEL that is fine-tuned")
    parser.add_argument("--data", default="emoji:train[:691]", help="new pairs")
    parser.add_argument("--new", default="emoji:val_vendor", help="held-out set of their kind")
    parser.add_argument("--old", default="icons:val_vendor", help="held-out set of what the model knew")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=float, default=10)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()

    args.output.mkdir(parents=True, exist_ok=True)
    journal, console = args.output / "results.jsonl", Console(width=200)
    records = list(map(json.loads, journal.read_text().splitlines())) if journal.exists() else []
    start = models.load(args.start)
    sets = {which: data.EvaluationSet(data.open_source(spec), start.preprocess, batch_size=256)
            for which, spec in (("old", args.old), ("new", args.new))}

    def keep(method: str, seed: int, share: float, model: models.LoadedModel) -> None:
        found: dict[str, Any] = {"method": method, "seed": seed, "share": share}
        texts = TextEncoder(model, model.device)
        for which, images in sets.items():
            metrics = Retrieval().measure(encode_image_set(model, images, model.device), texts).metrics
            found[which] = {name: float(metrics[name]) for name in MEASURED}
        records.append(found)
        with journal.open("a") as file:
            file.write(json.dumps(records[-1]) + "\n")

    known = {(one["method"], one["seed"], one["share"]) for one in records}
    if ("start", 0, 0.0) not in known:
        keep("start", 0, 0.0, start)
    mixed = models.load(args.start)
    for seed in args.seeds:
        for method in args.methods:
            missing = [share for share in SHARES if (method, seed, share) not in known]
            if not missing:
                continue
            folder = args.output / f"{method.replace(' ', '-').replace(',', '')}-{seed}"
            run = aclip.train(model=args.start, data=args.data, epochs=args.epochs, batch_size=args.batch_size,
                              seed=seed, output=str(folder), workers=0, resume=True, **METHODS[method])
            states = [start.model.state_dict(), models.load(run.folder).model.state_dict()]
            for share in missing:
                mixed.model.load_state_dict(merging.mix(states, (1 - share, share)))
                keep(method, seed, share, mixed)

    console.print(markdown(["method", "share", *(f"{which}: {name}" for which in ("new", "old") for name in MEASURED),
                            "gain", "loss"], rows(records, args.methods)), markup=False, soft_wrap=True)
    (args.output / "frontier.svg").write_text(drawing(records, args.methods))


def select(records: list[dict[str, Any]], method: str, share: float) -> list[dict[str, Any]]:
    """Return the records of all seeds."""
    return [one for one in records if (one["method"], one["share"]) == (method, share)]


def changes(records: list[dict[str, Any]], method: str, share: float, which: str) -> list[float]:
    """Return by how many points the mean of what was measured on a set has changed since the start, seed by seed."""
    (start,), some = select(records, "start", 0.0), select(records, method, share)
    return [100 * (statistics.fmean(one[which].values()) - statistics.fmean(start[which].values())) for one in some]


def rows(records: list[dict[str, Any]], methods: list[str]) -> list[list[str]]:
    """Return a line for the start, and one for each method and share: means over seeds, the spread behind the last."""
    table = []
    for method, share in [("start", 0.0), *((method, share) for method in methods for share in SHARES)]:
        cells = [f"{100 * statistics.fmean(one[which][name] for one in select(records, method, share)):.1f}"
                 for which in ("new", "old") for name in MEASURED]
        for which in ("new", "old"):
            found = changes(records, method, share, which)
            spread = f" ± {statistics.stdev(found):.1f}" if len(found) > 1 else ""
            cells.append(f"{statistics.fmean(found):+.1f}{spread}")
        table.append([method, f"{share:g}", *cells])
    return table


def drawing(records: list[dict[str, Any]], methods: list[str]) -> str:
    """Return the SVG: what is gained against what is lost, from the start over merged models to each method's own."""
    lines, legend = [], []
    for number, (method, colour) in enumerate(zip(methods, COLOURS, strict=False)):
        points = [(-statistics.fmean(changes(records, method, share, "old")),
                   statistics.fmean(changes(records, method, share, "new"))) for share in SHARES]
        lines.append((colour, "", [(0.0, 0.0), *points]))
        legend.append(f'<text x="{LEFT + 2 * PANEL[0] + 20}" y="{TOP + 20 * number + 14}" fill="{colour}">{method}'
                      '</text>')
    chart = panel(LEFT, TOP, "lost on the old set, points of mean recall", "gained on the new set", lines,
                  size=(2 * PANEL[0], 2 * PANEL[1]))
    return svg(LEFT + 2 * PANEL[0] + 220, TOP + 2 * PANEL[1] + GAP, [*legend, chart])


if __name__ == "__main__":
    main()
