"""`aclip train --overfit-one-batch`: can this model learn one batch? Tells a bug or a learning rate from the data."""

import math
import time
from dataclasses import replace

from rich.console import Console

from aclip import data, models
from aclip.cli.compose import build_trainer, open_batches, open_dataset, open_training
from aclip.engine.run_config import RunConfig, choose_device, settled
from aclip.objectives.functional import chance_loss

STEPS = 100
FELL_CONTRASTIVE, FELL = 0.5, 0.9
"""The share of where it began that a loss must come below to have fallen: the contrastive part where there is one, for
it can reach zero on one batch, else the whole, whose floor is not known."""
LINES = 10


def overfit(config: RunConfig, steps: int) -> bool:
    """Train on a run's first batch alone, say what became of the loss, and return whether it fell.

    The same pictures, crops, masks and captions in every step, at the run's peak learning rate after its warm-up in a
    tenth of the steps. Writes nothing.

    Raises:
        ConfigError, DataError: as a run with this configuration would.
    """
    console = Console(highlight=False, soft_wrap=True)
    device = choose_device(config.device)
    source = open_training(config.data)
    config = settled(config, len(source), device)
    assert config.batch_size is not None
    # a schedule so long that the learning rate stays at its peak
    config = replace(config, samples=config.batch_size * steps * 10, unmasked_tuning=0.0, unmasked_lr=1.0,
                     resolution_schedule=())
    trainer = build_trainer(config, len(source), device)
    trainer.timetable = replace(trainer.timetable, warmup_steps=math.ceil(steps / 10))
    dataset = open_dataset(trainer, source, data.CaptionTokenizer(models.tokenizer_of(config.model)))
    if trainer.method.frequencies is not None:
        trainer.method.frequencies.fill_(1.0 / len(trainer.method.frequencies))
    batch = next(iter(open_batches(trainer, dataset, 1, workers=0))).to(device)
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
    console.print(sentence, markup=False)
    return fell


def verdict(losses: list[float], chance: float | None) -> tuple[str, bool]:
    """Return in words what losses on one batch tell, and whether they fell.

    Args:
        losses: step by step.
        chance: what guessing gives if they are the contrastive part, else None.
    """
    first, last = losses[0], losses[-1]
    what = "loss" if chance is None else "contrastive loss"
    if not math.isfinite(last):
        return (f"the loss is no number any more after {len(losses)} steps on one batch: the learning rate is too "
                "high (try a tenth of it), or there is a bug in the model", False)
    guess = f" (guessing gives {chance:.2f})" if chance is not None else ""
    if last < (FELL if chance is None else FELL_CONTRASTIVE) * first:
        return (f"the {what} fell from {first:.3f} to {last:.3f} on one batch{guess}: model, loss and learning rate "
                "work. If a run stays at chance all the same, look at the data: do pictures and captions belong "
                "together, do they differ from each other? Then at the length of the warm-up and the batch size", True)
    return (f"the {what} went from {first:.3f} to {last:.3f} on one batch{guess}: the model does not learn what it "
            "could learn by heart. The data are not to blame: try --lr ten times lower and ten times higher, then more "
            "steps; if none helps, something between pixels and loss is broken", False)
