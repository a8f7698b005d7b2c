"""A very small training, for tests of what surrounds its steps."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import over_ranks
from aclip import dist
from aclip.config import RunConfig
from aclip.method import Method
from aclip.run_folder import RunFolder
from aclip.structs import Batch
from aclip.trainer import Trainer, fit
from aclip.training.journal import TrainingProgress
from aclip.training.schedule import Timetable

ROWS = 8


def build(recipe: str = "a-clip", method: Method | None = None, **changes: Any) -> Trainer:
    """Return a trainer of twelve steps that saves every second, evaluates only at the end and logs all."""
    table = {"total_steps": 12, "save_every": 2, "steps_per_epoch": 12, "masked_steps": 12, "evaluate_every": 0,
             "resolutions": ()}
    table |= {key: changes.pop(key) for key in table if key in changes}
    settings = {"recipe": over_ranks.recipe_of(recipe), "model": "vit-nano", "data": "synthetic", "output": "none",
                "log_every": 1, "batch_size": ROWS, "precision": "fp32", "keep_checkpoints": 3}
    config = RunConfig(**(settings | changes))
    return Trainer(config, method or over_ranks.build(recipe), Timetable(warmup_steps=1, **table), torch.device("cpu"))


def poisoned(batch: Batch) -> Batch:
    """Return a batch whose images become NaN once they are augmented."""
    return replace(batch, views={
        name: view if view.augmentation is None else replace(view, augmentation=view.augmentation * float("nan"))
        for name, view in batch.views.items()})


def batches(trainer: Trainer, is_bad: Callable[[int, int], bool] = lambda number, rank: False,
            before: Callable[[int], object] = lambda number: None) -> Iterator[Batch]:
    """Yield this rank's share of the batches of the steps to come; `before` is called before each is used."""
    share = ROWS // dist.world_size()
    own = slice(dist.rank() * share, (dist.rank() + 1) * share)
    for number in range(trainer.step + 1, trainer.timetable.total_steps + 1):
        batch = over_ranks.a_batch(trainer.method, ROWS, seed=number)
        batch = replace(batch, keys=tuple(f"{number}/{row}" for row in range(ROWS))).rows(own)
        before(number)
        yield poisoned(batch) if is_bad(number, dist.rank()) else batch


def train(folder: Path, trainer: Trainer | None = None, is_bad: Callable[[int, int], bool] = lambda n, r: False,
          before: Callable[[int], object] = lambda number: None,
          evaluate: Callable[[int], float | None] = lambda step: None) -> Trainer:
    """Train in a folder, from its newest checkpoint if there is one."""
    trainer = trainer or build()
    run = RunFolder(folder)
    if dist.rank() == 0:
        folder.mkdir(exist_ok=True)
    dist.barrier()
    trainer.resume(run)
    with TrainingProgress(Console(quiet=True), trainer.timetable.total_steps, trainer.step) as progress:
        fit(trainer, batches(trainer, is_bad, before), run, progress, evaluate)
    return trainer


def numbers(folder: Path, journal: str = "metrics") -> list[dict[str, Any]]:
    """Return a journal without what depends on the clock."""
    return [{key: value for key, value in record.items() if key not in ("samples_per_second", "data_wait")}
            for record in RunFolder(folder).records(journal)]
