"""Training, top to bottom: what is built, `Trainer` (the state of a run), THE STEP, THE LOOP."""

import logging
import math
import shlex
from collections.abc import Callable, Iterable
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor, nn

from aclip import checkpoint, data, dist, models, plan
from aclip.config import ImageSize, RunConfig
from aclip.devices import cpp_compiler, fast_precision
from aclip.errors import AclipError, CheckpointError, ConfigError, TrainingError
from aclip.method import Method
from aclip.models.lora import adapt
from aclip.objectives import OBJECTIVES
from aclip.objectives.functional import chance_loss
from aclip.run_folder import RunFolder, command_line
from aclip.structs import Batch, StepOutput
from aclip.training.accumulation import accumulate
from aclip.training.distributed import wrap
from aclip.training.guard import ChanceLevel, Guard, Interrupted, StopRequest, explain_oom
from aclip.training.journal import BadSamples, Clock, TrainingProgress, report_incident
from aclip.training.optim import (
    build_optimizer,
    clip_gradients,
    empty_optimizer_state,
    optimizer_state,
    parameter_groups,
    total_norm,
)
from aclip.training.schedule import Timetable, momentum_cosine, warmup_cosine
from aclip.training.sinks import Sinks

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
DEFAULT_BATCH_SIZE = 256

_log = logging.getLogger(__name__)


def resolve_defaults(config: RunConfig, num_pairs: int, device: torch.device) -> RunConfig:
    """Return `config` with batch size and precision set, from the data and the device."""
    batch_size = config.batch_size or max(2, min(DEFAULT_BATCH_SIZE, num_pairs))
    return replace(config, batch_size=batch_size, precision=config.precision or fast_precision(device))


def open_stored(config: RunConfig, source: data.Source) -> data.StoredFeatures | None:
    """Return the stored features of a run's teacher, if it names any.

    Raises:
        ConfigError: they are of another teacher, or of other samples, crops or captions.
    """
    if config.teacher_features is None:
        return None
    stored = data.StoredFeatures(config.teacher_features)
    if config.teacher not in (None, stored.teacher):
        raise ConfigError(f"the features in {stored.folder} are those of '{stored.teacher}', not of "
                          f"'{config.teacher}': leave out --teacher, or name other features")
    resolved = plan.resolve_run(replace(config, teacher=stored.teacher))
    stored.check({"seed": config.seed, "samples": len(source), "source": source.digest(), **resolved.frozen_inputs()},
                 source.spec)
    return stored


def build_trainer(
    config: RunConfig, num_pairs: int, device: torch.device, stored: data.StoredFeatures | None = None
) -> "Trainer":
    """Return the trainer of a run, its defaults resolved, with a fresh model, at its first step.

    With features of the teacher that are `stored`, the teacher itself is not loaded.
    """
    config = resolve_defaults(config, num_pairs, device)
    if config.compile and device.type == "cpu" and cpp_compiler() is None:
        raise ConfigError("--compile on a CPU needs a C++ compiler: install one (apt install g++), or leave it out")
    assert config.batch_size is not None
    if config.hard_negatives is not None and config.batch_size % config.group_size:
        raise ConfigError(f"a batch of {config.batch_size} is not made of groups of {config.group_size}: choose "
                          "another --batch-size or --group-size")
    torch.manual_seed(config.seed)
    resolved = plan.resolve_run(config if stored is None else replace(config, teacher=stored.teacher))
    if config.unmasked_tuning > 0 and plan.trains_only_masked(config.recipe):
        raise ConfigError(f"unmasked_tuning has no effect: all losses of recipe '{config.recipe.name}' are computed on "
                          "removed patches alone")
    model = _model(config, config.model, config.image_size, uses_text=resolved.uses_text)
    if config.lora:
        adapt(model, config.lora, config.lora_towers)
    teacher = None
    if config.teacher and stored is None:
        teacher = _model(config, config.teacher, None, uses_text=resolved.uses_text)
    pixels = models.preprocess_config(model)
    method = Method(model, resolved, pixels["mean"], pixels["std"], teacher, stored=stored is not None,
                    stored_logit_scale=None if stored is None else stored.logit_scale)
    return Trainer(config, method.to(device).train(), Timetable.of(config, num_pairs), device, stored)


def _model(config: RunConfig, name: str, image_size: ImageSize, *, uses_text: bool) -> nn.Module:
    """Return a model; if it is to be the frozen encoder as well, its text tower must come with its weights."""
    frozen = name == (config.teacher or config.model) and config.recipe.uses_frozen
    starts = [OBJECTIVES[key].first_logit_scale for key in config.recipe.objectives]
    model = models.create_model(name, image_size=image_size, with_text=None if frozen and uses_text else uses_text,
                                logit_scale=next((start for start in starts if start is not None), None))
    if uses_text and isinstance(model, models.ImageTower):
        raise ConfigError(f"the weights '{name}' are an image tower alone, and recipe '{config.recipe.name}' keeps to "
                          "what a model knows of images and texts: choose another recipe, such as clip")
    return model


def open_batches(
    trainer: "Trainer", source: data.Source, workers: int, clusters: np.ndarray | None = None
) -> Iterable[Batch]:
    """Return this rank's share of the batches from the trainer's next step to the last.

    With `hard_negatives`, `clusters` are those of the samples, (N,) int32.
    """
    config, resolved = trainer.config, trainer.method.plan
    assert config.batch_size is not None
    dataset = data.PairDataset(source, resolved.pipeline, trainer.tokenizer, sizes=resolved.view_sizes,
                               seed=config.seed, stored=trainer.stored)
    return data.build_loader(
        dataset, batch_size=config.batch_size, start_step=trainer.step, total_steps=trainer.timetable.total_steps,
        workers=workers, device=trainer.device, cut_text=models.cut_after_eot if resolved.shape.text_cut else None,
        rank=dist.rank(), world_size=dist.world_size(),
        groups=None if clusters is None else data.Groups(clusters, config.group_size))


@dataclass(frozen=True)
class Best:
    """The best evaluation so far: its step, its value, and how many evaluations in a row have not been better since."""

    step: int
    value: float
    since: int = 0


class Trainer:
    """The state of a run: model, optimizer, EMA, and how far it is.

    Args:
        config: the run, defaults resolved.
        method: on `device`, where batches go, too.
        timetable: the run's length in steps.
        stored: features of the teacher that batches come with.

    Attributes:
        step: optimizer steps done. samples_seen: pairs, over all ranks.
        evaluation_due: whether this state is to be evaluated and is not yet.
        best: the best evaluation by the metric of `keep_best`; None without one.
    """

    def __init__(self, config: RunConfig, method: Method, timetable: Timetable, device: torch.device,
                 stored: data.StoredFeatures | None = None) -> None:
        self.config, self.method, self.timetable, self.device = config, method, timetable, device
        self.stored = stored
        for resolution in {size for _, size in timetable.resolutions}:  # refuse what cannot be trained before step 1
            method.plan_at(resolution)
        self.step = 0
        self.samples_seen = 0
        self.evaluation_due = False
        self.best: Best | None = None
        self.truncated = 0  # captions cut since the last record
        share = max(1, (config.batch_size or 0) // dist.world_size())
        self.micro_batch = min(config.micro_batch or share, share)
        self.in_parts = self.micro_batch < share
        self.wrapped = wrap(method, device, parallel=config.parallel, recompute=config.recompute,
                            compile_blocks=config.compile, in_parts=self.in_parts)
        settings = config.recipe.optimization
        self.groups = parameter_groups(method, settings.weight_decay, settings.layer_decay,
                                       settings.muon if settings.optimizer == "muon" else None)
        if not self.groups:
            raise ConfigError("nothing is left to train: freeze less")
        self.optimizer: torch.optim.Optimizer = build_optimizer(
            self.groups, settings, torch.bfloat16 if config.precision == "bf16" else torch.float32)
        self.ema = method.ema()
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
        self.guard = Guard(method, self.scaler)
        limits = [OBJECTIVES[name].max_logit_scale for name in config.recipe.objectives]
        self._max_log_scale = math.log(min((limit for limit in limits if limit is not None), default=math.inf))
        # of the latest step: learning rate, EMA momentum, norm of the gradient before clipping, captions
        self._lr, self._momentum = self.learning_rate(), self.ema_momentum()
        self._grad_norm, self._caption_ids = torch.zeros(()), torch.empty(0, dtype=torch.int64)

    @cached_property
    def tokenizer(self) -> data.CaptionTokenizer:
        """The tokenizer of the model."""
        return data.CaptionTokenizer(models.tokenizer_of(self.config.model))

    def train_step(self, batch: Batch, *, masked: bool | None = None, resolution: float | None = None) -> StepOutput:
        """THE STEP: forward, backward, optimizer, EMA. A non-finite step changes nothing but the step count.

        Args:
            batch: this rank's share.
            masked, resolution: in place of those that the timetable has for this step.

        Raises:
            OutOfMemoryError: the step does not fit; the trainer is not usable any more.
        """
        with explain_oom(self.config, self.device):
            batch = batch.to(self.device)
            masked = self.timetable.masked(self.step) if masked is None else masked
            resolution = resolution or self.timetable.resolution(self.step)
            self._lr, self._momentum = self.learning_rate(), self.ema_momentum()
            for group in self.optimizer.param_groups:
                group["lr"] = self._lr * group["lr_factor"]
            self.optimizer.zero_grad(set_to_none=True)
            self.guard.begin()

            if self.in_parts:
                output = accumulate(self.method, batch, self.micro_batch, masked=masked, resolution=resolution,
                                    autocast=self.autocast, scale=self.scaler.scale)
                self.wrapped.average_gradients()
            else:
                with self.autocast():
                    output = self.wrapped.step(batch, masked=masked, resolution=resolution)
                self.scaler.scale(output.loss).backward()

            self.scaler.unscale_(self.optimizer)
            gradients = [p.grad for group in self.groups for p in group.parameters.values() if p.grad is not None]
            self._grad_norm = total_norm(gradients)
            skip = self.guard.check(output.loss, self._grad_norm, self.step + 1, batch.keys)
            if self.config.recipe.optimization.grad_clip > 0:
                clip_gradients(gradients, self._grad_norm, self.config.recipe.optimization.grad_clip)
            self.guard.apply(skip, self.optimizer)
            self.scaler.step(self.optimizer)
            self.scaler.update()
            if self.method.plan.uses_text and models.logit_scale_of(self.method.model).requires_grad:
                with torch.no_grad():
                    models.logit_scale_of(self.method.model).clamp_(0.0, self._max_log_scale)
            if self._momentum is not None:
                self.ema.update(self._momentum, skipped=skip)

        self.step += 1
        self.samples_seen += batch.size * dist.world_size()
        self.truncated += batch.truncated
        self.evaluation_due = self.timetable.evaluates(self.step)
        self._caption_ids = batch.caption_ids
        return replace(output, passes={})  # they hold the step's largest tensors

    def mark_evaluated(self, value: float | None = None) -> None:
        """Note that the evaluation that was due is done, with what the metric of `keep_best` is, or has failed."""
        self.evaluation_due = False
        if value is not None and self.improves(value):
            self.best = Best(self.step, value)
        elif value is not None and self.best is not None:
            self.best = replace(self.best, since=self.best.since + 1)

    def improves(self, value: float) -> bool:
        """Return whether a value of the metric of `keep_best` is better than all before it."""
        return self.best is None or value > self.best.value

    @property
    def stops_early(self) -> bool:
        """Whether `early_stop` evaluations in a row were no better than the best."""
        return self.best is not None and 0 < self.config.early_stop <= self.best.since

    def learning_rate(self) -> float:
        """Return the learning rate of the next step."""
        settings, table = self.config.recipe.optimization, self.timetable
        lr = warmup_cosine(self.step, table.total_steps, settings.lr, table.warmup_steps, settings.warmup_start_lr,
                           settings.end_lr)
        return lr if table.masked(self.step) else lr * table.unmasked_lr

    def ema_momentum(self) -> float | None:
        """Return the EMA momentum of the next step, or None without an EMA."""
        momentum = self.config.recipe.ema_momentum
        if momentum is None or not self.config.recipe.uses_ema:
            return None
        return momentum_cosine(self.step, self.timetable.total_steps, momentum.start, momentum.end, momentum.warmup)

    def autocast(self) -> torch.autocast:
        """Return the context in which the towers compute."""
        precision = self.config.precision or "fp32"
        return torch.autocast(self.device.type, AUTOCAST[precision], enabled=precision != "fp32")

    def record(self, output: StepOutput) -> dict[str, Any]:
        """Return the line of metrics.jsonl for the step just taken; waits for the device. All ranks call it.

        Losses are means over ranks, counts are sums.
        """
        losses = torch.stack([chance_loss(self._caption_ids), output.loss.detach(), *output.parts.values()]).float()
        chance, loss, *parts = (dist.sum_over_ranks(losses) / dist.world_size()).tolist()
        record: dict[str, Any] = {
            "step": self.step, "samples_seen": self.samples_seen, "loss": loss,
            "parts": dict(zip(output.parts, parts, strict=True)), "lr": self._lr, "grad_norm": self._grad_norm.item(),
            "cut_captions": self._total_truncated(),
        }
        self.truncated = 0
        if self.method.plan.uses_text:
            record["logit_scale"] = models.logit_scale_of(self.method.model).exp().item()
        if "contrastive" in output.parts:
            record["chance_loss"] = chance
        if self._momentum is not None:
            record |= {"ema_momentum": self._momentum, "ema_distance": self.ema.distance().item()}
        return record

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return everything a resume needs: tensors as they are, whole or sharded, and plain values. All ranks call it.
        """
        tensors = {f"method/{name}": value for name, value in self.method.state_dict().items()}
        tensors |= {f"optimizer/{name}": value for name, value in optimizer_state(self.optimizer, self.groups).items()}
        tensors["rng/torch"] = torch.get_rng_state()
        values = {"samples_seen": self.samples_seen, "cut_captions": self._total_truncated(),
                  "skipped_steps": self.guard.skipped, "evaluation_due": self.evaluation_due,
                  "best": None if self.best is None else asdict(self.best),
                  "scaler": self.scaler.state_dict()}
        return tensors, values

    def load_state_dict(self, stored: checkpoint.Checkpoint) -> None:
        """Continue from a checkpoint, which any number of ranks may have written.

        Raises:
            CheckpointError: it belongs to another model or recipe.
        """
        tensors = {f"method/{name}": value for name, value in self.method.state_dict().items()}
        unknown = [name for name in stored.shapes if name.startswith("method/") and name not in tensors]
        if unknown:
            raise CheckpointError(f"the checkpoint {stored.path} is of another model or recipe: it has '{unknown[0]}'")
        tensors |= {f"optimizer/{name}": value for name, value in empty_optimizer_state(
            self.optimizer, self.groups, stored, "optimizer/").items()}
        tensors["rng/torch"] = torch.get_rng_state()
        stored.load_into(tensors)
        torch.set_rng_state(tensors["rng/torch"])
        self.scaler.load_state_dict(stored.values["scaler"])
        self.step, self.samples_seen = stored.step, int(stored.values["samples_seen"])
        self.truncated = int(stored.values["cut_captions"]) if dist.rank() == 0 else 0
        self.guard.skipped = int(stored.values["skipped_steps"])
        self.evaluation_due = bool(stored.values["evaluation_due"])
        best = stored.values.get("best")
        self.best = None if best is None else Best(**best)

    def resume(self, folder: RunFolder) -> None:
        """Continue from the newest undamaged checkpoint, or from the start if there is none; all ranks call it.

        Damaged ones are reported, journalled and renamed; journals are cut back to the checkpoint.
        """
        found, damaged = dist.collect(checkpoint.find_newest(folder.checkpoints) if dist.rank() == 0 else None)[0]
        if found is None and damaged:
            raise checkpoint.no_undamaged(folder.checkpoints, damaged)
        if found is not None:
            self.load_state_dict(found)
        if folder.final.exists():
            self.evaluation_due = False  # the last checkpoint of a finished run is from before its last evaluation
        dist.barrier()
        if dist.rank() == 0:
            for bad, reason in damaged:
                folder.append("incidents", {"step": self.step, "kind": "damaged_checkpoint", "name": bad.name,
                                            "reason": reason})
                _log.warning("%s; continuing from step %d", reason, self.step)
                with suppress(OSError):
                    bad.replace(bad.with_name(f"{bad.name}.damaged"))
            folder.rewind(self.step, evaluated=not self.evaluation_due)
        dist.barrier()

    def _total_truncated(self) -> int:
        return int(dist.sum_over_ranks(torch.tensor(self.truncated, device=self.device)))


def fit(
    trainer: Trainer,
    batches: Iterable[Batch],
    folder: RunFolder,
    progress: TrainingProgress,
    evaluate: Callable[[int], float | None],
    sinks: Sinks | None = None,
) -> None:
    """THE LOOP: train to the end of the timetable, from wherever the trainer stands; on every rank.

    It ends sooner if the trainer `stops_early`.

    Args:
        trainer: fresh, or resumed.
        batches: from the trainer's next step on, this rank's share of each.
        folder: where metrics and checkpoints go; rank 0 writes journals.
        progress, sinks: also get every record of metrics.jsonl.
        evaluate: called with the number of steps done, every so often and at the end; rank 0's returns the metric of
            `keep_best`.

    Raises:
        Interrupted: on SIGINT, SIGTERM or SIGUSR1 to any rank, after saving a checkpoint; on all ranks together.
        TrainingError: the loss stays non-finite, on all ranks together; or a step runs out of memory.
    """
    config, table = trainer.config, trainer.timetable
    saver = checkpoint.Saver(folder.checkpoints, config.keep_checkpoints, config.keep_every * table.save_every)
    bad_samples, chance, stop_flag = BadSamples(folder), ChanceLevel(table.warmup_steps), dist.Flag()
    clock = Clock()
    save_due = False
    with StopRequest() as stop, folder.patient(), closing(saver):
        if trainer.evaluation_due:
            _evaluate(trainer, folder, saver, stop, evaluate)
        for batch in clock.waiting_for(batches):
            if trainer.stops_early:
                break
            output = trainer.train_step(batch)
            step, last = trainer.step, trainer.step == table.total_steps
            clock.samples += batch.size * dist.world_size()
            bad_samples.add(batch, step)

            log = last or step % config.log_every == 0
            save_due |= trainer.evaluation_due or table.saves(step)
            stopping = stop_flag.any_raised(stop.requested)

            for incident in trainer.guard.incidents(wait=log or save_due or stopping):
                report_incident(
                    folder, incident, "step %d was skipped: its loss (%s) or gradient norm (%s) is not finite",
                    incident["step"], incident["loss"], incident["grad_norm"])
            failing = trainer.guard.skipped_in_a_row > config.max_skipped
            record = None
            if log and not trainer.guard.latest_skipped:
                record = trainer.record(output) | bad_samples.journal() | {
                    "skipped_steps": trainer.guard.skipped} | clock.restart()
                if dist.rank() == 0:
                    folder.append("metrics", record)
                    chance.check(record, last=last)
                    if sinks is not None:
                        sinks.log(record)
            progress.show(step, record)

            if save_due or stopping or failing:  # skipped steps have left the weights as they were
                bad_samples.journal()  # a resume from here does not meet them again
                saver.save(step, *trainer.state_dict())
                save_due = False
            _report_failures(saver, folder)
            if failing:
                _fail(trainer, output, folder, saver)
            if stopping:
                _leave(trainer, folder, saver)
            if trainer.evaluation_due:
                with clock.paused():
                    _evaluate(trainer, folder, saver, stop, evaluate)
        saver.wait()
        _report_failures(saver, folder)


def _evaluate(
    trainer: Trainer, folder: RunFolder, saver: checkpoint.Saver, stop: StopRequest,
    evaluate: Callable[[int], float | None],
) -> None:
    """Evaluate the state that was just saved. A stop request ends it at once; a failure does not end the training.

    A state that ends the run early is saved again: a resume must find it evaluated.
    """
    saver.wait()
    if any(dist.collect(stop.requested)):
        _leave(trainer, folder, saver)
    value = None
    try:
        with stop.immediately():
            value = evaluate(trainer.step)
    except Interrupted:
        _leave(trainer, folder, saver, together=dist.world_size() == 1)
    except (AclipError, OSError) as error:
        report_incident(folder, {"step": trainer.step, "kind": "evaluation_failed", "reason": str(error)},
                        "the evaluation after step %d failed: %s", trainer.step, error)
    trainer.mark_evaluated(dist.collect(value)[0])
    if trainer.stops_early:
        saver.save(trainer.step, *trainer.state_dict())


def _leave(trainer: Trainer, folder: RunFolder, saver: checkpoint.Saver, *, together: bool = True) -> NoReturn:
    """Stop, once the state that was just saved is on disk."""
    if together:
        saver.wait()
    _report_failures(saver, folder)
    newest = max(map(checkpoint.step_of, checkpoint.list_checkpoints(folder.checkpoints)), default=0)
    where = "" if newest == trainer.step else f", the newest checkpoint is of step {newest}"
    again = f"aclip train --resume {shlex.quote(str(folder.path))}"
    if not command_line().startswith("aclip "):
        again = f"aclip.train(resume={str(folder.path)!r})"
    raise Interrupted(f"stopped after step {trainer.step} of {trainer.timetable.total_steps}{where}; continue with "
                      f"{again}")


def _fail(trainer: Trainer, output: StepOutput, folder: RunFolder, saver: checkpoint.Saver) -> NoReturn:
    saver.wait()
    _report_failures(saver, folder)
    parts = ", ".join(f"{name} {part.item():g}" for name, part in output.parts.items())
    raise TrainingError(
        f"the loss became NaN or inf at step {trainer.step} ({parts}), and {trainer.guard.skipped_in_a_row} steps in a "
        f"row were skipped: try a lower --lr or --precision fp32; their samples are in {folder.path}/incidents.jsonl, "
        "the checkpoint of this step has the last finite weights")


def _report_failures(saver: checkpoint.Saver, folder: RunFolder) -> None:
    for step, reason in saver.failures():
        report_incident(folder, {"step": step, "kind": "save_failed", "reason": reason},
                        "the checkpoint of step %d could not be written (%s): training goes on and tries again at the "
                        "next", step, reason)
