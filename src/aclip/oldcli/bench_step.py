"""`aclip bench step`: what training will take on this machine: steps a second, hours, memory, the best batch size."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from aclip.engine.run_config import RunConfig
    from aclip.engine.trainer import Trainer

BATCH_SIZES = {"cpu": (16, 64, 256), "cuda": (64, 256, 1024)}
WARMUP = 2
LENGTH = 1000  # steps of the schedule that the timed ones are the first of

EXAMPLES = """\
examples:
  aclip bench step
  aclip bench step --recipe a-clip-eff --model ViT-B-16 --batch-sizes 128 256 512 --pairs 3000000 --epochs 25
  aclip bench step --recipe flip --model vit-small --precision fp32 --json > step.json

Whole optimizer steps, colour augmentation included, on crops of noise and captions of made-up lengths. Reading and
decoding pictures is not in these times: it goes on beside the steps, in as many processes as --workers of `aclip train`
says, and `data_wait` in a run's metrics.jsonl is the share of the time for which the steps had to wait for it.
"""


@dataclass(frozen=True)
class Speed:
    """What was found at one batch size.

    Attributes:
        batch_size: pairs in a step. seconds: median of a step; quartiles: first and third.
        pairs_per_second: what follows from the median. hours: for so many pairs and epochs, if they were given.
        peak_memory: bytes, of the device or, on a CPU, of the whole process.
    """

    batch_size: int
    seconds: float
    quartiles: tuple[float, float]
    pairs_per_second: float
    hours: float | None
    peak_memory: int


def register(actions: Any) -> None:
    """Add the action to `aclip bench`."""
    parser = actions.add_parser(
        "step", help="steps a second, hours, memory and the best batch size of training", epilog=EXAMPLES,
        description="Time training steps of a recipe at several batch sizes, in turns, and say what to expect.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--recipe", default="a-clip", help="see `aclip recipes` (default: %(default)s)")
    parser.add_argument("--model", default="vit-tiny", help="as for `aclip train` (default: %(default)s)")
    parser.add_argument("--image-size", type=int, metavar="PIXELS", help="side of the input (default: the model's own)")
    parser.add_argument("--batch-sizes", nargs="+", type=int, metavar="N", help="pairs in a step; those that are "
                        "estimated not to fit are left out (default: 16 64 256, on a GPU 64 256 1024)")
    parser.add_argument("--pairs", type=int, metavar="N", help="size of your dataset, to say how long a run takes")
    parser.add_argument("--epochs", type=float, default=25.0, help="of that run (default: 25)")
    parser.add_argument("--text-tokens", type=float, default=14.0, metavar="N",
                        help="mean length of the captions (default: %(default)s tokens)")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="timed steps of each (default: %(default)s)")
    parser.add_argument("--precision", choices=["fp32", "bf16", "fp16"], help="(default: as `aclip train` chooses)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: %(default)s)")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", dest="assignments",
                        help="change a field of the recipe, e.g. passes.masked.mask_ratio=0.75")
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON in place of a table")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Time, and print a table or JSON."""
    import json
    import sys

    from rich.console import Console

    from aclip.config import override
    from aclip.engine.run_config import RunConfig, choose_device, settled
    from aclip.errors import ConfigError, unknown_name
    from aclip.recipes import RECIPES

    device = choose_device(args.device)
    sizes = sorted(set(args.batch_sizes or BATCH_SIZES.get(device.type, BATCH_SIZES["cuda"])))
    if sizes[0] < 2:
        raise ConfigError("--batch-sizes takes numbers of 2 or more: a contrast needs another pair to differ from")
    for name in ("pairs", "rounds", "epochs"):
        value = getattr(args, name)
        if value is not None and not value > 0:
            raise ConfigError(f"--{name} must be positive, not {value:g}")
    if not args.text_tokens >= 3:
        raise ConfigError(f"--text-tokens counts SOT and EOT, too: at least 3, not {args.text_tokens:g}")
    if args.recipe not in RECIPES:
        raise ConfigError(unknown_name("recipe", args.recipe, RECIPES))
    recipe = override(RECIPES[args.recipe], args.assignments)
    config = settled(RunConfig(recipe, args.model, data="", output="", image_size=args.image_size,
                               batch_size=sizes[0], samples=sizes[0] * LENGTH, precision=args.precision),
                     sizes[0] * LENGTH, device)
    speeds = measure(config, sizes, device, args)
    if args.json:
        sys.stdout.write(json.dumps(summary_of(config, device, speeds), indent=2) + "\n")
    else:
        print_speeds(Console(highlight=False), config, device, speeds, args)


def measure(
    config: RunConfig, sizes: Sequence[int], device: torch.device, args: argparse.Namespace
) -> list[Speed]:
    """Time steps at every batch size that fits, in turns.

    What each size has shown in its first steps is told on standard error before a larger one is tried, which may be
    the end of the process; so is the first size that does not fit.
    Where scores serve for several epochs, a step is the mean of those that compute them and those that know them.
    """
    from dataclasses import replace
    from functools import partial

    import torch

    from aclip.cli.bars import counting_bar
    from aclip.cli.compose import build_trainer
    from aclip.engine.memory import available_memory, estimate, in_units, peak_memory, shortage
    from aclip.engine.timing import summary, time_in_turns
    from aclip.engine.trial import made_batch, with_known_scores
    from aclip.errors import OutOfMemoryError

    trainer = build_trainer(config, sizes[0] * LENGTH, device)
    if trainer.method.frequencies is not None:
        trainer.method.frequencies.fill_(1.0 / trainer.method.plan.shape.vocab_size)
    resolved = trainer.method.plan
    share = resolved.scoring_share
    free = available_memory(device)  # before any step, whose memory torch keeps
    steps, memory = {}, {}
    with counting_bar("steps") as bar:
        rounds = (WARMUP + args.rounds) * (1 if share == 1.0 else 2)
        task = bar.add_task("timing", total=len(sizes) * (WARMUP + rounds))
        timed = partial(time_in_turns, device=device, advance=lambda: bar.advance(task))
        for size in sizes:  # ascending, so that the highest mark of a process is that of the step just taken
            too_large = shortage(estimate(trainer.method, replace(config, batch_size=size), size), free)
            if too_large:
                bar.console.print(f"batch {size} and larger are left out: {too_large}", soft_wrap=True)
                break
            batch = made_batch(resolved, size, text_tokens=args.text_tokens).to(device)
            step = partial(_take, trainer, batch)
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            try:
                first = timed({str(size): step}, warmup=WARMUP - 1, rounds=1)[str(size)][-1]
            except OutOfMemoryError:
                bar.console.print(f"batch {size} and larger do not fit into the memory", soft_wrap=True)
                break
            steps[str(size)], memory[size] = step, peak_memory(device)
            bar.console.print(f"batch {size}: {1e3 * first:,.0f} ms in its first steps, {size / first:,.1f} pairs/s, "
                              f"peak memory {in_units(memory[size])}", soft_wrap=True)
            if share < 1.0:
                steps[f"{size}, scores known"] = partial(_take, trainer, with_known_scores(batch, resolved))
        times = timed(steps, warmup=WARMUP, rounds=args.rounds)
    speeds = []
    for size in memory:
        scoring = times[str(size)]
        knowing = times.get(f"{size}, scores known", scoring)
        found = summary([share * one + (1 - share) * other for one, other in zip(scoring, knowing, strict=True)])
        pairs = size / found["median"]
        hours = args.pairs * args.epochs / pairs / 3600 if args.pairs else None
        speeds.append(Speed(size, found["median"], (found["first_quartile"], found["third_quartile"]), pairs, hours,
                            memory[size]))
    return speeds


def _take(trainer: Trainer, batch: Any) -> None:
    """Take one optimizer step, always the run's first."""
    trainer.step = 0
    trainer.train_step(batch)


def summary_of(config: RunConfig, device: torch.device, speeds: Sequence[Speed]) -> dict[str, Any]:
    """Return the result as JSON values."""
    from aclip.cli.compose import versions

    best = max(speeds, key=lambda one: one.pairs_per_second, default=None)
    return {"recipe": config.recipe.name, "model": config.model, "precision": config.precision,
            "versions": versions(device), "speeds": [asdict(one) for one in speeds],
            "best_batch_size": best.batch_size if best else None}


def print_speeds(
    console: Any, config: RunConfig, device: torch.device, speeds: Sequence[Speed], args: argparse.Namespace
) -> None:
    """Print a table, and the batch size that trains the most pairs a second."""
    from rich.table import Table

    from aclip.cli.compose import versions

    table = Table(box=None, pad_edge=False)
    columns = ("batch", "a step, ms", "quartiles", "steps/s", "pairs/s", "peak memory")
    for title in (*columns, *(["hours"] if args.pairs else [])):
        table.add_column(title, justify="right", no_wrap=True)
    for one in speeds:
        low, high = one.quartiles
        cells = [str(one.batch_size), f"{1e3 * one.seconds:,.0f}", f"{1e3 * low:,.0f} to {1e3 * high:,.0f}",
                 f"{1 / one.seconds:.2f}", f"{one.pairs_per_second:,.1f}", f"{one.peak_memory / 2**30:.2f} GiB"]
        table.add_row(*cells, *([f"{one.hours:,.1f}"] if one.hours is not None else []))
    console.print(table)
    about = versions(device)
    console.print(f"{config.recipe.name} on {config.model}, {config.precision} on {about['device']}, captions of "
                  f"{args.text_tokens:g} tokens in the mean; median of {args.rounds} steps"
                  + (f"; hours for {args.pairs:,} pairs x {args.epochs:g} epochs, if reading keeps up"
                     if args.pairs else ""), markup=False, soft_wrap=True)
    if speeds:
        best = max(speeds, key=lambda one: one.pairs_per_second)
        console.print(f"most pairs a second: batch {best.batch_size}. The batch size is also part of the method: a "
                      "larger one contrasts each pair with more others.", soft_wrap=True)
