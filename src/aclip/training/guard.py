"""What can go wrong in a step, and what ends a run early: NaN, a loss at chance, too little memory, requests to stop.

Non-finite steps are skipped on all ranks together: whether a step is taken is decided on the device, on all ranks
alike; the host learns of it one step later on CUDA, and so never waits for the device, and at once elsewhere.
"""

import logging
import math
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from aclip import dist
from aclip.config import RunConfig
from aclip.devices import in_units, peak_memory
from aclip.errors import OutOfMemoryError

REPEAT_SECONDS = 30.0
"""torchrun passes on the signals it gets, so that a process may hear of one request several times within this time."""

CHANCE_STEPS, CHANCE_FRACTION, CHANCE_RECORDS = 300, 0.97, 5
SHORTEST_RUN = 20  # steps; shorter ones are trials of the command

_log = logging.getLogger(__name__)


class Guard:
    """Keeps steps with a non-finite loss or gradient from changing anything but the step count.

    The optimizer leaves weights and moments alone where its `found_inf` is 1 (torch's fused optimizers), the EMA where
    `Ema.update` is told so; buffers, which the forward pass writes (running statistics), are restored here.

    Args:
        module: whose buffers are restored.
        scaler: of fp16; overflows that it is about to scale away are counted, but not reported.

    Attributes:
        skipped: steps skipped so far. skipped_in_a_row: up to the latest step, overflows that the scaler handles aside.
        latest_skipped: whether the latest step was.
    """

    def __init__(self, module: nn.Module, scaler: torch.amp.GradScaler) -> None:
        self.skipped = 0
        self.skipped_in_a_row = 0
        self.latest_skipped = False
        self._scaler = scaler
        self._buffers = list(module.buffers())
        self._before: list[Tensor] = []
        self._measured: deque[tuple[int, tuple[str, ...], Tensor, Any]] = deque()

    def begin(self) -> None:
        """Before the forward pass: keep the buffers."""
        self._before = [b.clone() for b in self._buffers]

    @torch.no_grad()
    def check(
        self, loss: Float[Tensor, ""], grad_norm: Float[Tensor, ""], step: int, keys: tuple[str, ...]
    ) -> Float[Tensor, ""]:
        """After the backward pass: return 1, on the device, if the step must be skipped, else 0.

        `loss` and `keys` are this rank's, `grad_norm` that of the gradient averaged over ranks.
        """
        own = torch.isfinite(loss)
        summed = dist.sum_over_ranks(torch.stack([(~(own & torch.isfinite(grad_norm))).float(), loss.detach().float()]))
        skip = (summed[0] > 0).float()
        if self._buffers:
            torch._foreach_copy_(self._buffers, [torch.where(skip > 0, before, now) for before, now in zip(
                self._before, self._buffers, strict=True)])
        measured = torch.stack([skip, summed[1] / dist.world_size(), grad_norm.detach().float(), own.float()])
        arrived = None
        if measured.is_cuda:
            host = torch.empty(measured.shape, dtype=measured.dtype, pin_memory=True)
            measured, arrived = host.copy_(measured, non_blocking=True), torch.cuda.Event()
            arrived.record()
        self._measured.append((step, keys, measured, arrived))
        return skip

    def apply(self, skip: Float[Tensor, ""], optimizer: torch.optim.Optimizer) -> None:
        """Have the optimizer's next step leave everything as it is if `skip` is 1."""
        optimizer.found_inf = skip  # type: ignore[attr-defined]  # read by torch's fused optimizers
        if self._scaler.is_enabled():
            for found in self._scaler._found_inf_per_device(optimizer).values():
                found.copy_(skip)  # the scaler has seen this rank's gradients alone

    def incidents(self, *, wait: bool) -> list[dict[str, Any]]:
        """Return a record of every skipped step since the last call; on all ranks together.

        Without `wait`, the latest step on CUDA is left for the next call.
        """
        found = []
        while self._measured:
            step, keys, measured, arrived = self._measured[0]
            if arrived is not None:
                if len(self._measured) == 1 and not wait:
                    break
                arrived.synchronize()
            self._measured.popleft()
            skipped, loss, norm, own_finite = measured.tolist()
            self.latest_skipped = bool(skipped)
            if not skipped:
                self.skipped_in_a_row = 0
                continue
            self.skipped += 1
            if math.isfinite(loss) and self._scaler.is_enabled() and self._scaler.get_scale() > 1.0:
                continue
            self.skipped_in_a_row += 1
            ranks = dist.collect((bool(own_finite), keys))
            found.append({
                "step": step, "kind": "non_finite", "skipped_in_a_row": self.skipped_in_a_row,
                "loss": loss if math.isfinite(loss) else str(loss),
                "grad_norm": norm if math.isfinite(norm) else str(norm),
                "ranks": [rank for rank, (finite, _) in enumerate(ranks) if not finite],
                "keys": [list(keys) for _, keys in ranks],
            })
        return found


class ChanceLevel:
    """Notices a contrastive loss that stays at chance level (`functional.chance_loss`): `CHANCE_RECORDS` records in a
    row above `CHANCE_FRACTION` of it, after `CHANCE_STEPS` steps and the warm-up; or the last of a shorter run."""

    def __init__(self, warmup_steps: int) -> None:
        self._after = max(CHANCE_STEPS, warmup_steps)
        self._in_a_row = 0

    def check(self, record: Mapping[str, Any], *, last: bool = False) -> None:
        """Take a record of metrics.jsonl, the `last` one of the run or not; warn once."""
        loss, chance = record.get("parts", {}).get("contrastive"), record.get("chance_loss")
        if loss is None or chance is None:
            return
        at_chance = loss > CHANCE_FRACTION * chance
        if record["step"] < self._after:
            if last and at_chance and record["step"] >= SHORTEST_RUN:
                _log.warning(
                    "%d steps were too few: the contrastive loss is %.2f, and chance is %.2f. Train longer: more "
                    "--epochs, or for few pairs a smaller --batch-size", record["step"], loss, chance)
            return
        self._in_a_row = self._in_a_row + 1 if at_chance else 0
        if self._in_a_row == CHANCE_RECORDS:
            _log.warning(
                "after %d steps the contrastive loss is %.2f, and chance is %.2f: nothing is being learned. First see "
                "whether the model can learn one batch: add --overfit-one-batch. If it can, look at the data (aclip "
                "data look): do images and captions belong together? If not, try a lower --lr, a longer warm-up, or a "
                "larger batch", record["step"], loss, chance)


@contextmanager
def explain_oom(config: RunConfig, device: torch.device) -> Iterator[None]:
    """Turn running out of memory in a step into one sentence: what was held, and what helps.

    Raises:
        OutOfMemoryError: torch could not get memory.
    """
    try:
        yield
    except RuntimeError as error:
        words = ("out of memory", "can't allocate memory")  # on the CPU it has no class of its own
        if not isinstance(error, torch.OutOfMemoryError) and not any(word in str(error) for word in words):
            raise
        part = config.micro_batch or config.batch_size
        smaller = f"--micro-batch {max(1, (part or 2) // 2)}"
        helps = ", ".join([smaller, *([] if config.recompute else ["--recompute"])])
        raise OutOfMemoryError(
            f"out of memory in a step of {config.batch_size} pairs, {part} at a time, on {device}, where the most held "
            f"was {in_units(peak_memory(device))}: use {helps} (the step stays the same), or a smaller --batch-size"
        ) from error


class Interrupted(KeyboardInterrupt):
    """A run was asked to stop and has saved itself."""


class StopRequest:
    """Turns SIGINT, SIGTERM and Slurm's SIGUSR1 into a flag, so that the current step is finished and saved.

    A second signal of the same kind acts as it did before; under torchrun only if it comes much later, for there it is
    more likely the first one passed on. Outside the main thread signals are left alone.
    """

    def __init__(self) -> None:
        self.requested = False
        self._launched = dist.world_size() > 1 or "TORCHELASTIC_RUN_ID" in os.environ  # torchrun passes signals on
        self._immediately = False
        self._first: dict[int, float] = {}
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
                number = getattr(signal, name, None)
                if number is not None:
                    self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextmanager
    def immediately(self) -> Iterator[None]:
        """Within this context a request raises `Interrupted` at once; for work that can be repeated."""
        self._immediately = True
        try:
            yield
        finally:
            self._immediately = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        since_first = now - self._first.setdefault(number, now)
        if self.requested and self._launched and since_first < REPEAT_SECONDS:
            return
        self.requested = True
        if not self._launched:
            signal.signal(number, self._before[number])
        elif since_first >= REPEAT_SECONDS:
            signal.signal(number, self._before[number])
            os.kill(os.getpid(), number)
        if self._immediately:
            raise Interrupted
