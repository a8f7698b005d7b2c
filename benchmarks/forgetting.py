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
from aclip.evaluation import Retrieval, TextEncoder, encode_image_set
from growth import GAP, LEFT, PANEL, TOP, panel
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


class Sets:
    """The old and the new held-out set, decoded once."""

    def __init__(self, specs: list[str], model: models.LoadedModel) -> None:
        self.sets = [data.EvaluationSet(data.open_source(spec), model.preprocess, batch_size=256) for spec in specs]

    def measure(self, model: models.LoadedModel) -> list[dict[str, float]]:
        """Return R@1 and R@5 both ways on either set."""
        texts, found = TextEncoder(model, model.device), []
        for one in self.sets:
            metrics = Retrieval().measure(encode_image_set(model, one, model.device), texts).metrics
            found.append({name: float(metrics[name]) for name in MEASURED})
        return found


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
    sets = Sets([args.old, args.new], start)

    def keep(method: str, seed: int, share: float, model: models.LoadedModel) -> None:
        old, new = sets.measure(model)
        records.append({"method": method, "seed": seed, "share": share, "old": old, "new": new})
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


def mean(record: dict[str, Any], which: str) -> float:
    """Return the mean of what was measured on a set, in per cent."""
    return 100 * statistics.fmean(record[which].values())


def rows(records: list[dict[str, Any]], methods: list[str]) -> list[list[str]]:
    """Return a line for the start, and one for each method and share: means over seeds, the spread behind the last."""
    (start,) = (one for one in records if one["method"] == "start")
    table = []
    for method, share in [("start", 0.0), *((method, share) for method in methods for share in SHARES)]:
        some = [one for one in records if (one["method"], one["share"]) == (method, share)]
        cells = [f"{100 * statistics.fmean(one[which][name] for one in some):.1f}"
                 for which in ("new", "old") for name in MEASURED]
        for which in ("new", "old"):
            changes = [mean(one, which) - mean(start, which) for one in some]
            spread = f" ± {statistics.stdev(changes):.1f}" if len(changes) > 1 else ""
            cells.append(f"{statistics.fmean(changes):+.1f}{spread}")
        table.append([method, f"{share:g}", *cells])
    return table


def drawing(records: list[dict[str, Any]], methods: list[str]) -> str:
    """Return the SVG: what is gained against what is lost, from the start over merged models to each method's own."""
    (start,) = (one for one in records if one["method"] == "start")
    lines, legend = [], []
    for number, (method, colour) in enumerate(zip(methods, COLOURS, strict=False)):
        points = [(0.0, 0.0)]
        for share in SHARES:
            some = [one for one in records if (one["method"], one["share"]) == (method, share)]
            old, new = (statistics.fmean(mean(one, which) for one in some) for which in ("old", "new"))
            points.append((mean(start, "old") - old, new - mean(start, "new")))
        lines.append((colour, "", points))
        legend.append(f'<text x="{LEFT + 2 * PANEL[0] + 20}" y="{TOP + 20 * number + 14}" fill="{colour}">{method}'
                      '</text>')
    side = f'viewBox="0 0 {LEFT + 2 * PANEL[0] + 220} {TOP + 2 * PANEL[1] + GAP}"'
    chart = panel(LEFT, TOP, "lost on the old set, points of mean recall", "gained on the new set", lines,
                  size=(2 * PANEL[0], 2 * PANEL[1]))
    return (f'<svg xmlns="http://www.w3.org/2000/svg" {side} font-family="sans-serif" font-size="12">'
            f'<rect width="100%" height="100%" fill="white"/>{"".join(legend)}{chart}</svg>\n')


if __name__ == "__main__":
    main()
