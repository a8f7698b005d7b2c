"""How long training stands still for a checkpoint: a model with its EMA and AdamW's moments.

    python benchmarks/checkpoint.py --model ViT-B-16
    python benchmarks/checkpoint.py --writers        # ours against safetensors' and torch's distributed checkpoints

Steps of `a-clip` on noise, with a checkpoint begun every few of them, in turns: what is timed is the call that begins
one (the copy in memory), the steps while it is written, and the steps without. The first checkpoint also takes the
memory for the copy; it is given apart.
"""

import argparse
import os
import resource
import shutil
import statistics
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed.checkpoint as torch_checkpoint
from rich.console import Console
from safetensors.torch import save_file

from aclip import models, plan
from aclip.data.augment import AUGMENTATIONS, draw
from aclip.engine.checkpoint import list_checkpoints
from aclip.engine.run_config import RunConfig, Timetable, choose_device, settled
from aclip.engine.saving import Saver
from aclip.engine.trainer import Trainer
from aclip.method import Method
from aclip.recipes import RECIPES
from aclip.rng import generator
from aclip.structs import Batch, ViewBatch
from aclip.tensor_files import own_pieces, write_shard

CONSOLE = Console(highlight=False, soft_wrap=True)


def build(model_name: str, device: torch.device, batch_size: int) -> Trainer:
    """Return a trainer of `a-clip`."""
    config = settled(RunConfig(RECIPES["a-clip"], model_name, data="noise", output="none", batch_size=batch_size),
                     batch_size, device)
    resolved = plan.resolve(config.recipe, models.shape_of(models.model_config(model_name)))
    method = Method(models.create_model(model_name), resolved, (0.5,) * 3, (0.25,) * 3).to(device).train()
    return Trainer(config, method, Timetable.of(replace(config, samples=10_000 * batch_size), batch_size), device)


def noise(trainer: Trainer, rows: int) -> Batch:
    """Return a batch of noise."""
    resolved = trainer.method.plan
    views = {}
    for name, size in resolved.view_sizes.items():
        drawn = [torch.from_numpy(draw(AUGMENTATIONS["a-clip"], generator(0, name, row))) for row in range(rows)]
        views[name] = ViewBatch(torch.randint(0, 256, (rows, 3, *size), dtype=torch.uint8),
                                torch.tensor([[0.0, 0.0, 80.0, 80.0]] * rows), torch.zeros(rows, dtype=torch.bool),
                                None if name == "context" else torch.stack(drawn))
    tokens = torch.randint(1, 1000, (rows, 16))
    tokens[:, -1] = resolved.shape.vocab_size - 1
    return Batch(views, tokens, torch.arange(rows), torch.arange(rows)).to(trainer.device)


def steps(trainer: Trainer, batch: Batch, saver: Saver, checkpoints: int, apart: int) -> None:
    """Take steps with checkpoints among them, and tell."""
    alone, beside, still, written = [], [], [], []

    def step() -> float:
        begun = time.perf_counter()
        trainer.train_step(batch)
        if trainer.device.type == "cuda":
            torch.cuda.synchronize()
        saver.advance()
        return time.perf_counter() - begun

    for _ in range(2):
        step()
    for _ in range(checkpoints):
        for _ in range(apart):
            alone.append(step())
        begun = time.perf_counter()
        saver.save(trainer.at_rest())
        still.append(saver.seconds)
        while saver.writing:
            beside.append(step())
        written.append(time.perf_counter() - begun)
    failures = saver.failures()
    assert not failures, failures
    size = sum(tensor.nbytes for tensor in trainer.at_rest().tensors.values())
    CONSOLE.print(f"{size / 2**30:.2f} GiB on {trainer.device}, {torch.get_num_threads()} threads, batch {batch.size}, "
                  f"{trainer.config.precision}")
    CONSOLE.print(f"a step alone: {spread(alone)} s; a step while a checkpoint is written: {spread(beside)} s")
    CONSOLE.print(f"training stood still for {spread(still[1:])} s a checkpoint ({still[0]:.2f} s for the first), "
                  f"{statistics.median(still[1:]) / statistics.median(alone):.2f} of a step; it was on the disk "
                  f"after {spread(written)} s")


def spread(seconds: list[float]) -> str:
    """Return median, lowest and highest."""
    return f"{statistics.median(seconds):.2f} ({min(seconds):.2f} to {max(seconds):.2f})"


def compare_writers(folder: Path, rounds: int) -> None:
    """Time the writing of 1 GiB, and how long another thread is kept from its work meanwhile."""
    state = {f"t{number}": torch.randn(1024, 1024) for number in range(256)}

    def with_torch() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            writer = torch_checkpoint.HuggingFaceStorageWriter(str(folder), save_distributed=True)
            torch_checkpoint.save(state, storage_writer=writer)

    def with_safetensors() -> None:
        save_file(state, folder / "a.safetensors")
        with (folder / "a.safetensors").open("rb") as file:
            os.fsync(file.fileno())

    ways: dict[str, Callable[[], object]] = {
        "this project's": lambda: write_shard(folder / "b.safetensors", own_pieces(state)),
        "safetensors' save_file (no checksum)": with_safetensors,
        "torch.distributed.checkpoint's (no checksum)": with_torch,
    }
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            found[name].append(watched(way))
    for name, numbers in found.items():
        seconds, stalls, peaks = map(list, zip(*numbers, strict=True))
        CONSOLE.print(f"{name}: {spread(seconds)} s; another thread stood still for {spread(stalls)} s at most; "
                      f"{max(peaks) / 2**30:.2f} GiB more memory than before")


def watched(way: Callable[[], object]) -> tuple[float, float, float]:
    """Return the seconds that `way` takes, the longest pause of another thread meanwhile, and the growth of the peak
    memory in bytes."""
    longest, done = 0.0, threading.Event()

    def tick() -> None:
        nonlocal longest
        last = time.perf_counter()
        while not done.is_set():
            time.sleep(0.001)
            now = time.perf_counter()
            longest, last = max(longest, now - last), now

    ticker = threading.Thread(target=tick)
    ticker.start()
    peak, begun = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    way()
    seconds = time.perf_counter() - begun
    done.set()
    ticker.join()
    return seconds, longest, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) * 1024.0


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="ViT-B-16")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--checkpoints", type=int, default=4)
    parser.add_argument("--folder", type=Path, help="on the disk to measure (default: the temporary one)")
    parser.add_argument("--writers", action="store_true", help="compare ways of writing instead")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=args.folder))
    try:
        if args.writers:
            compare_writers(folder, rounds=3)
            return
        device = choose_device(args.device)
        trainer = build(args.model, device, args.batch_size)
        saver = Saver(folder, keep=1)
        steps(trainer, noise(trainer, args.batch_size), saver, args.checkpoints, apart=2)
        saver.close()
        assert len(list_checkpoints(folder)) == 1
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
