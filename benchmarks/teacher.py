"""What a teacher costs in a step of `distill`: computed, or read from what `aclip data encode` stored.

    python benchmarks/teacher.py --model vit-micro --teacher vit-small --batch-size 32        2 minutes on 2 cores
    python benchmarks/teacher.py --model ViT-B-32 --teacher ViT-L-14 --batch-size 256 --device cuda

One process; the steps are taken in turns; medians and quartiles. Weights are random, batches synthetic (`aclip.bench`):
"read" has the features in the batch already, as a loader delivers them, and its steps include their way to the device.
"clip" is the student's own step, without a teacher.
"""

import argparse
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from rich.console import Console

from aclip import models
from aclip.bench import summary, synthetic_batch, time_in_turns
from aclip.config import RunConfig
from aclip.devices import choose_device, fast_precision
from aclip.method import Method
from aclip.plan import resolve_run
from aclip.recipes import configure
from aclip.trainer import Trainer
from aclip.training.schedule import Timetable


def build(config: RunConfig, device: torch.device, *, stored: bool) -> Trainer:
    """Return a trainer whose teacher is computed or stored."""
    model, teacher = models.create_model(config.model), None
    if config.teacher is not None and not stored:
        teacher = models.create_model(config.teacher)
    pixels = models.preprocess_config(model)
    method = Method(model, resolve_run(config), pixels["mean"], pixels["std"], teacher, stored=stored,
                    stored_logit_scale=14.3 if stored else None)
    return Trainer(config, method.to(device).train(), Timetable.of(config, 10**6), device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit-micro")
    parser.add_argument("--teacher", default="vit-small")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--device", default="auto")
    given = parser.parse_args()
    device = choose_device(given.device)
    common = {"model": given.model, "data": "synthetic", "batch_size": given.batch_size, "samples": 10**6,
              "precision": fast_precision(device)}
    distill = configure(recipe="distill", teacher=given.teacher, **common)
    trainers = {"computed": build(distill, device, stored=False), "read": build(distill, device, stored=True),
                "clip": build(configure(recipe="clip", **common), device, stored=False)}
    steps = {}
    for name, trainer in trainers.items():
        batch = synthetic_batch(trainer.method.plan, given.batch_size)
        if name == "read":
            width = trainer.method.plan.frozen_shape.joint_dim
            image, text = (F.normalize(torch.randn(given.batch_size, *shape), dim=-1).half()
                           for shape in ((1, width), (width,)))
            batch = replace(batch, stored={"frozen": image, "frozen-captions": text})
        steps[name] = partial(trainer.train_step, batch)
    times = {name: summary(seconds) for name, seconds in time_in_turns(
        steps, warmup=3, rounds=given.rounds, device=device).items()}
    console = Console(soft_wrap=True, highlight=False)
    console.print(f"{given.model} from {given.teacher}, batch {given.batch_size}, {common['precision']} on {device}, "
                  f"{torch.get_num_threads()} threads\n\n| teacher | ms a step | quartiles | of computed |\n"
                  "| --- | --- | --- | --- |")
    for name, time in times.items():
        console.print(f"| {name} | {1e3 * time['median']:.0f} | {1e3 * time['first_quartile']:.0f} to "
                      f"{1e3 * time['third_quartile']:.0f} | {time['median'] / times['computed']['median']:.2f} |")


if __name__ == "__main__":
    main()
