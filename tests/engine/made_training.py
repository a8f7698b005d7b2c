"""A very small training, for tests of what happens around its steps."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import over_ranks
from aclip import dist
from aclip.engine.loop import fit, resume
from aclip.engine.run_config import RunConfig, Timetable
from aclip.engine.trainer import Trainer
from aclip.run_folder import RunFolder
from aclip.structs import Batch

ROWS = 8


def build(recipe: str = "a-clip", **changes: Any) -> Trainer:
    """Return a trainer of twelve steps that saves every second, evaluates at the end alone and logs all."""
    config = RunConfig(recipe=over_ranks.recipe_of(recipe), model="vit-nano", data="made", output="made", log_every=1,
                       batch_size=ROWS, precision="fp32", keep_checkpoints=3)
    table = {"total_steps": 12, "save_every": 2, "steps_per_epoch": 12, "masked_steps": 12}
    table |= {key: changes.pop(key) for key in table if key in changes}
    method = over_ranks.build(recipe)
    timetable = Timetable(warmup_steps=1, evaluate_every=0, **table)
    return Trainer(replace(config, **changes), method, timetable, torch.device("cpu"))


def poisoned(batch: Batch) -> Batch:
    """Return a batch whose pictures are no numbers once they are augmented."""
    return replace(batch, views={
        name: view if view.augmentation is None else replace(view, augmentation=view.augmentation * float("nan"))
        for name, view in batch.views.items()})


def batches(trainer: Trainer, is_bad: Callable[[int, int], bool] = lambda number, rank: False,
            before: Callable[[int], object] = lambda number: None) -> Callable[[], Iterator[Batch]]:
    """Return what opens this rank's share of batches number 1, 2, ...; `before` is called before each is used."""

    def opened() -> Iterator[Batch]:
        share = ROWS // dist.world_size()
        own = slice(dist.rank() * share, (dist.rank() + 1) * share)
        ahead = trainer.skipped_batches
        for number in range(trainer.step + ahead + 1, trainer.timetable.total_steps + ahead + 1):
            batch = over_ranks.a_batch(trainer.method, ROWS, seed=number)
            batch = replace(batch, keys=tuple(f"{number}/{row}" for row in range(ROWS))).rows(own)
            before(number)
            yield poisoned(batch) if is_bad(number, dist.rank()) else batch

    return opened


def train(folder: Path, trainer: Trainer | None = None, is_bad: Callable[[int, int], bool] = lambda n, r: False,
          before: Callable[[int], object] = lambda number: None,
          evaluate: Callable[[int], None] = lambda step: None) -> Trainer:
    """Train in a folder, from its newest checkpoint if there is one."""
    trainer = trainer or build()
    run = RunFolder(folder)
    if dist.rank() == 0:
        folder.mkdir(exist_ok=True)
    dist.wait_for_all()
    resume(trainer, run)
    fit(trainer, batches(trainer, is_bad, before), run, (), evaluate)
    return trainer


def numbers(folder: Path, journal: str = "metrics") -> list[dict[str, Any]]:
    """Return a journal without what depends on the clock."""
    return [{key: value for key, value in record.items() if key not in ("samples_per_second", "data_wait")}
            for record in RunFolder(folder).records(journal)]
