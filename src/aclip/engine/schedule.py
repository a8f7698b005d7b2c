"""Values that change with the optimizer step; `step` counts the steps already taken, from 0."""

import math


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
