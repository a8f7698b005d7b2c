"""Can this model learn one batch? Tells a bug or a learning rate from the data."""

import math
import time
from dataclasses import replace

from rich.console import Console

from aclip import data
from aclip.config import RunConfig
from aclip.devices import choose_device
from aclip.errors import ConfigError, TrainingError
from aclip.objectives.functional import chance_loss
from aclip.search.clusters import cluster_samples
from aclip.trainer import build_trainer, open_batches, open_stored, resolve_defaults

MAX_CONTRASTIVE, MAX_LOSS = 0.5, 0.9
"""The fraction of its first value below which a loss has fallen: the contrastive part, if there is one, since it can
reach zero on one batch; else the whole, whose floor is not known."""
LINES = 10


def overfit_one_batch(config: RunConfig, steps: int = 100) -> list[float]:
    """Train on a run's first batch alone, write nothing, and say whether the loss fell; return the losses.

    The same images, crops, masks and captions in every step, at the run's peak learning rate after a warm-up of a tenth
    of the steps.

    Raises:
        TrainingError: it did not fall.
        ConfigError, DataError: as a run with this configuration would.
    """
    if steps < 1:
        raise ConfigError(f"--overfit-one-batch takes at least one step, not {steps}")
    console = Console(highlight=False, soft_wrap=True)
    device = choose_device(config.device)
    source = data.open_training(config.data)
    config = resolve_defaults(config, len(source), device)
    assert config.batch_size is not None
    # a schedule so long that the learning rate stays at its peak
    warmup = math.ceil(steps / 10) / (len(source) // config.batch_size or 1)
    recipe = replace(config.recipe, optimization=replace(config.recipe.optimization, warmup_epochs=warmup))
    trainer = build_trainer(
        replace(config, recipe=recipe, samples=config.batch_size * steps * 10, unmasked_tuning=0.0, unmasked_lr=1.0,
                resolution_schedule=()), len(source), device, open_stored(config, source))
    clusters = cluster_samples(config.hard_negatives, source, config.seed) if config.hard_negatives else None
    batch = next(iter(open_batches(trainer, source, workers=0, clusters=clusters))).to(device)
    console.print(f"{config.recipe.name} on {config.model}: {steps} steps on the first batch, {batch.size} pairs, "
                  f"lr {config.recipe.optimization.lr:g}", markup=False)
    losses: list[float] = []
    begun = time.monotonic()
    for step in range(1, steps + 1):
        output = trainer.train_step(batch)
        losses.append(output.parts.get("contrastive", output.loss).item())
        if step == 1 or step % max(1, steps // LINES) == 0:
            parts = ", ".join(f"{name} {part.item():.2f}" for name, part in output.parts.items())
            console.print(f"step {step}/{steps} loss {output.loss.item():.3f} ({parts}), "
                          f"{time.monotonic() - begun:.0f} s", markup=False)
    sentence, fell = verdict(losses, chance_loss(batch.caption_ids).item() if "contrastive" in output.parts else None)
    if not fell:
        raise TrainingError(sentence)
    console.print(sentence, markup=False)
    return losses


def verdict(losses: list[float], chance: float | None) -> tuple[str, bool]:
    """Return what the losses on one batch mean, and whether they fell.

    Args:
        losses: step by step.
        chance: the loss at chance level if they are the contrastive part, else None.
    """
    first, last = losses[0], losses[-1]
    what = "loss" if chance is None else "contrastive loss"
    if not math.isfinite(last):
        return (f"the loss became NaN or inf within {len(losses)} steps on one batch: the learning rate is too high "
                "(try a tenth of it), or there is a bug in the model", False)
    level = f" (chance is {chance:.2f})" if chance is not None else ""
    if last < (MAX_LOSS if chance is None else MAX_CONTRASTIVE) * first:
        return (f"the {what} fell from {first:.3f} to {last:.3f} on one batch{level}: model, loss and learning rate "
                "work; if a run stays at chance nevertheless, look at the data (aclip data look): do images and "
                "captions belong together, do they differ from each other? Then at warm-up and batch size", True)
    return (f"the {what} went from {first:.3f} to {last:.3f} on one batch{level}: the model does not even memorise it, "
            "so the data is not to blame: try --lr ten times lower and ten times higher, then more steps; if neither "
            "helps, something between pixels and loss is broken", False)
