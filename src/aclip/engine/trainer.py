"""The loop: one plain pass over batches, with everything that must happen around a step."""

import math
import signal
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from types import FrameType
from typing import Any, Protocol

import torch
from torch import Tensor

from aclip import towers
from aclip.engine import checkpoint
from aclip.engine.optim import build_optimizer, optimizer_tensors, parameter_groups, restore_optimizer
from aclip.engine.run_config import RunConfig, Timetable
from aclip.engine.run_folder import RunFolder
from aclip.engine.schedule import momentum_cosine, warmup_cosine
from aclip.errors import CheckpointError, TrainingError
from aclip.method import Method
from aclip.structs import Batch, StepOutput

MAX_LOG_SCALE = math.log(100.0)  # CLIP's clamp on logit_scale
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class Sink(Protocol):
    """Something that shows or stores the progress of a run: the terminal, TensorBoard."""

    def log(self, record: dict[str, Any]) -> None:
        """Take one line of metrics.jsonl."""

    def advance(self, step: int) -> None:
        """Take notice that optimizer step `step` is done."""


class Interrupted(KeyboardInterrupt):
    """A run was asked to stop and has saved itself."""


@dataclass
class Clock:
    """Where the time of the current logging interval went, in seconds."""

    started: float = field(default_factory=time.perf_counter)
    waited: float = 0.0
    samples: int = 0

    def rates(self) -> dict[str, float]:
        """Return samples per second and the share of time spent waiting for data."""
        elapsed = max(time.perf_counter() - self.started, 1e-9)
        return {"samples_per_second": self.samples / elapsed, "data_wait": self.waited / elapsed}


class Incidents:
    """Journals bad samples by name, each once.

    Args:
        folder: its journal `skipped` tells which samples are known already.
    """

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder
        self._known = {record["key"] for record in folder.records("skipped")}

    def note(self, batch: Batch, step: int) -> None:
        """Take notice of a batch that was used in optimizer step `step`."""
        for key, reason in batch.skipped:
            if key not in self._known:
                self._known.add(key)
                self._folder.append("skipped", {"step": step, "key": key, "reason": reason})

    def counts(self) -> dict[str, int]:
        """Return how many bad samples were met so far."""
        return {"skipped_samples": len(self._known)}


class Trainer:
    """A method in training: its optimizer, schedules and average, and its state at rest.

    Args:
        config: the run.
        method: on its device already.
        timetable: the run's length in steps.
        device: where batches go.
    """

    def __init__(self, config: RunConfig, method: Method, timetable: Timetable, device: torch.device) -> None:
        self.config = config
        self.method = method
        self.timetable = timetable
        self.device = device
        self.step = 0
        self.samples_seen = 0
        self.grad_norm: Tensor | None = None  # of the latest step, before clipping; measured when asked for
        self.cut_captions = 0  # since the last record; at rest too, for a checkpoint may lie between two records
        self.groups = parameter_groups(method, config.recipe.optimization.weight_decay)
        self.optimizer = build_optimizer(self.groups, config.recipe.optimization)
        self.ema = method.ema()
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")

    def learning_rate(self) -> float:
        """Return the learning rate of the next step."""
        settings, table = self.config.recipe.optimization, self.timetable
        scheduled = warmup_cosine(self.step, table.total_steps, settings.lr, table.warmup_steps,
                                  settings.warmup_start_lr, settings.end_lr)
        return scheduled * table.phase(self.step).lr_factor

    def ema_momentum(self) -> float | None:
        """Return the EMA momentum of the next step, or None without an EMA."""
        momentum = self.config.recipe.ema_momentum
        if momentum is None:
            return None
        return momentum_cosine(self.step, self.timetable.total_steps, momentum.start, momentum.end)

    def train_step(self, batch: Batch) -> StepOutput:
        """Take one optimizer step; afterwards the gradients are still there to be looked at."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        momentum, phase = self.ema_momentum(), self.timetable.phase(self.step)
        self.optimizer.zero_grad(set_to_none=True)

        precision = self.config.precision or "fp32"
        with torch.autocast(self.device.type, AUTOCAST[precision], enabled=precision != "fp32"):
            output: StepOutput = self.method(batch, masked=phase.masked, resolution=phase.resolution)
        self.scaler.scale(output.loss).backward()
        self.scaler.unscale_(self.optimizer)
        clip = self.config.recipe.optimization.grad_clip
        self.grad_norm = torch.nn.utils.clip_grad_norm_(self.trained(), clip) if clip > 0 else None
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.method.plan.uses_text:
            with torch.no_grad():
                towers.logit_scale_of(self.method.model).clamp_(0.0, MAX_LOG_SCALE)
        if momentum is not None:
            self.ema.update(momentum)

        self.step += 1
        self.samples_seen += batch.size
        self.cut_captions += batch.truncated
        return replace(output, passes={})  # nobody reads them after the step, and they hold its largest tensors

    def trained(self) -> list[torch.nn.Parameter]:
        """Return the trainable parameters."""
        return [p for group in self.groups for p in group.parameters]

    def record(self, output: StepOutput, lr: float, momentum: float | None) -> dict[str, Any]:
        """Return what metrics.jsonl says about the step just taken; the one place that waits for the device.

        Starts the count of cut captions anew.

        Raises:
            TrainingError: the loss is not a finite number.
        """
        self.check_finite(output)
        norm = self.grad_norm
        if norm is None:
            norm = torch.nn.utils.get_total_norm([p.grad for p in self.trained() if p.grad is not None])
        record: dict[str, Any] = {
            "step": self.step,
            "samples_seen": self.samples_seen,
            "loss": output.loss.item(),
            "parts": {name: part.item() for name, part in output.parts.items()},
            "lr": lr,
            "grad_norm": norm.item(),
            "cut_captions": self.cut_captions,
        }
        self.cut_captions = 0
        if self.method.plan.uses_text:
            record["logit_scale"] = towers.logit_scale_of(self.method.model).exp().item()
        if "contrastive" in output.parts:
            record["chance_loss"] = math.log(self.config.batch_size or 1)
        if momentum is not None:
            record["ema_momentum"] = momentum
        return record

    def check_finite(self, output: StepOutput) -> None:
        """Stop a run whose loss is no number any more, before it is recorded or saved.

        Raises:
            TrainingError: the loss of the step just taken is infinite or not a number.
        """
        if not math.isfinite(output.loss.item()):
            parts = ", ".join(f"{name} {part.item():g}" for name, part in output.parts.items())
            raise TrainingError(f"the loss is no longer finite at step {self.step} ({parts}): try a lower --lr or "
                                "--precision fp32; the newest checkpoint is from before")

    def at_rest(self) -> checkpoint.Checkpoint:
        """Return everything that a resume needs."""
        tensors: dict[str, Tensor] = {f"method/{k}": v for k, v in self.method.state_dict().items()}
        optimizer = optimizer_tensors(self.optimizer, self.groups)
        tensors |= {f"optimizer/{k}": v for k, v in optimizer.items()}
        tensors["rng/torch"] = torch.get_rng_state()
        values = {"samples_seen": self.samples_seen, "cut_captions": self.cut_captions,
                  "scaler": self.scaler.state_dict()}
        return checkpoint.Checkpoint(self.step, tensors, values)

    def restore(self, saved: checkpoint.Checkpoint) -> None:
        """Continue from a checkpoint.

        Raises:
            CheckpointError: it belongs to another model or recipe.
        """
        try:
            self.method.load_state_dict(saved.part("method"))
            restore_optimizer(self.optimizer, self.groups, saved.part("optimizer"))
        except (RuntimeError, KeyError) as error:
            first = str(error).splitlines()[-1].strip()
            raise CheckpointError(f"the checkpoint of step {saved.step} is of another model or recipe: "
                                  f"{first}") from error
        torch.set_rng_state(saved.tensors["rng/torch"])
        self.scaler.load_state_dict(saved.values["scaler"])
        self.step, self.samples_seen = saved.step, int(saved.values["samples_seen"])
        self.cut_captions = int(saved.values.get("cut_captions", 0))


def fit(
    trainer: Trainer,
    batches: Iterable[Batch],
    folder: RunFolder,
    sinks: Sequence[Sink],
    evaluate: Callable[[int], None],
) -> None:
    """Train to the end of the timetable, from wherever the trainer stands.

    Args:
        trainer: fresh, or restored from a checkpoint.
        batches: starting with the batch of the trainer's next step.
        folder: where metrics and checkpoints go.
        sinks: what else hears of the progress.
        evaluate: called with the number of steps done, every so often and at the end.

    Raises:
        Interrupted: on SIGINT or SIGTERM, after saving a checkpoint.
    """
    config, table = trainer.config, trainer.timetable
    stop = StopRequest()
    incidents = Incidents(folder)
    clock, fetching = Clock(), time.perf_counter()
    with stop:
        for batch in batches:
            clock.waited += time.perf_counter() - fetching
            lr, momentum = trainer.learning_rate(), trainer.ema_momentum()
            output = trainer.train_step(batch.to(trainer.device))
            step, last = trainer.step, trainer.step == table.total_steps

            clock.samples += batch.size
            incidents.note(batch, step)
            for sink in sinks:
                sink.advance(step)
            if step % config.log_every == 0 or last:
                record = trainer.record(output, lr, momentum) | incidents.counts() | clock.rates()
                folder.append("metrics", record)
                for sink in sinks:
                    sink.log(record)
                clock = Clock()
            if last or (table.evaluate_every and step % table.evaluate_every == 0):
                paused = time.perf_counter()
                evaluate(step)
                clock.started += time.perf_counter() - paused
            if last or stop.requested or (table.save_every and step % table.save_every == 0):
                trainer.check_finite(output)
                checkpoint.save(folder.checkpoints, trainer.at_rest(), config.keep_checkpoints)
            if stop.requested and not last:
                raise Interrupted(f"stopped after step {step} of {table.total_steps}; continue with "
                                  f"aclip train --resume {folder.path}")
            fetching = time.perf_counter()


class StopRequest:
    """Turns SIGINT and SIGTERM into a flag, so that the step in progress is finished and saved.

    A second signal of the same kind acts as it did before.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        for number in self.SIGNALS:
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        signal.signal(number, self._before[number])
