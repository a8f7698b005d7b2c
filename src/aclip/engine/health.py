"""Watching a run's numbers: steps that are not finite, sudden losses, losses at the level of chance.

Whether a step is taken is decided on the device, by all ranks alike; the host learns of it a step later on CUDA, and so
never waits for the device, and at once elsewhere.
"""

import logging
import math
import statistics
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from aclip import dist

SPIKE_FACTOR, SPIKE_NATS, SPIKE_WINDOW = 2.0, 0.5, 100
CHANCE_STEPS, CHANCE_SHARE, CHANCE_RECORDS = 300, 0.97, 5
MOST_ROLLBACKS = 2

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Reading:
    """What the host learns of a step.

    Attributes:
        step: optimizer steps done with it.
        finite: whether loss and gradients were, on all ranks; if not, nothing has changed in it but the step count.
        loss: mean over ranks. grad_norm: before clipping.
        own_loss: whether this rank's loss was finite.
        keys: of this rank's samples.
    """

    step: int
    finite: bool
    loss: float
    grad_norm: float
    own_loss: bool
    keys: tuple[str, ...]


class Guard:
    """Keeps steps with a loss or gradient that is not finite from changing anything.

    The optimizer leaves weights and moments as they are where its `found_inf` says so (torch's fused optimizers),
    averages of weights where `Ema.update` is told so, and buffers, which forward passes write, are put back: running
    statistics, counts of captions.

    Args:
        module: whose buffers these are, all of them, for they are few and small.
    """

    def __init__(self, module: nn.Module) -> None:
        self._buffers = list(module.buffers())
        self._before: list[Tensor] = []
        self._readings: deque[tuple[int, tuple[str, ...], Tensor, Any]] = deque()

    def begin(self) -> None:
        """Before the forward pass: keep the buffers."""
        self._before = [b.clone() for b in self._buffers]

    @torch.no_grad()
    def judge(self, loss: Float[Tensor, ""], norm: Float[Tensor, ""]) -> tuple[Float[Tensor, ""], Tensor]:
        """After the backward pass: return 1 if the step must not be taken, 0 if it may, and what `note` wants.

        Args:
            loss: this rank's.
            norm: of the gradient averaged over ranks.
        """
        own = torch.isfinite(loss)
        bad = ~(own & torch.isfinite(norm))
        summed = dist.sum_over_ranks(torch.stack([bad.float(), loss.detach().float()]))
        found = (summed[0] > 0).float()
        if self._buffers:
            torch._foreach_copy_(self._buffers, [
                torch.where(found > 0, before, now)
                for before, now in zip(self._before, self._buffers, strict=True)])
        return found, torch.stack([found, summed[1] / dist.world_size(), norm.detach().float(), own.float()])

    def note(self, step: int, keys: tuple[str, ...], measured: Tensor) -> None:
        """Send what was measured of a step on its way to the host."""
        arrived = None
        if measured.is_cuda:
            host = torch.empty(measured.shape, dtype=measured.dtype, pin_memory=True)
            host.copy_(measured, non_blocking=True)
            measured, arrived = host, torch.cuda.Event()
            arrived.record()
        self._readings.append((step, keys, measured, arrived))

    def readings(self, *, all_of_them: bool) -> list[Reading]:
        """Return what has arrived since the last call: all but the latest on CUDA, unless that is asked for too."""
        found = []
        while self._readings:
            step, keys, measured, arrived = self._readings[0]
            if arrived is not None:
                if len(self._readings) == 1 and not all_of_them:
                    break
                arrived.synchronize()
            self._readings.popleft()
            bad, loss, norm, own = measured.tolist()
            found.append(Reading(step, not bad, loss, norm, bool(own), keys))
        return found


class Spikes:
    """Notices a loss far above what it has been: more than `SPIKE_FACTOR` times the median of the last `SPIKE_WINDOW`
    steps, and at least `SPIKE_NATS` above it."""

    def __init__(self) -> None:
        self._losses: deque[float] = deque(maxlen=SPIKE_WINDOW)
        self._quiet = 0

    def median_before(self, loss: float) -> float | None:
        """Take a finite loss; return the median before it if it is a spike, the first of its kind in a window."""
        spike = None
        if len(self._losses) >= SPIKE_WINDOW // 5 and self._quiet == 0:
            median = statistics.median(self._losses)
            if loss > max(SPIKE_FACTOR * median, median + SPIKE_NATS):
                spike, self._quiet = median, SPIKE_WINDOW
        self._quiet = max(self._quiet - 1, 0)
        self._losses.append(loss)
        return spike


class ChanceLevel:
    """Notices a contrastive loss that sits where guessing does (`functional.chance_loss`): `CHANCE_RECORDS` records in
    a row above `CHANCE_SHARE` of that, after `CHANCE_STEPS` steps and the warm-up; says so once."""

    def __init__(self, warmup_steps: int) -> None:
        self._after = max(CHANCE_STEPS, warmup_steps)
        self._in_a_row = 0

    def warning(self, record: Mapping[str, Any]) -> str:
        """Take a line of metrics.jsonl; return what to say, or nothing."""
        loss, chance = record.get("parts", {}).get("contrastive"), record.get("chance_loss")
        if loss is None or chance is None or record["step"] < self._after:
            return ""
        self._in_a_row = self._in_a_row + 1 if loss > CHANCE_SHARE * chance else 0
        if self._in_a_row != CHANCE_RECORDS:
            return ""
        return (f"after {record['step']} steps the contrastive loss is {loss:.2f}, and guessing gives "
                f"{chance:.2f}: nothing is being learned. Look first whether the model can learn one batch, with "
                "aclip train --overfit-one-batch and the same options. If it can, look at the data: do pictures and "
                "captions belong together? If it cannot, try a lower --lr, a longer warm-up, or a larger batch")


class Watch:
    """What a run makes of its readings; every rank comes to the same.

    Args:
        most_skipped: steps in a row that may be skipped.
        scaler: in fp16, gradients that are infinite under a finite loss are no incident while it can scale them down.

        skipped: steps that were skipped before.

    Attributes:
        skipped: steps so far. in_a_row: up to the latest; those that the scaler will mend do not count.
        taken: whether the latest step was.
    """

    def __init__(self, most_skipped: int, scaler: torch.amp.GradScaler, skipped: int = 0) -> None:
        self._most, self._scaler = most_skipped, scaler
        self._spikes = Spikes()
        self.skipped = skipped
        self.in_a_row = 0
        self.taken = True

    def incidents(self, readings: Iterable[Reading]) -> list[dict[str, Any]]:
        """Take readings; return what is worth a line of the journal, with the keys of all ranks' samples."""
        found = []
        for reading in readings:
            self.taken = reading.finite
            if not reading.finite:
                self.skipped += 1
                if math.isfinite(reading.loss) and self._scaler.is_enabled() and self._scaler.get_scale() > 1.0:
                    continue
                self.in_a_row += 1
                found.append(_incident("non_finite", reading, skipped_in_a_row=self.in_a_row))
                continue
            self.in_a_row = 0
            median = self._spikes.median_before(reading.loss)
            if median is not None:
                found.append(_incident("loss_spike", reading, median=median))
        return found

    def too_many(self, *, last: bool) -> bool:
        """Return whether skipping has not helped; at a run's `last` step two are too many."""
        return self.in_a_row > (min(1, self._most) if last else self._most)


def _incident(kind: str, reading: Reading, **more: Any) -> dict[str, Any]:
    """Return a line of the journal; what is no number is written as text, for JSON has no name for it."""
    ranks = dist.collect((reading.own_loss, reading.keys))
    return {
        "step": reading.step, "kind": kind,
        **{name: value if math.isfinite(value) else str(value)
           for name, value in (("loss", reading.loss), ("grad_norm", reading.grad_norm))},
        **more,
        "ranks": [rank for rank, (own_loss, _) in enumerate(ranks) if not own_loss],
        "keys": [list(keys) for _, keys in ranks],
    }


def say(incidents: Sequence[Mapping[str, Any]], journal: str) -> None:
    """Warn of incidents, in words."""
    for incident in incidents:
        if incident["kind"] == "loss_spike":
            _log.warning("the loss jumped to %.3g at step %d from a median of %.3g: if it does not come back, a lower "
                         "--lr may help; the batch is in %s", incident["loss"], incident["step"], incident["median"],
                         journal)
        else:
            _log.warning("step %d was skipped, its loss (%s) or gradient (norm %s) is not finite; the batch is in %s",
                         incident["step"], incident["loss"], incident["grad_norm"], journal)
