"""What a step sends between processes: the formulas of docs/benchmarks.md beside what torch's profiler counts.

    python benchmarks/communication.py

On the CPU with gloo, in fp32. Of every collective operation of a step the profiler tells the shapes; counted is the
whole of what is reduced, gathered or scattered, the largest tensor of the operation, as if it were fp32: of the int64
caption ids half.
"""

import argparse
import math
import os
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as torch_dist
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.multiprocessing.spawn import spawn

from aclip import dist, models, plan
from aclip.bench import synthetic_batch
from aclip.config import Parallel
from aclip.method import Method
from aclip.models.blocks import blocks_of, stacks_of
from aclip.recipes import RECIPES
from aclip.structs import Batch
from aclip.training.distributed import wrap

MODEL = "vit-micro"
KINDS = {"gloo:all_reduce": "all-reduce", "c10d::_allgather_base_": "all-gather",
         "c10d::_reduce_scatter_base_": "reduce-scatter"}


def build(recipe: str) -> Method:
    """Return a recipe on the model."""
    torch.manual_seed(0)
    resolved = plan.resolve(RECIPES[recipe], models.shape_of(models.model_config(MODEL)))
    return Method(models.create_model(MODEL, with_text=resolved.uses_text), resolved, (0.5,) * 3, (0.25,) * 3).train()


def formulas(method: Method, parallel: str, batch: int) -> Counter[str]:
    """Return bytes of a step by kind of operation, as docs/benchmarks.md has them; before the method is sharded."""
    found: Counter[str] = Counter()
    trained = [p for p in method.parameters() if p.requires_grad]
    if parallel == "ddp":
        found["all-reduce"] += 4 * sum(p.numel() for p in trained)
    else:
        blocks = [p for stack in stacks_of(method) for block in blocks_of(stack) for p in block.parameters()]
        whole = sum(p.numel() for p in method.parameters() if p.ndim)
        again = sum(p.numel() for p in blocks if p.requires_grad)  # gathered again for the backward pass
        found["all-gather"] += 4 * (whole + again)
        found["reduce-scatter"] += 4 * sum(p.numel() for p in trained if p.ndim)
        found["all-reduce"] += 4 * sum(1 for p in trained if not p.ndim)
    views = len(list(method.plan.passes.values())[-1].spec.views)
    for name, objective in method.plan.recipe.objectives.items():
        if name == "contrastive":
            features = views * 2 * 4 * batch * method.plan.shape.joint_dim
            found["all-gather"] += features + views * 8 * batch  # caption ids are int64
            found["reduce-scatter"] += features
        if name == "ntxent":
            features = 2 * 4 * batch * int(objective.options.get("out", 256))
            found["all-gather"] += features
            found["reduce-scatter"] += features
    for name, module in method.named_modules():
        if isinstance(module, nn.BatchNorm1d):
            moments = 2 * 4 * module.num_features * dist.world_size()  # mean and variance of every rank
            found["all-gather"] += moments
            found["reduce-scatter"] += 0 if "ema_" in name else moments
    return found


def counted(step: Any) -> Counter[str]:
    """Return bytes of a step by kind of operation, as the profiler counts them."""
    with torch.profiler.profile(record_shapes=True) as profile:
        step()
    found: Counter[str] = Counter()
    for event in profile.events():
        if event.name in KINDS:
            found[KINDS[event.name]] += largest(event.input_shapes)
    return found


def largest(shapes: Any) -> int:
    """Return the bytes of the largest tensor among the arguments of an operation, all counted as fp32."""
    found = [0]

    def look(shape: Any) -> None:
        if shape and all(isinstance(side, int) for side in shape):
            found.append(math.prod(shape))
        elif isinstance(shape, list | tuple):
            for part in shape:
                look(part)

    look(shapes)
    if found == [0]:
        found.append(1)  # a scalar has no sides
    return max(found) * 4


def one_rank(rank: int, ranks: int, folder: str, cases: list[tuple[str, Parallel]], batch: int) -> None:
    """Take each case's step, and leave what was counted."""
    torch.set_num_threads(1)
    torch_dist.init_process_group("gloo", init_method=f"file://{folder}/meet-{ranks}", rank=rank, world_size=ranks)
    found = {}
    for recipe, parallel in cases:
        method = build(recipe)
        expected = formulas(method, parallel, batch)
        wrapped = wrap(method, torch.device("cpu"), parallel=parallel)
        local = synthetic_batch(method.plan, batch // dist.world_size())

        def step(wrapped: Any = wrapped, local: Batch = local) -> None:
            wrapped.step(local).loss.backward()

        step()  # DDP's first step arranges its runs of gradients
        found[recipe, parallel] = expected, counted(step)
    if rank == 0:
        torch.save(found, f"{folder}/{ranks}.pt")
    torch_dist.destroy_process_group()


def main() -> None:
    """Count and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=16, help="global (default: 16)")
    parser.add_argument("--recipes", nargs="+", default=["clip", "a-clip"], help="which (default: clip a-clip)")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4], help="processes (default: 2 4)")
    asked = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    ways: tuple[Parallel, ...] = ("ddp", "fsdp")
    cases = [(recipe, parallel) for recipe in asked.recipes for parallel in ways]
    table = Table("W", "recipe", "parallel", "operation", "formula, bytes", "counted, bytes", "ratio")
    for ranks in asked.ranks:
        with tempfile.TemporaryDirectory() as folder:
            spawn(one_rank, (ranks, folder, cases, asked.batch_size), nprocs=ranks)
            found = torch.load(Path(folder) / f"{ranks}.pt", weights_only=False)
        for (recipe, parallel), (expected, seen) in found.items():
            for kind in sorted(expected | seen):
                table.add_row(str(ranks), recipe, parallel, kind, f"{expected[kind]:,}", f"{seen[kind]:,}",
                              f"{seen[kind] / max(1, expected[kind]):.4f}")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
