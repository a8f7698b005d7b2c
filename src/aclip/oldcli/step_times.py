"""The step times of a comparison: every recipe's trainer in one process, their steps taken in turns."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress

from aclip import data, models
from aclip.cli.compose import build_trainer, open_batches, open_dataset, open_training
from aclip.cli.compose_evaluation import COLUMNS
from aclip.cli.contenders import BASELINE, Stage, contender_from
from aclip.engine.comparison import ComparisonFolder
from aclip.engine.run_config import choose_device
from aclip.engine.timing import summary, time_in_turns
from aclip.engine.trainer import Trainer
from aclip.engine.trial import with_known_scores
from aclip.structs import Batch

WARMUP_ROUNDS = 3
BATCHES = 4  # different ones of each recipe, read before anything is timed
LENGTH = 1000  # steps of the schedule that the timed ones are the first of


def write_step_times(path: Path, rounds: int) -> None:
    """Time the steps of the recipes that `comparison.json` names, and write `timing.json` beside it.

    The trainers of all recipes are built in this one process, with the same model, batch size and data, and take
    their steps in turns, the baseline too: A B C, A B C, ... What is timed is the optimizer step alone, with batches
    that are read already.

    Args:
        path: the comparison's folder.
        rounds: how many timed steps each takes.

    Raises:
        ConfigError: no comparison there.
    """
    folder = ComparisonFolder(path)
    asked = folder.read_json("comparison.json")
    source = open_training(asked["data"])
    device = choose_device(asked["device"])
    contenders = {name: contender_from(words, len(source), device) for name, words in asked["arguments"].items()}
    steps: dict[str, Callable[[], object]] = {}
    for name, one in contenders.items():
        trainer = build_trainer(replace(one.config, samples=asked["batch_size"] * LENGTH), len(source), device)
        batches = read_batches(trainer, source)
        with_scores = [with_known_scores(batch, one.plan) for batch in batches]
        steps |= {label: taking_steps(trainer, stage, itertools.cycle(with_scores if known else batches))
                  for stage in one.stages for label, _, known in stage.kinds(name)}
    console = Console()
    with Progress(*COLUMNS, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("timing", total=len(steps) * (WARMUP_ROUNDS + rounds))
        times = time_in_turns(steps, warmup=WARMUP_ROUNDS, rounds=rounds, device=device,
                              advance=lambda: progress.advance(task))
    measured = {label: summary(seconds) for label, seconds in times.items()}
    stages = {name: [{"share": stage.share, "seconds": sum(
        share * measured[label]["median"] for label, share, _ in stage.kinds(name))} for stage in one.stages]
        for name, one in contenders.items()}
    average = {name: sum(stage["share"] * stage["seconds"] for stage in stages[name]) for name in contenders}
    folder.write_json("timing.json", {
        "arguments": asked["arguments"], "threads": torch.get_num_threads(), "device": str(device),
        "batch_size": asked["batch_size"], "warmup_rounds": WARMUP_ROUNDS, "rounds": rounds,
        "steps": measured, "stages": stages, "step_seconds": average,
        "relative": {name: value / average[BASELINE] for name, value in average.items()}})
    console.print(f"timing: {folder.path / 'timing.json'}", markup=False, highlight=False, soft_wrap=True)


def read_batches(trainer: Trainer, source: data.Source) -> list[Batch]:
    """Return the first few batches of a run, on its device."""
    tokenizer = data.CaptionTokenizer(models.tokenizer_of(trainer.config.model))
    dataset = open_dataset(trainer, source, tokenizer)
    batches = open_batches(trainer, dataset, BATCHES, workers=0)
    return [batch.to(trainer.device) for batch in batches]


def taking_steps(trainer: Trainer, stage: Stage, batches: Iterator[Batch]) -> Callable[[], object]:
    """Return what takes one optimizer step on the next batch, as in this stage of the run."""
    timetable = replace(trainer.timetable, masked_steps=trainer.timetable.total_steps if stage.masked else 0,
                        resolutions=((trainer.timetable.total_steps, stage.resolution),))

    def step() -> None:
        trainer.timetable = timetable
        trainer.train_step(next(batches))

    return step
