"""Stages of `gpu.py` that read and train: the loader, a run that waits for it or not, and methods at equal time."""

import statistics
import tempfile
import time
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch

import aclip
import data
from aclip.report.journals import outcome
from gpu import Bench


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
    """Train every method for the same time, waiting for data included; seed by seed as long as there is time."""
    if bench.data is None:
        raise FileNotFoundError("emoji and icons come from --bundle, a folder made by gpu_bundle.py")
    sizes, recipes = bench.sizes, bench.sizes.training_recipes
    sources = {folder.name: str(folder) for folder in sorted(bench.data.iterdir())}
    train = tuple(source for name, source in sources.items() if name.endswith("-train"))
    held_out = tuple(f"{name}={source}" for name, source in sources.items() if source not in train)
    with tempfile.TemporaryDirectory() as folder:
        run = partial(
            aclip.train, data=train, validation=held_out, model=sizes.training_model, image_size=sizes.training_size,
            batch_size=sizes.training_batch, precision="bf16", device=bench.device, workers=max(sizes.workers),
            unmasked_tuning=0.15, keep_checkpoints=1, log_every=5)
        rates, overheads = {}, []
        for recipe in recipes:
            begun, samples = time.monotonic(), sizes.trial_steps * sizes.training_batch
            logged = run(recipe=recipe, samples=samples, output=f"{folder}/{recipe}").metrics[1:]
            rates[recipe] = statistics.harmonic_mean([line["samples_per_second"] for line in logged])
            overheads.append(time.monotonic() - begun - samples / rates[recipe])
        overhead = max(overheads)
        rounds = max(1, int(bench.left() / (len(recipes) * (sizes.training_seconds + overhead))))
        seconds = bench.left() / (len(recipes) * rounds) - overhead
        if seconds <= 0:
            raise RuntimeError(f"a run takes {overhead:.0f} s beside its training: give the stage more minutes")
        for seed, recipe in product(range(rounds), recipes):
            if bench.left() < seconds:
                bench.results.add("left out", stage="training", what=f"{recipe}, seed {seed}", why="time")
                break
            begun, samples = time.monotonic(), int(seconds * rates[recipe])
            done = run(recipe=recipe, seed=seed, samples=samples, output=f"{folder}/{recipe}-{seed}")
            found = outcome(done.folder)
            bench.results.add("equal time", recipe=recipe, seed=seed, seconds=seconds, steps=found["steps"],
                              **{"pairs/s before": rates[recipe], "seconds, all": time.monotonic() - begun}, **{
                f"{held}: {metric}": value for held, by in found["metrics"].items()
                for metric, value in by["retrieval"].items() if metric.endswith("_r1")})
