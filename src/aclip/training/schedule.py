"""Everything that changes with the optimizer step; `step` counts the steps already taken, from 0."""

import math
from dataclasses import dataclass
from itertools import accumulate

from aclip.config import RunConfig
from aclip.errors import ConfigError

SHORTEST_EPOCH = 10
"""Steps between evaluations, and checkpoints, on so little data that an epoch has fewer."""


def warmup_cosine(
    step: int, total: int, base: float, warmup_steps: int, warmup_start: float, end: float
) -> float:
    """Return the learning rate of a linear warm-up followed by a cosine.

    The first `warmup_steps` values go from `warmup_start` to `base`, both included; then
        end + (base - end) (1 + cos(pi i / n)) / 2,   i = step - warmup_steps, n = total - warmup_steps,
    which starts at `base` again and would reach `end` one step after the last.
    """
    if step < warmup_steps:
        share = step / (warmup_steps - 1) if warmup_steps > 1 else 1.0
        return warmup_start + (base - warmup_start) * share
    progress = (step - warmup_steps) / max(1, total - warmup_steps)
    return end + (base - end) * (1.0 + math.cos(math.pi * min(1.0, progress))) / 2.0


def momentum_cosine(step: int, total: int, start: float, end: float, warmup: float = 0.0) -> float:
    """Return the EMA momentum: end - (end - start) (1 + cos(pi step / total)) / 2.

    With `warmup` w > 0 it is (1 + step) / (w + step) until that reaches `start`.
    """
    rising = (1 + step) / (warmup + step) if warmup > 0 else 1.0
    if rising < start:
        return rising
    return end - (end - start) * (1.0 + math.cos(math.pi * min(1.0, step / total))) / 2.0


@dataclass(frozen=True)
class Timetable:
    """A run's length in optimizer steps.

    Attributes:
        steps_per_epoch: whole batches per pass over the data.
        total_steps: optimizer steps of the run.
        warmup_steps: steps of linear warm-up, at most a tenth of the run.
        masked_steps: steps before unmasked tuning begins. unmasked_lr: factor on the learning rate after them.
        evaluate_every, save_every: in steps; 0 means only at the end.
        resolutions: (step, resolution): before this step images have this side, relative to the recipe's own.
    """

    steps_per_epoch: int
    total_steps: int
    warmup_steps: int
    masked_steps: int
    evaluate_every: int
    save_every: int
    unmasked_lr: float = 1.0
    resolutions: tuple[tuple[int, float], ...] = ()

    def masked(self, step: int) -> bool:
        """Return whether the recipe masks in this step."""
        return step < self.masked_steps

    def resolution(self, step: int) -> float:
        """Return the image side in this step, relative to the recipe's own."""
        return next((size for until, size in self.resolutions if step < until), 1.0)

    def evaluates(self, step: int) -> bool:
        """Return whether an evaluation follows after `step` steps."""
        return step == self.total_steps or (self.evaluate_every > 0 and step % self.evaluate_every == 0)

    def saves(self, step: int) -> bool:
        """Return whether a checkpoint is due after `step` steps."""
        return step == self.total_steps or (self.save_every > 0 and step % self.save_every == 0)

    @classmethod
    def of(cls, config: RunConfig, num_pairs: int) -> "Timetable":
        """Return the timetable of a run over `num_pairs` pairs, whose batch size is set.

        Raises:
            ConfigError: fewer pairs than one batch, or a run shorter than one step.
        """
        assert config.batch_size is not None
        per_epoch = num_pairs // config.batch_size
        if per_epoch == 0:
            raise ConfigError(f"the data has {num_pairs} pairs, fewer than one batch of {config.batch_size}: "
                              f"use --batch-size {max(2, num_pairs)} or less")
        if config.samples is not None:
            total = config.samples // config.batch_size
        else:
            total = round(config.epochs * per_epoch)
        if total < 1:
            raise ConfigError("the run is shorter than one optimizer step: raise --epochs or --samples")
        phases = config.resolution_schedule
        return cls(
            steps_per_epoch=per_epoch,
            total_steps=total,
            warmup_steps=min(round(config.recipe.optimization.warmup_epochs * per_epoch), math.ceil(total / 10)),
            masked_steps=total - round(config.unmasked_tuning * total),
            evaluate_every=_steps(config.evaluate_every, per_epoch),
            save_every=_steps(config.save_every, per_epoch),
            unmasked_lr=config.unmasked_lr,
            resolutions=tuple((round(until * total), phase.resolution) for until, phase in zip(
                accumulate(phase.share for phase in phases), phases, strict=True)),
        )


def _steps(epochs: float, per_epoch: int) -> int:
    return max(1, round(epochs * max(per_epoch, SHORTEST_EPOCH))) if epochs > 0 else 0
