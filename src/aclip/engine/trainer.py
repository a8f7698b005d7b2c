"""One optimizer step, and the state between steps."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from aclip import dist, models
from aclip.engine import checkpoint
from aclip.engine.accumulation import accumulate
from aclip.engine.gradients import clip_to, total_norm
from aclip.engine.health import Guard
from aclip.engine.memory import available_memory, estimate, fitting_micro_batch, telling_of_shortage
from aclip.engine.optim import build_optimizer, optimizer_tensors, parameter_groups, restore_optimizer
from aclip.engine.run_config import RunConfig, Timetable
from aclip.engine.schedule import momentum_cosine, warmup_cosine
from aclip.engine.score_cache import ScoreCache, check_processes
from aclip.engine.wrap import wrap
from aclip.errors import CheckpointError, ConfigError
from aclip.masking import to_bytes
from aclip.method import Method
from aclip.objectives import OBJECTIVES
from aclip.objectives.functional import chance_loss
from aclip.structs import Batch, StepOutput
from aclip.tensor_files import StoredTensors

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class Trainer:
    """A method in training: its optimizer, schedules and average, and its state at rest.

    Args:
        config: the run.
        method: on its device already.
        timetable: the run's length in steps.
        device: where batches go.

    Attributes:
        plans: resolution -> plan, of all phases of the timetable.
        score_caches: pass name -> where its scores are kept; without one, they are computed in every step.
    """

    def __init__(self, config: RunConfig, method: Method, timetable: Timetable, device: torch.device) -> None:
        self.config = config
        self.method = method
        self.timetable = timetable
        self.device = device
        self.score_caches: Mapping[str, ScoreCache] = {}
        check_processes(method.plan, config.parallel)
        # of all phases, so that what cannot be trained is refused before the first
        self.plans = {size: method.plan_at(size) for size in (*(size for _, size in timetable.resolutions), 1.0)}
        self.step = 0
        self.samples_seen = 0
        self.grad_norm: Tensor | None = None  # of the latest step, before clipping
        self.caption_ids = torch.empty(0, dtype=torch.int64)  # of the latest step
        self.measured = torch.empty(0)  # what `guard` measured of it
        self.skipped_batches = 0  # by how many batches the data are ahead of the steps, after rollbacks
        self.skipped_steps = 0  # because they were not finite
        self.owes_evaluation = False  # whether this state was to be evaluated and is not yet
        self.cut_captions = 0  # since the last record; at rest too, for a checkpoint may lie between two records
        share = (config.batch_size or 0) // dist.world_size()
        wanted = config.micro_batch or share
        if wanted == "auto":
            wanted = fitting_micro_batch(method, config, available_memory(device))
        self.micro_batch = min(wanted, share) or 1  # pairs that are held at a time
        self.in_parts = self.micro_batch < share
        self.estimate = estimate(method, config, self.micro_batch)
        self.wrapped = wrap(method, device, parallel=config.parallel, recompute=config.recompute,
                            compile_blocks=config.compile, in_parts=self.in_parts)
        settings = config.recipe.optimization
        self.groups = parameter_groups(method, settings.weight_decay, settings.layer_decay)
        if not self.groups:
            raise ConfigError("nothing is left to train: freeze less")
        self.optimizer = build_optimizer(self.groups, config.recipe.optimization)
        self.ema = method.ema()
        limits = [OBJECTIVES[objective.name].max_logit_scale for objective in config.recipe.objectives]
        self.max_log_scale = math.log(min((limit for limit in limits if limit is not None), default=math.inf))
        self.guard = Guard(method)
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")

    @property
    def batch_number(self) -> int:
        """Number of the next batch, counted from the start of the run; after rollbacks it is ahead of the steps."""
        return self.step + self.skipped_batches

    def learning_rate(self) -> float:
        """Return the learning rate of the next step."""
        settings, table = self.config.recipe.optimization, self.timetable
        scheduled = warmup_cosine(self.step, table.total_steps, settings.lr, table.warmup_steps,
                                  settings.warmup_start_lr, settings.end_lr)
        return scheduled * table.phase(self.step).lr_factor

    def ema_momentum(self) -> float | None:
        """Return the EMA momentum of the next step, or None without an EMA."""
        momentum = self.config.recipe.ema_momentum
        if momentum is None or not self.config.recipe.uses_ema:
            return None
        return momentum_cosine(self.step, self.timetable.total_steps, momentum.start, momentum.end, momentum.warmup)

    def train_step(self, batch: Batch) -> StepOutput:
        """Take one optimizer step; afterwards the gradients are still there to be looked at.

        A step whose loss or gradient is not finite on any rank changes nothing but the count of steps (`health.Guard`).

        Raises:
            OutOfMemoryError: the memory does not hold it; the trainer's state is not to be used any more.
        """
        with telling_of_shortage(self.estimate, self.config):
            return self._take_step(batch.to(self.device))

    def _take_step(self, batch: Batch) -> StepOutput:
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate() * group["lr_factor"]
        momentum, phase = self.ema_momentum(), self.timetable.phase(self.step)
        self.optimizer.zero_grad(set_to_none=True)
        self.guard.begin()
        if phase.masked:
            batch = self._with_known_scores(batch)

        if not self.in_parts:
            with self.autocast():
                output = self.wrapped.step(batch, masked=phase.masked, resolution=phase.resolution)
            self.scaler.scale(output.loss).backward()
        else:
            output = accumulate(self.method, batch, self.micro_batch, masked=phase.masked, resolution=phase.resolution,
                                autocast=self.autocast, scale=self.scaler.scale)
            self.wrapped.average_gradients()
        if phase.masked:
            self._keep_scores(batch, output)
        self.scaler.unscale_(self.optimizer)
        gradients = [p.grad for p in self.trained() if p.grad is not None]
        self.grad_norm = total_norm(gradients)
        found, self.measured = self.guard.judge(output.loss, self.grad_norm)
        clip = self.config.recipe.optimization.grad_clip
        if clip > 0:
            clip_to(gradients, self.grad_norm, clip)
        self.optimizer.found_inf = found  # type: ignore[attr-defined]
        for own in self.scaler._found_inf_per_device(self.optimizer).values() if self.scaler.is_enabled() else ():
            own.copy_(found)  # the scaler has looked at this rank's part alone
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.method.plan.uses_text and models.logit_scale_of(self.method.model).requires_grad:
            with torch.no_grad():
                models.logit_scale_of(self.method.model).clamp_(0.0, self.max_log_scale)
        if momentum is not None:
            self.ema.update(momentum, skipped=found)

        self.step += 1
        self.caption_ids = batch.caption_ids
        self.samples_seen += batch.size * dist.world_size()
        self.cut_captions += batch.truncated
        return replace(output, passes={})  # nobody reads them after the step, and they hold its largest tensors

    def _with_known_scores(self, batch: Batch) -> Batch:
        """Return the batch with what is known of its scores from earlier steps."""
        found = dict(batch.known)
        for name, cache in self.score_caches.items():
            known = cache.recall(batch.numbers, self.batch_number)
            found[name] = known.pin_memory().to(self.device) if self.device.type == "cuda" else known
        return replace(batch, known=found)

    def _keep_scores(self, batch: Batch, output: StepOutput) -> None:
        """Keep the scores that this step has computed for later ones; none where it removes nothing by them."""
        for name, cache in self.score_caches.items():
            missing = batch.known[name].missing
            if missing and name in output.passes:
                scores = output.passes[name].scores
                assert scores is not None
                cache.keep(batch.numbers, missing, to_bytes(scores[0]), self.batch_number)

    def autocast(self) -> torch.autocast:
        """Return the context in which the towers compute."""
        precision = self.config.precision or "fp32"
        return torch.autocast(self.device.type, AUTOCAST[precision], enabled=precision != "fp32")

    def trained(self) -> list[torch.nn.Parameter]:
        """Return the trainable parameters."""
        return [p for group in self.groups for p in group.parameters]

    def record(self, output: StepOutput, lr: float, momentum: float | None) -> dict[str, Any]:
        """Return what metrics.jsonl says about the step just taken; here the device is waited for.

        Losses are means, counts are sums over ranks, which all must call it. Starts the count of cut captions anew.
        """
        chance = chance_loss(self.caption_ids)  # here and not in the step, for it is wanted here alone
        losses = torch.stack([chance, output.loss.detach(), *output.parts.values()]).float()
        chance_level, loss, *parts = (dist.sum_over_ranks(losses) / dist.world_size()).tolist()
        assert self.grad_norm is not None
        record: dict[str, Any] = {
            "step": self.step,
            "samples_seen": self.samples_seen,
            "loss": loss,
            "parts": dict(zip(output.parts, parts, strict=True)),
            "lr": lr,
            "grad_norm": self.grad_norm.item(),
            "cut_captions": int(dist.sum_over_ranks(torch.tensor(self.cut_captions, device=self.device))),
        }
        self.cut_captions = 0
        if self.method.plan.uses_text:
            record["logit_scale"] = models.logit_scale_of(self.method.model).exp().item()
        if "contrastive" in output.parts:
            record["chance_loss"] = chance_level
        if momentum is not None:
            record |= {"ema_momentum": momentum, "ema_distance": self.ema.distance().item()}
        return record

    def at_rest(self) -> checkpoint.Checkpoint:
        """Return everything that a resume needs; tensors as they are, whole or sharded, on their device.

        Scores that are kept are not among them: what is known of them is on the disk when this returns.
        """
        for cache in self.score_caches.values():
            cache.flush()
        tensors: dict[str, Tensor] = {f"method/{k}": v for k, v in self.method.state_dict().items()}
        optimizer = optimizer_tensors(self.optimizer, self.groups)
        tensors |= {f"optimizer/{k}": v for k, v in optimizer.items()}
        tensors["rng/torch"] = torch.get_rng_state()
        # over ranks the sum, for another number of ranks may go on
        cut_captions = int(dist.sum_over_ranks(torch.tensor(self.cut_captions, device=self.device)))
        values = {"samples_seen": self.samples_seen, "cut_captions": cut_captions,
                  "skipped_batches": self.skipped_batches, "skipped_steps": self.skipped_steps,
                  "owes_evaluation": self.owes_evaluation, "scaler": self.scaler.state_dict()}
        return checkpoint.Checkpoint(self.step, tensors, values)

    def restore(self, saved: checkpoint.Checkpoint) -> None:
        """Continue from a checkpoint of any number of ranks.

        Raises:
            CheckpointError: it belongs to another model or recipe.
        """
        stored = saved.tensors
        assert isinstance(stored, StoredTensors)
        try:
            ours = {f"method/{name}": tensor for name, tensor in self.method.state_dict().items()}
            unknown = [name for name in stored if name.startswith("method/") and name not in ours]
            if unknown:
                raise CheckpointError(f"nothing here is called '{unknown[0]}'")
            for name, tensor in ours.items():
                stored.fill(name, tensor)
            restore_optimizer(self.optimizer, self.groups, stored)
            torch.set_rng_state(stored["rng/torch"])
            self.scaler.load_state_dict(saved.values["scaler"])
            self.step, self.samples_seen = saved.step, int(saved.values["samples_seen"])
            self.cut_captions = int(saved.values["cut_captions"]) if dist.rank() == 0 else 0
            self.skipped_batches = int(saved.values["skipped_batches"])
            self.skipped_steps = int(saved.values["skipped_steps"])
            self.owes_evaluation = bool(saved.values["owes_evaluation"])
        except (CheckpointError, RuntimeError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"the checkpoint of step {saved.step} is of another model or recipe: "
                                  f"{error}") from error
