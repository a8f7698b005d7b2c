"""How far trainings over ranks, and in parts, are from those of one process: every recipe, both ways to spread it.

    python benchmarks/equality.py --ranks 2

On the CPU, with the tests' very small model: the largest difference of any weight after ten steps of SGD in fp64, and
of any loss in fifty steps of AdamW in fp32.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

TESTS = Path(__file__).parent.parent / "tests"
sys.path[:0] = [str(TESTS), str(TESTS / "training")]

from training_runs import largest_errors, train_alone  # noqa: E402

from aclip.recipes import RECIPES  # noqa: E402
from over_ranks import run_ranks  # noqa: E402

WAYS = ("ddp", "fsdp", "ddp in 2")


def main() -> None:
    """Train and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2, help="processes (default: 2)")
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), help="which (default: all)")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    cases = [(recipe, way, optimizer) for recipe in asked.recipes for way in WAYS for optimizer in ("sgd", "adamw")]
    with tempfile.TemporaryDirectory() as folder:
        train_alone(Path(folder), cases)
        ranks = run_ranks(asked.ranks, Path(folder), largest_errors, cases)
    worst = {case: tuple(map(max, zip(*(rank[case] for rank in ranks), strict=True))) for case in cases}
    table = Table("recipe", *(f"{way}: SGD weights" for way in WAYS), *(f"{way}: AdamW losses" for way in WAYS))
    for recipe in asked.recipes:
        table.add_row(recipe, *(f"{worst[recipe, way, 'sgd'][1]:.1e}" for way in WAYS),
                      *(f"{worst[recipe, way, 'adamw'][0]:.1e}" for way in WAYS))
    table.add_row("largest", *(f"{max(worst[r, way, 'sgd'][1] for r in asked.recipes):.1e}" for way in WAYS),
                  *(f"{max(worst[r, way, 'adamw'][0] for r in asked.recipes):.1e}" for way in WAYS))
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
