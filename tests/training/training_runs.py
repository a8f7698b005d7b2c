"""Trainings over ranks, and on one process, on the same synthetic batches: losses and weights."""

from contextlib import nullcontext
from pathlib import Path

import torch
from synthetic_training import batches, build
from torch import Tensor

import over_ranks
from aclip import dist
from aclip.training.distributed import whole

Case = tuple[str, str, str]
"""Recipe, way, optimizer."""
STEPS = {"sgd": 10, "adamw": 50}
SGD_LR = 0.01


class PlainSGD(torch.optim.SGD):
    """SGD without `found_inf`, which only torch's fused optimizers understand."""

    found_inf = property(lambda self: None, lambda self, value: None)


def train(recipe: str, way: str, optimizer: str) -> dict[str, Tensor]:
    """Return the losses of some steps ("losses") and the weights after them, whole.

    Ten steps of plain SGD, whose change is that of the gradients, in float64, where rounding moves no patch over the
    edge of what is kept; or fifty of AdamW at the recipe's own rate.
    """
    parallel, _, micro_batch = way.partition(" in ")
    method = over_ranks.build(recipe)
    with over_ranks.in_double(method) if optimizer == "sgd" else nullcontext():
        trainer = build(recipe, method, total_steps=STEPS[optimizer], parallel=parallel,
                        micro_batch=int(micro_batch) if micro_batch else None)
        if optimizer == "sgd":
            groups = [{"params": g["params"], "lr_factor": 1.0} for g in trainer.optimizer.param_groups]
            trainer.optimizer = PlainSGD(groups, lr=SGD_LR)  # type: ignore[assignment]
            trainer.learning_rate = lambda: SGD_LR  # type: ignore[method-assign]
        losses = [trainer.train_step(batch).loss.detach() for batch in batches(trainer)]
        mean = dist.sum_over_ranks(torch.stack(losses)) / dist.world_size()
        return {"losses": mean, **{name: whole(p.detach()) for name, p in trainer.method.named_parameters()}}


def largest_errors(folder: Path, cases: list[Case]) -> dict[Case, tuple[float, float]]:
    """Return the largest difference from one process's losses and weights, which lie in the folder."""
    found = {}
    for recipe, way, optimizer in cases:
        ours, alone = train(recipe, way, optimizer), torch.load(folder / f"{recipe}-{optimizer}.pt", weights_only=True)
        assert ours.keys() == alone.keys()
        errors = {key: float((value - alone[key]).abs().max()) for key, value in ours.items()}
        found[recipe, way, optimizer] = errors.pop("losses"), max(errors.values())
    return found


def train_alone(folder: Path, cases: list[Case]) -> None:
    """Leave in the folder what one process finds."""
    for recipe, optimizer in {(recipe, optimizer) for recipe, _, optimizer in cases}:
        torch.save(train(recipe, "ddp", optimizer), folder / f"{recipe}-{optimizer}.pt")
