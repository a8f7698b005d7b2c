"""`aclip bench step` in processes of their own, which take turns: of several checkouts, or in several environments."""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

# Only the public command, so that older and newer versions of the package can be measured.
CHILD = """
import contextlib, io, json, sys, time
import torch  # before `aclip.cli`, which sets OMP_WAIT_POLICY otherwise
calls, clock = json.loads(sys.argv[1])
if clock == "processor":
    time.perf_counter = time.process_time
from aclip.cli import main
for call in calls:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = main(call)
    assert not code, code
    print("RESULT", json.dumps(json.loads(out.getvalue())), flush=True)
"""


@dataclass(frozen=True)
class Contender:
    """What is compared.

    Attributes:
        name: for the table.
        source: folder that holds the package `aclip`.
        environment: variable -> value; None removes it.
    """

    name: str
    source: Path
    environment: Mapping[str, str | None] = field(default_factory=dict)

    def bench(self, calls: Sequence[Sequence[str]], clock: str) -> list[dict[str, Any]]:
        """Return what `aclip bench step --json` prints for each call, all in one process."""
        environment = os.environ | {"PYTHONPATH": str(self.source.resolve()), "PYTHONSAFEPATH": "1"}
        for name, value in self.environment.items():
            environment.pop(name, None)
            if value is not None:
                environment[name] = value
        commands = [["bench", "step", *call, "--json"] for call in calls]
        done = subprocess.run([sys.executable, "-c", CHILD, json.dumps([commands, clock])], env=environment,
                              capture_output=True, text=True, check=False)
        found = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
        if len(found) != len(calls):
            raise RuntimeError(f"{self.name} ({self.source}) failed: {done.stderr[-2000:]}")
        return [json.loads(line.removeprefix("RESULT ")) for line in found]


def seconds_in_turns(
    contenders: Sequence[Contender], calls: Sequence[Sequence[str]], turns: int, clock: str = "wall"
) -> dict[str, list[list[float]]]:
    """Return name -> for each call the median step of every turn, in seconds.

    A turn is one process of each contender; every other turn goes through them backwards.
    """
    found: dict[str, list[list[float]]] = {one.name: [[] for _ in calls] for one in contenders}
    for turn in track(range(turns), "turns", console=Console(stderr=True), transient=True):
        for one in contenders if turn % 2 == 0 else reversed(contenders):
            for times, result in zip(found[one.name], one.bench(calls, clock), strict=True):
                times.append(float(result["speeds"][0]["seconds"]))
    return found


def compare_checkouts(
    other: Path, recipes: Sequence[str], models: Sequence[str], *, batch_size: int, rounds: int, turns: int,
    precision: str, clock: str,
) -> None:
    """Print the step times of this checkout relative to those of another one."""
    names = [(model, recipe) for model in models for recipe in dict.fromkeys(recipes)]
    calls = [["--recipe", recipe, "--model", model, "--batch-sizes", str(batch_size), "--rounds", str(rounds),
              "--precision", precision, "--device", "cpu"] for model, recipe in names]
    contenders = (Contender("other", other), Contender("this", Path(__file__).parents[1] / "src"))
    found = seconds_in_turns(contenders, calls, turns, clock)
    table = Table("model", "recipe", "other, ms", "this, ms", "this / other", "lowest to highest", box=None)
    for (model, recipe), before, now in zip(names, found["other"], found["this"], strict=True):
        ratios = [b / a for a, b in zip(before, now, strict=True)]
        table.add_row(model, recipe, f"{1e3 * statistics.median(before):.1f}", f"{1e3 * statistics.median(now):.1f}",
                      f"{statistics.median(ratios):.3f}", f"{min(ratios):.3f} to {max(ratios):.3f}")
    console = Console(width=120)
    console.print(table)
    console.print(f"batch {batch_size}, {precision}, {clock} clock, {turns} turns of {rounds} steps")
