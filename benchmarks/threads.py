"""How fast training is under several wait policies of OpenMP, alone on the machine and beside a busy process.

    python benchmarks/threads.py --threads 2

OpenMP's idle threads spin at barriers before they sleep. Beside another busy process they take processor time from
those that they wait for; `aclip` sets OMP_WAIT_POLICY=PASSIVE unless the user has set it. Each measurement is a process
of its own; policies take turns. Prints pairs a second, and ratios to what OpenMP does without any setting.
"""

import argparse
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.table import Table

from checkouts import Contender, seconds_in_turns

POLICIES: dict[str, dict[str, str | None]] = {
    "no setting": {},
    "OMP_WAIT_POLICY=PASSIVE": {"OMP_WAIT_POLICY": "PASSIVE"},
    "GOMP_SPINCOUNT=1000": {"GOMP_SPINCOUNT": "1000"},
    "GOMP_SPINCOUNT=30000": {"GOMP_SPINCOUNT": "30000"},
}
CLEAN: dict[str, str | None] = {"OMP_WAIT_POLICY": None, "GOMP_SPINCOUNT": None}
BUSY = [sys.executable, "-c", "while True: pass"]


@contextmanager
def busy(processes: int) -> Iterator[None]:
    """Keep so many processes busy."""
    running = [subprocess.Popen(BUSY) for _ in range(processes)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--recipe", default="a-clip")
    parser.add_argument("--model", default="vit-tiny")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--busy", type=int, nargs="+", default=[0, 1], help="busy processes beside it")
    parser.add_argument("--policies", nargs="+", choices=POLICIES, default=list(POLICIES))
    args = parser.parse_args()
    source = Path(__file__).parents[1] / "src"
    contenders = [Contender(name, source, CLEAN | POLICIES[name] | {"OMP_NUM_THREADS": str(args.threads)})
                  for name in args.policies]
    call = ["--recipe", args.recipe, "--model", args.model, "--batch-sizes", str(args.batch_size), "--rounds",
            str(args.rounds), "--precision", "fp32", "--device", "cpu"]
    seconds: dict[tuple[int, str], list[float]] = {(n, one.name): [] for n in args.busy for one in contenders}
    for turn in range(args.turns):
        for number in args.busy:
            with busy(number):
                found = seconds_in_turns(contenders if turn % 2 == 0 else contenders[::-1], [call], 1)
            for name, (times,) in found.items():
                seconds[number, name] += times
    table = Table("busy processes", "policy", "pairs/s", "x first", "lowest to highest", box=None)
    for (number, name), times in seconds.items():
        ratios = [a / b for a, b in zip(seconds[number, args.policies[0]], times, strict=True)]
        table.add_row(str(number), name, f"{args.batch_size / statistics.median(times):.1f}",
                      f"{statistics.median(ratios):.2f}", f"{min(ratios):.2f} to {max(ratios):.2f}")
    console = Console(width=120)
    console.print(table)
    console.print(f"{args.recipe} on {args.model}, batch {args.batch_size}, {args.threads} threads; medians of "
                  f"{args.turns} turns of {args.rounds} steps")


if __name__ == "__main__":
    main()
