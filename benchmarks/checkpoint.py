"""How long training waits for a checkpoint: a model with its EMA and AdamW's moments.

    python benchmarks/checkpoint.py --model ViT-B-16

Steps of `a-clip` on noise, with a checkpoint begun every few of them, in turns: timed are the call that begins one
(the copy in memory), the steps while it is written, and the steps without. The first checkpoint also allocates the
memory for the copy; it is given apart.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console

from aclip import devices
from aclip.bench import synthetic_batch
from aclip.checkpoint import Saver, list_checkpoints
from aclip.recipes import configure
from aclip.structs import Batch
from aclip.trainer import Trainer, build_trainer

CONSOLE = Console(highlight=False, soft_wrap=True)
STEPS_APART = 2


def build(model: str, device: torch.device, batch_size: int) -> Trainer:
    """Return a trainer of `a-clip`."""
    pairs = 10_000 * batch_size
    config = configure(recipe="a-clip", model=model, data=("synthetic",), batch_size=batch_size, samples=pairs)
    return build_trainer(config, pairs, device)


def measure(trainer: Trainer, batch: Batch, folder: Path, checkpoints: int) -> None:
    """Take steps with checkpoints among them, and print the times."""
    alone, beside, waited, written = [], [], [], []
    saver = Saver(folder, keep=1)

    def step() -> float:
        begun = time.perf_counter()
        trainer.train_step(batch)
        devices.synchronize(trainer.device)
        return time.perf_counter() - begun

    for _ in range(2):
        step()
    for _ in range(checkpoints):
        for _ in range(STEPS_APART):
            alone.append(step())
        begun, saved = time.perf_counter(), trainer.step
        saver.save(saved, *trainer.state_dict())
        waited.append(time.perf_counter() - begun)
        while not (folder / f"step-{saved:08d}").exists():
            failures = saver.failures()
            assert not failures, failures
            beside.append(step())
        written.append(time.perf_counter() - begun)
    saver.wait()
    saver.close()
    assert len(list_checkpoints(folder)) == 1
    size = sum(tensor.nbytes for tensor in trainer.state_dict()[0].values())
    CONSOLE.print(f"{size / 2**30:.2f} GiB on {trainer.device}, {torch.get_num_threads()} threads, batch {batch.size}, "
                  f"{trainer.config.precision}")
    CONSOLE.print(f"a step alone: {spread(alone)} s; a step while a checkpoint is written: {spread(beside)} s")
    CONSOLE.print(f"training waited {spread(waited[1:])} s for a checkpoint ({waited[0]:.2f} s for the first), "
                  f"{statistics.median(waited[1:]) / statistics.median(alone):.2f} of a step; it was on the disk "
                  f"after {spread(written)} s")


def spread(seconds: list[float]) -> str:
    """Return median, lowest and highest."""
    return f"{statistics.median(seconds):.2f} ({min(seconds):.2f} to {max(seconds):.2f})" if seconds else "-"


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="ViT-B-16")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--checkpoints", type=int, default=4, help="2 or more")
    parser.add_argument("--folder", type=Path, help="on the disk to measure (default: the temporary one)")
    args = parser.parse_args()
    trainer = build(args.model, devices.choose_device(args.device), args.batch_size)
    batch = synthetic_batch(trainer.method.plan, args.batch_size)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        measure(trainer, batch, Path(folder), args.checkpoints)


if __name__ == "__main__":
    main()
