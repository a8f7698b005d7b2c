"""Stages of `gpu.py` that read and train: the loader, a run that waits for it or not, and methods at equal time."""

import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

import aclip
import data
from gpu import SOFT, Bench


def loader(bench: Bench) -> None:
    """Measure pairs/s by number of workers, with augmentation left to the device, and `data_wait` of a run."""
    sizes = bench.sizes
    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        images = list(data.smooth_noise(sizes.different_images))
        shards = data.write_shards(Path(folder), (images * (-(-sizes.images // len(images))))[: sizes.images])
        torch.set_num_threads(1)
        for workers in sizes.workers:
            run = data.ours(shards, sizes.images, workers, views="two_crops_in_context", on_cpu=False)
            rate, per_core = data.rates(run, workers)
            bench.results.add("loader", workers=workers, **{"pairs/s": rate, "pairs/s a core": per_core})
        torch.set_num_threads(threads)
        for recipe in ("a-clip", "clip"):
            if bench.left() > 0:
                bench.results.add("a run", recipe=recipe, **real_run(bench, recipe, shards, f"{folder}/{recipe}"))


def real_run(bench: Bench, recipe: str, shards: str, output: str) -> dict[str, Any]:
    """Train for some steps as users do; return medians of what the run logged, without its first lines."""
    sizes = bench.sizes
    workers = min(8, max(sizes.workers))
    run = aclip.train(recipe=recipe, model=sizes.model, data=shards, output=output, batch_size=sizes.run_batch,
                      samples=sizes.run_steps * sizes.run_batch, workers=workers, device=bench.device,
                      precision="bf16", log_every=max(1, sizes.run_steps // 6), keep_checkpoints=1)
    logged = run.metrics[2:]
    return {"workers": workers, "batch": sizes.run_batch, "steps": sizes.run_steps,
            "pairs/s": statistics.median(line["samples_per_second"] for line in logged),
            "data_wait": statistics.median(line["data_wait"] for line in logged), "loss": logged[-1]["loss"]}


def training(bench: Bench) -> None:
    """Compare methods at equal time on emoji and icons, seed by seed as long as there is time."""
    if bench.data is None:
        raise FileNotFoundError("emoji and icons come from --bundle, a folder made by gpu_bundle.py")
    sizes = bench.sizes
    number = len(sizes.training_recipes)
    seconds = sizes.training_seconds
    rounds = int((bench.left() - sizes.run_overhead) / (number * (seconds + sizes.run_overhead)))
    if rounds < 1:
        raise RuntimeError(f"{number} runs of {seconds:g} s do not fit into {bench.seconds / 60:g} minutes")
    # what is left of the time makes all runs longer
    seconds = (bench.left() - sizes.run_overhead) / (number * rounds) - sizes.run_overhead
    sources = {folder.name: str(folder) for folder in sorted(bench.data.iterdir())}
    train = tuple(source for name, source in sources.items() if name.endswith("-train"))
    held_out = tuple(f"{name}={source}" for name, source in sources.items() if source not in train)
    with tempfile.TemporaryDirectory() as folder:
        compare = partial(
            aclip.compare, recipes=sizes.training_recipes, data=train, validation=held_out, output=folder,
            minutes=seconds / 60, model=sizes.training_model, image_size=sizes.training_size,
            batch_size=sizes.training_batch, device=bench.device, keep_checkpoints=1, timing_rounds=sizes.rounds)
        for seed in range(rounds):
            begun = time.monotonic()
            records = compare(seeds=tuple(range(seed + 1)))
            for record in (record for record in records if record["seed"] == seed):
                values = {f"{held}: {metric}": value for held, by in record["metrics"].items()
                          for found in by.values() for metric, value in found.items() if metric.endswith("_r1")}
                bench.results.add("equal time", recipe=record["recipe"], seed=seed, seconds=seconds,
                                  steps=record["total_steps"], **values)
            if bench.left() < SOFT * (time.monotonic() - begun):
                break
