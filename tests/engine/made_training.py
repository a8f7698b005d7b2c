"""A very small training, for tests of what happens around its steps."""

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as torch_dist
from torch import multiprocessing

from aclip import dist, plan, towers
from aclip.engine.loop import fit, resume
from aclip.engine.run_config import RunConfig, Timetable
from aclip.engine.run_folder import RunFolder
from aclip.engine.trainer import Trainer
from aclip.method import Method
from aclip.recipes import RECIPES
from aclip.structs import Batch
from test_recipes import small
from tests_support import random_batch

ROWS = 8


def build(recipe: str = "a-clip", **changes: Any) -> Trainer:
    """Return a trainer of twelve steps that saves every second, evaluates at the end alone and logs all."""
    config = RunConfig(recipe=small(RECIPES[recipe]), model="vit-micro", data="made", output="made", log_every=1,
                       batch_size=ROWS, precision="fp32", keep_checkpoints=3)
    table = {"total_steps": 12, "save_every": 2} | {key: changes.pop(key) for key in ("total_steps", "save_every")
                                                    if key in changes}
    torch.manual_seed(0)
    resolved = plan.resolve(config.recipe, towers.shape_of(towers.model_config("vit-micro")))
    method = Method(towers.create_model("vit-micro", with_text=resolved.uses_text), resolved, (0.5,) * 3, (0.25,) * 3)
    timetable = Timetable(steps_per_epoch=12, warmup_steps=1, masked_steps=12, evaluate_every=0, **table)
    return Trainer(replace(config, **changes), method.train(), timetable, torch.device("cpu"))


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
            batch = random_batch(trainer.method.plan, ROWS, seed=number)
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


def over_ranks(work: Callable[..., None], folder: Path, ranks: int = 2) -> None:
    """Run `work(folder)` on several ranks, until all of them are done."""
    (folder / "meet").unlink(missing_ok=True)
    multiprocessing.spawn(_one_rank, args=(work, folder, ranks), nprocs=ranks)


def _one_rank(rank: int, work: Callable[..., None], folder: Path, ranks: int) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1"}
    torch_dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=ranks)
    try:
        work(folder)
    finally:
        torch_dist.destroy_process_group()
