"""A training run that is disturbed for half an hour, against the same run left alone.

    aclip data fetch emoji
    sudo python benchmarks/soak.py            # root, to mount a small disk that can be filled

Two ranks on the CPU under torchrun, which restarts them. Again and again a random rank gets SIGKILL or SIGTERM; the
disk is filled and freed once the run has reported that it could not save; the newest checkpoint is damaged (a byte
flipped; the end cut off) and a rank killed before there is another one. In the end every logged number, every
evaluation and every weight must equal those of the undisturbed run, bit for bit.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from rich.console import Console
from safetensors.numpy import load_file

CONSOLE = Console(highlight=False, soft_wrap=True)
TIMINGS = ("samples_per_second", "data_wait")
OPTIONS = ("--recipe", "a-clip", "--model", "vit-micro", "--batch-size", "32", "--save-every", "0.125",
           "--evaluate-every", "4", "--log-every", "4", "--workers", "1", "--precision", "fp32", "--device", "cpu",
           "--recipe.objectives.ntxent.options.hidden", "64", "--recipe.objectives.byol.options.hidden", "64",
           "--keep-checkpoints", "3")


def start(run: Path, steps: int, sources: list[str], log: Path) -> "subprocess.Popen[bytes]":
    """Start a run of two ranks under torchrun on (training, held-out) sources; its output goes to `log`."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
               "--max-restarts", "1000", "--monitor-interval", "0.5", "-m", "aclip", "train", *OPTIONS,
               "--data", sources[0], "--validation", sources[1], "--samples", str(32 * steps), "--output", str(run)]
    return subprocess.Popen(command, stdout=log.open("ab"), stderr=subprocess.STDOUT,
                            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"})


def ranks_of(torchrun: "subprocess.Popen[bytes]") -> list[int]:
    """Return the process ids of the ranks."""
    try:
        return [int(word) for word in Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children").read_text().split()]
    except OSError:
        return []


def records(run: Path, journal: str) -> list[dict[str, Any]]:
    """Return the whole lines of a journal."""
    found = []
    path = run / f"{journal}.jsonl"
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def last_step(run: Path) -> int:
    """Return the last step that is logged."""
    return max((record["step"] for record in records(run, "metrics")), default=0)


@contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[None]:
    """Mount a file system of its own on a folder."""
    folder.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


class Soak:
    """The disturbances of one run."""

    def __init__(self, disk: Path, log: Path, steps: int, sources: list[str], chance: random.Random) -> None:
        self.disk, self.run, self.log, self.chance = disk, disk / "run", log, chance
        self.torchrun = start(self.run, steps, sources, log)
        self.done: Counter[str] = Counter()

    def running(self) -> bool:
        """Return whether the run has not ended."""
        return self.torchrun.poll() is None

    def wait_for_progress(self, steps: int) -> None:
        """Wait until more steps are logged than before."""
        before = last_step(self.run)
        while self.running() and before <= last_step(self.run) < before + steps:
            time.sleep(0.2)

    def kill(self, number: signal.Signals) -> None:
        """Send a signal to a random rank."""
        ranks = ranks_of(self.torchrun)
        if self.running() and ranks:
            os.kill(self.chance.choice(ranks), number)
            self.done[number.name] += 1
            CONSOLE.print(f"{time.strftime('%X')} {number.name} at step {last_step(self.run)}")

    def fill_disk(self) -> None:
        """Leave no byte free until the run has reported that it cannot save."""
        reported = self.log.read_bytes().count(b"could not be written")
        filler = self.disk / "filler"
        with filler.open("wb", buffering=0) as file:
            until = time.monotonic() + 120
            while self.running() and time.monotonic() < until:
                try:
                    file.write(bytes(2**16))
                except OSError:
                    time.sleep(0.05)  # also fill what the run frees
                if self.log.read_bytes().count(b"could not be written") > reported:
                    self.done["disk full"] += 1
                    CONSOLE.print(f"{time.strftime('%X')} disk full at step {last_step(self.run)}")
                    break
        time.sleep(10)  # it continues on a full disk, and keeps the lines of its journals
        filler.unlink()

    def damage(self, how: str) -> None:
        """Damage the newest checkpoint and kill a rank, until the run has reported that it fell back."""
        reported = len([r for r in records(self.run, "incidents") if r["kind"] == "damaged_checkpoint"])
        checkpoints = sorted((self.run / "checkpoints").glob("step-????????"))
        if len(checkpoints) < 2:
            return
        file = self.chance.choice(sorted(checkpoints[-1].glob("*.safetensors")))
        content = bytearray(file.read_bytes())
        if how == "cut":
            del content[-1000:]
        else:
            content[len(content) // 2] ^= 1
        file.write_bytes(content)
        self.kill(signal.SIGKILL)
        self.wait_for_progress(1)
        now = [r for r in records(self.run, "incidents") if r["kind"] == "damaged_checkpoint"]
        if len(now) > reported:
            self.done[f"damaged ({how})"] += 1
            CONSOLE.print(f"{time.strftime('%X')} damaged ({how}): {now[-1]['reason']}")


def differences(one: Path, other: Path) -> list[str]:
    """Return what differs between two finished runs."""
    found = []
    for journal in ("metrics", "evaluations"):
        ours, theirs = ([{k: v for k, v in record.items() if k not in TIMINGS} for record in records(run, journal)]
                        for run in (one, other))
        if not ours or ours != theirs:
            first = next((b for a, b in zip(ours, theirs, strict=False) if a != b), "another number of lines")
            found.append(f"{journal}.jsonl: {first}")
    weights = [load_file(run / "final" / "open_clip_model.safetensors") for run in (one, other)]
    found += [name for name, tensor in weights[0].items() if tensor.tobytes() != weights[1][name].tobytes()]
    return found


def main() -> None:
    """Disturb, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/soak"))
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--pause", type=float, default=25, help="seconds between disturbances, at most (default: 25)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", nargs=2, default=["emoji:train[:2048]", "emoji:val_concept[:200]"],
                        metavar=("TRAINING", "HELD_OUT"), help="sources")
    parser.add_argument("--signals-only", action="store_true", help="leave disk and checkpoints alone; needs no root")
    args = parser.parse_args()
    shutil.rmtree(args.output, ignore_errors=True)
    args.output.mkdir(parents=True)
    chance = random.Random(args.seed)
    alone = start(args.output / "alone", args.steps, args.data, args.output / "alone.log")
    with nullcontext() if args.signals_only else small_disk(args.output / "disk", 1500):
        begun = time.monotonic()
        soak = Soak(args.output / "disk", args.output / "disturbed.log", args.steps, args.data, chance)
        wanted = {} if args.signals_only else {"disk full": 2, "damaged (flip)": 1, "damaged (cut)": 1}
        while soak.running():
            minutes = (time.monotonic() - begun) / 60
            kills = soak.done["SIGKILL"] + soak.done["SIGTERM"]
            left = [what for what, count in wanted.items() if soak.done[what] < count]
            if minutes >= args.minutes and kills >= args.kills and not left:
                break
            soak.wait_for_progress(chance.randint(1, 12))
            time.sleep(chance.random() * args.pause)
            what = chance.choice(left) if left and chance.random() < 0.3 else "kill"
            if what == "disk full":
                soak.fill_disk()
            elif what == "kill":
                soak.kill(chance.choice([signal.SIGKILL, signal.SIGTERM]))
            else:
                soak.damage(what[len("damaged ("):-1])
        minutes = (time.monotonic() - begun) / 60
        codes = soak.torchrun.wait(), alone.wait()
        different = differences(soak.run, args.output / "alone") if codes == (0, 0) else ["a run failed"]
        incidents = Counter(record["kind"] for record in records(soak.run, "incidents"))
        last = records(soak.run, "metrics")[-1]
        shutil.copytree(soak.run, args.output / "disturbed", ignore=shutil.ignore_patterns("checkpoints"))
    CONSOLE.print(f"disturbed for {minutes:.0f} minutes, {args.steps} steps: {dict(soak.done)}; exit codes {codes}; "
          f"incidents journalled {dict(incidents)}; last line of the metrics {last}")
    CONSOLE.print("differs from the undisturbed run: " + "; ".join(different[:5]) if different
          else "equals the undisturbed run: every logged number, every evaluation, every weight, bit for bit")
    sys.exit(bool(different) or minutes < args.minutes)


if __name__ == "__main__":
    main()
