"""Everything that determines a run, as one frozen dataclass that is written to its folder."""

import math
from dataclasses import dataclass, fields, replace
from itertools import accumulate
from pathlib import Path
from typing import Literal

import torch

from aclip.config import Recipe, from_dict
from aclip.errors import ConfigError
from aclip.run_folder import RunFolder

Precision = Literal["fp32", "bf16", "fp16"]
Parallel = Literal["ddp", "fsdp"]


@dataclass(frozen=True)
class ResolutionPhase:
    """Some steps on images of another size.

    Attributes:
        share: of the run's optimizer steps, above 0, at most 1.
        resolution: image side relative to the recipe's own, rounded to whole patches.
    """

    share: float
    resolution: float

    def __post_init__(self) -> None:
        if not 0.0 < self.share <= 1.0:
            raise ConfigError(f"a phase of a resolution schedule takes a share of the steps, 0 < share <= 1, "
                              f"not {self.share}")
        if not 0.0 < self.resolution < math.inf:
            raise ConfigError(f"a phase of a resolution schedule has a positive resolution, not {self.resolution}")


@dataclass(frozen=True)
class RunConfig:
    """One execution of a recipe.

    Attributes:
        recipe: the method, its optimization included.
        model: open_clip name, preset, or folder.
        image_size: side of the input in pixels, or (height, width), or None for the model's own.
        data: training source, or several of them, each "source=weight" or all without a weight.
        validation: sources to evaluate on, as "name=source" or a source.
        output: the run folder.
        epochs: passes over the data; ignored where `samples` is set.
        samples: pairs to train on, or None.
        batch_size: pairs per optimizer step over all processes (global); None is 256, or all the data.
        unmasked_tuning: share of the optimizer steps, the last ones, in which nothing is masked, so that the
            model gets used to whole pictures before it is evaluated on them (FLIP). Their arithmetic is that
            of the recipe at mask ratio 0.
        unmasked_lr: factor on the learning rate in those steps; FLIP's paper takes 0.01. It is a phase of the run, so
            recipes that mask nothing take it too: equal terms in a comparison.
        resolution_schedule: what image side the steps see, relative to the recipe's own, first phase first; the steps
            after the last phase see whole images.
        seed: of weights, order, crops, captions and masks.
        workers: loader processes; None is what suits the cores and the device, see `aclip.data.suitable_workers`.
        device: "auto", "cpu", "cuda", "cuda:1", "mps".
        precision: of the towers' arithmetic; weights, losses and optimizer are always fp32. None is the one in which
            the device is fast, see `fast_precision`.
        parallel: over several processes, "ddp" holds everything on each, "fsdp" a share of it on each.
        micro_batch: pairs whose activations a process holds at a time; None: its whole share of the batch, "auto": as
            many as the memory is estimated to hold (`engine.memory`). The step is the same but for rounding, and takes
            a second forward pass of the towers (`engine.accumulation`).
        recompute: hold the blocks' inputs alone for the backward pass, and run the blocks again in it.
        compile: compile the transformer blocks.
        log_every: optimizer steps between lines of metrics.jsonl.
        evaluate_every: epochs between evaluations; 0 evaluates at the end alone.
        save_every: epochs between checkpoints. keep_checkpoints: how many of the newest to keep.
        keep_every: every how-many-th of the regular checkpoints is kept for good; 0 keeps none.
        most_skipped: how many steps in a row may be skipped because their loss or gradient is not finite; after one
            more the run goes back to its newest checkpoint and on with other batches.
        tensorboard: also write TensorBoard events to the run folder.
    """

    recipe: Recipe
    model: str
    data: str | tuple[str, ...]
    output: str
    image_size: int | tuple[int, int] | None = None
    validation: tuple[str, ...] = ()
    epochs: float = 25.0
    samples: int | None = None
    batch_size: int | None = None
    unmasked_tuning: float = 0.0
    unmasked_lr: float = 1.0
    resolution_schedule: tuple[ResolutionPhase, ...] = ()
    seed: int = 0
    workers: int | None = None
    device: str = "auto"
    precision: Precision | None = None
    parallel: Parallel = "ddp"
    micro_batch: int | Literal["auto"] | None = None
    recompute: bool = False
    compile: bool = False
    log_every: int = 10
    evaluate_every: float = 1.0
    save_every: float = 1.0
    keep_checkpoints: int = 2
    keep_every: int = 0
    most_skipped: int = 5
    tensorboard: bool = False

    def __post_init__(self) -> None:
        for name in ("log_every", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}")
        if isinstance(self.micro_batch, int) and self.micro_batch < 1:
            raise ConfigError(f"micro_batch must be at least 1, not {self.micro_batch}")
        if self.batch_size is not None and self.batch_size < 2:
            raise ConfigError("batch_size must be at least 2: a contrast needs another pair to differ from")
        if self.workers is not None and self.workers < 0:
            raise ConfigError(f"workers must be 0 or more, not {self.workers}")
        for name in ("evaluate_every", "save_every", "keep_every", "most_skipped", "seed"):
            if not 0 <= getattr(self, name) < 2**63:
                raise ConfigError(f"{name} must be 0 or more, and finite, but is {getattr(self, name)}")
        if not 0.0 <= self.unmasked_tuning <= 1.0:
            raise ConfigError(f"unmasked_tuning is a share of the steps, 0 to 1, not {self.unmasked_tuning}")
        if not 0.0 < self.unmasked_lr < math.inf:
            raise ConfigError(f"unmasked_lr is a positive factor on the learning rate, not {self.unmasked_lr}")
        if self.unmasked_lr != 1.0 and self.unmasked_tuning == 0.0:
            raise ConfigError("unmasked_lr has nothing to act on: set unmasked_tuning, the share of unmasked steps")
        shares = sum(phase.share for phase in self.resolution_schedule)
        if shares > 1.0 + 1e-9:
            raise ConfigError(f"the shares of a resolution schedule add up to at most 1, not {shares:g}")
        if self.samples is None and not 0 < self.epochs < math.inf:
            raise ConfigError(f"epochs must be positive, not {self.epochs}")


RESUMABLE = ("data", "validation", "workers", "device", "parallel", "micro_batch", "recompute", "compile", "log_every",
             "evaluate_every", "save_every", "keep_checkpoints", "keep_every", "tensorboard")
"""Settings that a resumed run may have otherwise: where the same pairs lie, what computes, and how often it is told of.
They change the training by rounding at most."""


DEFAULT_BATCH_SIZE = 256


def settled(config: RunConfig, num_pairs: int, device: torch.device) -> RunConfig:
    """Return `config` with what it leaves open decided by the data and the device."""
    batch_size = config.batch_size or max(2, min(DEFAULT_BATCH_SIZE, num_pairs))
    precision = config.precision or fast_precision(device)
    return replace(config, batch_size=batch_size, precision=precision)


def fast_precision(device: torch.device) -> Precision:
    """Return bf16 where the device multiplies in it, fp16 on older GPUs, which only emulate that, and else fp32.

    bf16: NVIDIA's GPUs from compute capability 8.0 on (not T4, V100, RTX 20), AMD's, and CPUs with AMX or AVX512-BF16.
    A step of `clip` on `vit-micro` takes 1.8 times as long in fp32 on one core of an EPYC with AVX512-BF16.
    """
    if device.type == "cuda":
        emulated = torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0)
        return "fp16" if emulated else "bf16"
    flags = Path("/proc/cpuinfo")
    if device.type == "cpu" and flags.exists():
        return "bf16" if any(name in flags.read_text() for name in ("amx_bf16", "avx512_bf16")) else "fp32"
    return "fp32"


def saved_config(folder: RunFolder) -> RunConfig:
    """Return the configuration that a run's folder holds.

    Raises:
        ConfigError: no run, or one of an incompatible version.
    """
    known = {f.name for f in fields(RunConfig)}
    values = {key: value for key, value in folder.read_json("config.json").items() if key in known}
    config = from_dict(RunConfig, values, where=f"{folder.path}/config.json")
    assert isinstance(config, RunConfig)
    return config


def choose_device(name: str) -> torch.device:
    """Return the device that a name means; "auto" is a GPU if there is one.

    Raises:
        ConfigError: no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"there is no device '{name}' here: {str(error).splitlines()[0]}; use auto, cpu, "
                          "cuda, cuda:N or mps") from error
    return device


@dataclass(frozen=True)
class Phase:
    """How one optimizer step is taken.

    Attributes:
        masked: whether the recipe masks in it.
        resolution: image side relative to the recipe's own.
        lr_factor: on the scheduled learning rate.
    """

    masked: bool
    resolution: float
    lr_factor: float


@dataclass(frozen=True)
class Timetable:
    """A run's length in optimizer steps.

    Attributes:
        steps_per_epoch: whole batches per pass over the data.
        total_steps: optimizer steps of the run.
        warmup_steps: steps of linear warm-up, at most a tenth of the run.
        masked_steps: steps before unmasked tuning begins. unmasked_lr: factor on the learning rate after them.
        resolutions: (steps, resolution): before so many steps are done, images have this relative side.
        evaluate_every, save_every: in steps; 0 means at the end alone.
    """

    steps_per_epoch: int
    total_steps: int
    warmup_steps: int
    masked_steps: int
    evaluate_every: int
    save_every: int
    unmasked_lr: float = 1.0
    resolutions: tuple[tuple[int, float], ...] = ()

    def phase(self, step: int) -> Phase:
        """Return how the step after `step` steps is taken."""
        resolution = next((size for until, size in self.resolutions if step < until), 1.0)
        masked = step < self.masked_steps
        return Phase(masked, resolution, 1.0 if masked else self.unmasked_lr)

    @classmethod
    def of(cls, config: RunConfig, num_pairs: int) -> "Timetable":
        """Return the timetable of a settled run over `num_pairs` pairs.

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
        warmup = min(round(config.recipe.optimization.warmup_epochs * per_epoch), math.ceil(total / 10))
        return cls(
            steps_per_epoch=per_epoch,
            total_steps=total,
            warmup_steps=warmup,
            masked_steps=total - round(config.unmasked_tuning * total),
            evaluate_every=_steps(config.evaluate_every, per_epoch),
            save_every=_steps(config.save_every, per_epoch),
            unmasked_lr=config.unmasked_lr,
            resolutions=tuple(
                (round(until * total), phase.resolution)
                for until, phase in zip(accumulate(p.share for p in config.resolution_schedule),
                                        config.resolution_schedule, strict=True)),
        )


def _steps(epochs: float, per_epoch: int) -> int:
    return max(1, round(epochs * per_epoch)) if epochs > 0 else 0
