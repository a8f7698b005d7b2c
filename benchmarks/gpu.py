"""Everything that is to be measured on a GPU, in one command.

    python benchmarks/gpu_bundle.py gpu-bundle                        where there is a network: what the machine lacks
    python benchmarks/gpu.py --plan 20 --dry-run                      what would run, and for how long
    python benchmarks/gpu.py --plan 20 --bundle gpu-bundle            20 minutes of one GPU
    python benchmarks/gpu.py --plan 20 --bundle gpu-bundle --minutes 9.5       the same in parts: call it again
    python benchmarks/gpu.py --stages steps=4 attention               some stages, with their minutes
    python benchmarks/gpu.py --plan 20 --tiny --device cpu            a rehearsal

Needs Python 3.12 and torch alone; the rest comes from the bundle. Every stage runs in a process of its own, which is
ended when its minutes are over. Results are written as soon as there are any: a line each to `results.jsonl`, all of
them as tables to `results.md`, in the folder --output. Stages that are finished there are not run again.
"""

import argparse
import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
SOFT = 0.9
"""A stage starts nothing new after this fraction of its minutes."""


@dataclass(frozen=True)
class Stage:
    """A function of the same name in `module`; `estimate` is minutes on an H200, by arithmetic, not measured."""

    module: str
    about: str
    estimate: float


STAGES = {
    "check": Stage("gpu_checks", "every recipe on the device against the CPU, in bf16, and in fp16 with a scaler", 1.1),
    "profile": Stage("gpu_checks", "ten steps of a-clip: synchronisations, kernels by kind, time by part", 0.8),
    "steps": Stage("gpu_speed", "steps of every method and open_clip's, eager and compiled, in turns", 4.7),
    "optimizers": Stage("gpu_speed", "a step of AdamW, fused AdamW, two Muons, and the EMA update", 0.4),
    "loader": Stage("gpu_training", "pairs/s by number of workers, and data_wait of a real run", 1.2),
    "attention": Stage("gpu_speed", "the [CLS] row, SDPA backends, packed captions, CUDA graphs", 0.8),
    "training": Stage("gpu_training", "clip, a-clip, random and attentive masks at equal time: emoji, icons", 6.7),
    "ranks": Stage("gpu_checks", "two processes on one device against one", 0.9),
}
"""In the order in which they run."""

PLANS = {
    "20": {"check": 1.5, "profile": 1.0, "steps": 5.0, "optimizers": 0.5, "loader": 1.5, "attention": 1.5,
           "training": 7.0, "ranks": 1.0},
    "8": {"check": 1.3, "profile": 1.0, "steps": 2.3, "optimizers": 0.5, "loader": 1.1, "attention": 0.8, "ranks": 1.0},
}
"""Minutes of each stage, at most."""


@dataclass(frozen=True)
class Sizes:
    """How large everything is; the defaults are for one GPU with some 140 GB."""

    check_model: str = "vit-micro"
    check_recipes: tuple[str, ...] = ()  # none: all
    check_batch: int = 16
    model: str = "ViT-B-16"
    profile_batch: int = 256
    profile_steps: int = 10
    step_batch: int | None = None  # the largest that fits
    step_methods: tuple[str, ...] = ()  # none: all
    compiles: bool = True
    rounds: int = 7
    repeat: int = 10  # calls of a short operation between two readings of the clock
    attention_batch: int = 256
    graph_batches: tuple[int, ...] = (32, 256)
    images: int = 4096
    different_images: int = 256
    workers: tuple[int, ...] = (1, 4, 8, 15)
    run_batch: int = 256
    run_steps: int = 60
    training_model: str = "ViT-S-16"
    training_size: int | None = 128
    training_batch: int = 256
    training_recipes: tuple[str, ...] = ("clip", "a-clip", "random-2x50", "attentive-2x50")
    trial_steps: int = 30  # of each method, for its rate
    training_seconds: float = 60.0  # of each run, where there is time for several seeds


TINY = Sizes(
    check_recipes=("clip", "a-clip"), check_batch=4, model="vit-micro", profile_batch=4, profile_steps=2,
    step_batch=2, step_methods=("clip", "a-clip"), rounds=2, repeat=1, attention_batch=2, graph_batches=(2,),
    images=512, different_images=4, workers=(1,), run_batch=8, run_steps=20, training_model="vit-micro",
    training_size=None, training_batch=8, training_recipes=("clip", "a-clip"), trial_steps=20, training_seconds=2.0,
    compiles=False,  # C++ takes minutes
)
"""For rehearsals on a CPU."""


@dataclass
class Results:
    """Rows of named tables in a folder: `results.jsonl`, a line as soon as a row is known, and `results.md`."""

    folder: Path
    rows: list[dict[str, Any]] = field(init=False)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.path = self.folder / "results.jsonl"
        self.rows = [json.loads(line) for line in self.path.read_text().splitlines()] if self.path.exists() else []

    def add(self, table: str, **row: Any) -> None:
        """Write a row, and say it."""
        self.rows.append({"table": table, **row})
        with self.path.open("a") as file:
            file.write(json.dumps(self.rows[-1]) + "\n")
        (self.folder / "results.md").write_text(markdown(self.rows))
        sys.stdout.write(f"{table}: {', '.join(f'{key} {short(value)}' for key, value in row.items())}\n")
        sys.stdout.flush()

    def finished(self) -> set[str]:
        """Return the names of the stages that ran to their end."""
        return {row["stage"] for row in self.rows if row["table"] == "stages" and row["outcome"] == "finished"}


@dataclass
class Bench:
    """What a stage gets; it starts nothing new when nothing is `left`, and adds its rows to `results`."""

    device: str
    sizes: Sizes
    results: Results
    seconds: float
    data: Path | None = None
    begun: float = field(default_factory=time.monotonic)

    def left(self) -> float:
        """Return the seconds in which something new may be started and ended."""
        return self.begun + SOFT * self.seconds - time.monotonic()


def short(value: Any) -> str:
    """Return a value as tables show it."""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return " to ".join(map(short, value)) if isinstance(value, list) else str(value)


def markdown(rows: Iterable[dict[str, Any]]) -> str:
    """Return the tables, each with the columns of all of its rows."""
    tables: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        tables.setdefault(row["table"], []).append(row)
    text = []
    for name, members in tables.items():
        columns = list(dict.fromkeys(key for row in members for key in row if key != "table"))
        lines = [columns, ["---"] * len(columns), *([short(row.get(key, "")) for key in columns] for row in members)]
        text += [f"## {name}", "", *(f"| {' | '.join(cells)} |" for cells in lines), ""]
    return "\n".join(text)


def chosen_stages(plan: str | None, stages: Sequence[str]) -> dict[str, float]:
    """Return minutes by stage, in the order in which they run: the plan, or those named, NAME or NAME=MINUTES."""
    if not stages:
        return PLANS[plan or "20"]
    named = {}
    for words in stages:
        name, _, minutes = words.partition("=")
        if name not in STAGES:
            raise SystemExit(f"gpu.py: there is no stage '{name}': choose among {', '.join(STAGES)}")
        named[name] = float(minutes or PLANS[plan or "20"].get(name) or PLANS["20"][name])
    return {name: named[name] for name in STAGES if name in named}


def unpack(bundle: Path, folder: Path) -> None:
    """Install the wheels of a bundle into `folder/site`, and unpack its shards into `folder/data`."""
    wheels = sorted((bundle / "wheels").glob("*.whl"))
    if wheels:
        subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile",
                        "--target", str(folder / "site"), *map(str, wheels)], check=True)
    with tarfile.open(bundle / "data.tar.gz") as archive:
        archive.extractall(folder / "data", filter="data")


def run_stage(name: str, minutes: float, words: Sequence[str], environment: dict[str, str]) -> tuple[str, float]:
    """Run a stage in a process of its own, which is ended, its children too, when its time is over."""
    begun = time.monotonic()
    command = [sys.executable, __file__, "--child", name, "--stages", f"{name}={minutes}", *words]
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    try:
        code = process.wait(timeout=60 * minutes)
        outcome = "finished" if code == 0 else f"failed ({code})"
    except subprocess.TimeoutExpired:
        outcome = "out of time"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return outcome, time.monotonic() - begun


def child(name: str, bench: Bench) -> int:
    """Run a stage here; an error becomes a row, its traceback goes to standard error."""
    try:
        getattr(importlib.import_module(STAGES[name].module), name)(bench)
    except Exception as error:
        traceback.print_exc()
        bench.results.add("errors", stage=name, error=f"{type(error).__name__}: {str(error).splitlines()[:1]}")
        return 1
    return 0


def dry_run(minutes: dict[str, float], finished: set[str]) -> None:
    """Print what would run."""
    todo = [name for name in minutes if name not in finished]
    rows = [{"table": "plan", "stage": name, "what": STAGES[name].about, "at most": limit,
             "estimate, minutes": min(STAGES[name].estimate, limit) if name in todo else "finished"}
            for name, limit in minutes.items()]
    rows.append({"table": "plan", "stage": "all", "what": "estimates are arithmetic: nothing was measured on a GPU",
                 "estimate, minutes": round(sum(min(STAGES[n].estimate, minutes[n]) for n in todo), 1),
                 "at most": round(sum(minutes[n] for n in todo), 1)})
    sys.stdout.write(markdown(rows))


def main() -> None:
    """Run the stages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", choices=PLANS, help="stages and minutes (default: 20)")
    parser.add_argument("--stages", nargs="+", default=[], metavar="NAME[=MINUTES]", help=f"of {', '.join(STAGES)}")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="of this call: stages that do not fit wait")
    parser.add_argument("--output", type=Path, default=Path("gpu-results"))
    parser.add_argument("--bundle", type=Path, help="folder made by gpu_bundle.py")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="rehearse at sizes for a CPU")
    parser.add_argument("--dry-run", action="store_true", help="print what would run, and estimates")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--data", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    begun = time.monotonic()
    minutes = chosen_stages(args.plan, args.stages)
    if args.dry_run:
        dry_run(minutes, Results(args.output).finished() if args.output.exists() else set())
        return
    results = Results(args.output)
    if args.child:
        sizes = TINY if args.tiny else Sizes()
        sys.exit(child(args.child, Bench(args.device, sizes, results, 60 * minutes[args.child], args.data)))
    with tempfile.TemporaryDirectory(prefix="aclip-gpu-") as folder:
        if args.bundle:
            unpack(args.bundle, Path(folder))
        paths = [f"{folder}/site", str(HERE.parent / "src"), str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
        words = ["--output", str(args.output), "--device", args.device, *(["--tiny"] if args.tiny else []),
                 *(["--data", f"{folder}/data"] if args.bundle else [])]
        run_stages(minutes, results, begun + 60 * args.minutes, words, environment)


def run_stages(
    minutes: dict[str, float], results: Results, until: float, words: Sequence[str], environment: dict[str, str]
) -> None:
    """Run the stages that are not finished and can end before `until`."""
    for name, limit in minutes.items():
        if name in results.finished():
            continue
        if time.monotonic() + 60 * limit > until:
            sys.stdout.write(f"{name} may take {limit:g} minutes, which are not left: call again to go on\n")
            break
        sys.stdout.write(f"--- {name}, at most {limit:g} minutes: {STAGES[name].about}\n")
        sys.stdout.flush()
        outcome, seconds = run_stage(name, limit, words, environment)
        results = Results(results.folder)
        results.add("stages", stage=name, outcome=outcome, minutes=seconds / 60)


if __name__ == "__main__":
    main()
