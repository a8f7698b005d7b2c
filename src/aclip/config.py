"""Recipes and runs as data: frozen dataclasses that validate themselves and hold no code.

A recipe says which views are drawn, which encoder sees them in which order and under which mask, and which objectives
read the result. A run is a recipe on a model and data. Both are JSON on disk (`to_dict`, `from_dict`), and any field
can be changed by its path (`override`).
"""

import functools
import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import fields
from typing import Annotated, Any, Literal, TypeVar, dataclass_transform

from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError, model_validator
from pydantic.dataclasses import dataclass as pydantic_dataclass
from pydantic_core import ArgsKwargs

from aclip.errors import ConfigError, unknown_name

T = TypeVar("T")
Precision = Literal["fp32", "bf16", "fp16"]
Parallel = Literal["ddp", "fsdp"]
Sink = Literal["tensorboard", "wandb", "mlflow"]
Tower = Literal["image", "text"]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Ratio = Annotated[float, Field(ge=0.0, lt=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
NonNegative = Annotated[float, Field(ge=0.0)]
Count = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]


def _tuples(value: Any) -> Any:
    """Return options with tuples for the lists that JSON has, so that a config equals its copy from a file."""
    return {k: tuple(v) if isinstance(v, list) else v for k, v in value.items()} if isinstance(value, dict) else value


Options = Annotated[dict[str, Any], BeforeValidator(_tuples)]


@dataclass_transform(frozen_default=True)
def config_class(cls: type[T]) -> type[T]:
    """Make a frozen dataclass that refuses unknown fields, wrong types, NaN and infinity with a `ConfigError`."""

    def check_names(cls: Any, values: Any) -> Any:
        given = (values.kwargs if isinstance(values, ArgsKwargs) else values) or {}
        for name in given if isinstance(given, dict) else ():
            if name not in cls.__dataclass_fields__:
                raise ConfigError(unknown_name(f"field of {cls.__name__}", name, cls.__dataclass_fields__))
        return values

    checked: Any = cls
    checked.check_names = model_validator(mode="before")(classmethod(check_names))  # type: ignore[arg-type]
    config: Any = pydantic_dataclass(checked, frozen=True, config=ConfigDict(allow_inf_nan=False))
    validate: Callable[..., None] = config.__init__

    @functools.wraps(validate)
    def __init__(self: T, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        try:
            validate(self, *args, **kwargs)
        except ValidationError as error:
            raise ConfigError(sentence(config, error)) from None

    config.__init__ = __init__
    return config  # type: ignore[no-any-return]


def _as_tuple(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


Names = Annotated[tuple[str, ...], BeforeValidator(_as_tuple)]


@config_class
class Pass:
    """One run of an image encoder over some views.

    Attributes:
        views: names of views of the recipe's view pipeline, encoded in one batch.
        encoder: "online" (trained), "ema" (its moving average, no gradient), or "frozen" (the model that training
            started from, or `RunConfig.teacher`; no gradient, never changed).
        masking: name in `aclip.MASKING`.
        mask_ratio: fraction of patches removed, in [0, 1).
        masking_options: further arguments of the strategy, e.g. `{"block_size": 2, "keep": "lowest"}`.
        scores_from: name of an earlier pass whose CLS attention ranks this pass's patches.
        score_padding: scores outside the scored box: "border" clamps, "zeros" as the A-CLIP release does.
        resolution: image side relative to the model's own, rounded to whole patches.
        fill: removed patches stay in the sequence as a learned mask token (SimMIM) instead of leaving it.

    Example:
        >>> half = aclip.Pass(views=("a",), masking="uniform", mask_ratio=0.5)
    """

    views: Annotated[Names, Field(min_length=1)]
    encoder: Literal["online", "ema", "frozen"] = "online"
    masking: str = "none"
    mask_ratio: Ratio = 0.0
    masking_options: Options = Field(default_factory=dict)
    scores_from: str | None = None
    score_padding: Literal["border", "zeros"] = "border"
    resolution: Positive = 1.0
    fill: bool = False


@config_class
class TextPass:
    """One run of the text encoder over the captions.

    Attributes:
        encoder: "online" or "frozen", as of a `Pass`.
        reduction: name in `aclip.masking.TEXT_REDUCTIONS`, or "none": which of a caption's tokens are encoded.
        reduction_options: arguments of that strategy, e.g. `{"num_keep": 8}`.
        mask_ratio: fraction of a caption's tokens hidden from the encoder, in [0, 1), as in BERT (arXiv 1810.04805,
            section 3.1): 80 % replaced by a mask token, 10 % by a random one, 10 % unchanged.

    Example:
        >>> hidden = aclip.TextPass(mask_ratio=0.2)
    """

    encoder: Literal["online", "frozen"] = "online"
    reduction: str = "none"
    reduction_options: Options = Field(default_factory=dict)
    mask_ratio: Ratio = 0.0


@config_class
class ObjectiveConfig:
    """One weighted term of the loss; its key in the recipe is its name in `aclip.OBJECTIVES`.

    Attributes:
        reads: names of the passes it reads, text passes included, in the order that its class documents.
        weight: factor in the total loss.
        options: further arguments of its class (head widths, temperature).

    Example:
        >>> simclr = aclip.ObjectiveConfig(reads=("masked",), weight=0.5, options={"temperature": 0.2})
    """

    reads: Names
    weight: float = 1.0
    options: Options = Field(default_factory=dict)


@config_class
class EmaMomentum:
    """EMA momentum, a cosine from `start` to `end` over all optimizer steps (equal values: constant).

    Attributes:
        start, end: of the cosine.
        warmup: w >= 1 starts with momentum (1 + t) / (w + t) in step t until that reaches `start`, so that the average
            soon forgets its random initialisation; with w = 10 it reaches 0.996 after 2,240 steps. 0: no warm-up.

    Example:
        >>> recipe = replace(aclip.RECIPES["a-clip"], ema_momentum=aclip.EmaMomentum(start=0.99, warmup=10))
    """

    start: Fraction = 0.996
    end: Fraction = 1.0
    warmup: NonNegative = 0.0

    def __post_init__(self) -> None:
        if 0.0 < self.warmup < 1.0:
            raise ConfigError(f"the EMA momentum's warmup is 0 or at least 1, not {self.warmup}")


@config_class
class MuonConfig:
    """Muon, for the matrices inside the blocks of both towers (Jordan et al., 2024).

    Attributes:
        lr_ratio: its learning rate over AdamW's.
        momentum: Nesterov's.
        weight_decay: decoupled: a step multiplies the matrices by 1 - lr x lr_ratio x weight_decay.
    """

    lr_ratio: Positive = 20.0
    momentum: Ratio = 0.95
    weight_decay: NonNegative = 0.05


@config_class
class Optimization:
    """Optimizer and schedule; the defaults are A-CLIP's for YFCC15M at batch 4096.

    Attributes:
        optimizer: adamw; or muon, for the matrices inside the blocks of both towers, with AdamW for everything else.
        muon: its settings.
        lr: peak learning rate. end_lr: last value of the cosine. warmup_start_lr: first value of the warm-up.
        warmup_epochs: linear warm-up, at most a tenth of the run.
        weight_decay: AdamW's, on matrices only; vectors, norms, biases, positions and logit_scale have none.
        grad_clip: largest global gradient norm; 0 disables clipping.
        layer_decay: factor on the learning rate from one block of a tower to the block before it; 1 disables it.

    Example:
        >>> recipe = replace(aclip.RECIPES["clip"], optimization=aclip.Optimization(optimizer="muon", lr=1e-3))
    """

    optimizer: Literal["adamw", "muon"] = "adamw"
    lr: Positive = 5e-4
    end_lr: NonNegative = 1e-5
    warmup_epochs: NonNegative = 1.0
    warmup_start_lr: NonNegative = 1e-6
    weight_decay: NonNegative = 0.5
    betas: tuple[Ratio, Ratio] = (0.9, 0.98)
    eps: Positive = 1e-8
    grad_clip: NonNegative = 0.0
    layer_decay: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    muon: MuonConfig = MuonConfig()


@config_class
class Recipe:
    """A training method: what is seen, by which encoder, under which mask, and which losses it is trained with.

    Attributes:
        name: name in `aclip.RECIPES`.
        title: one line for lists.
        paper: where it comes from.
        views: name in `aclip.data.views.VIEWS`. view_options: arguments of that pipeline.
        passes: name -> pass, run in this order.
        objectives: name in `aclip.OBJECTIVES` -> its settings; the losses are summed with their weights.
        texts: name -> text pass; those that no objective reads are not run.
        ema_momentum: needed if a pass uses the EMA encoder.
        freeze: parameters of the model that are not trained: names, prefixes ending in ".", patterns with "*",
            `patch_embedding`, the image tower's under any name, or `towers`, all but the projections into the joint
            space.
        optimization: the settings of its paper where the recipe says so, else A-CLIP's.

    Example:
        >>> recipe = aclip.Recipe(
        ...     name="half", title="a random half", paper="my own", views="one_crop",
        ...     passes={"masked": aclip.Pass(views=("a",), masking="uniform", mask_ratio=0.5)},
        ...     objectives={"contrastive": aclip.ObjectiveConfig(reads=("masked", "captions"))})
        >>> run = aclip.train(recipe=recipe, model="vit-micro", data="pairs.csv", epochs=1, output="runs/half")
    """

    name: str
    title: str
    paper: str
    views: str
    passes: dict[str, Pass]
    objectives: dict[str, ObjectiveConfig] = Field(min_length=1)
    view_options: Options = Field(default_factory=dict)
    ema_momentum: EmaMomentum | None = None
    texts: dict[str, TextPass] = Field(default_factory=lambda: {"captions": TextPass()})
    freeze: Names = ()
    optimization: Optimization = Optimization()

    def __post_init__(self) -> None:
        earlier: list[str] = []
        for name, p in self.passes.items():
            if p.scores_from is not None and p.scores_from not in earlier:
                raise ConfigError(f"recipe '{self.name}', pass '{name}': scores_from must name an earlier pass; "
                                  f"{unknown_name('pass', p.scores_from, earlier)}")
            if p.encoder == "ema" and self.ema_momentum is None:
                raise ConfigError(f"recipe '{self.name}': pass '{name}' uses the EMA encoder, so the recipe needs an "
                                  "ema_momentum")
            if p.encoder == "frozen" and p.fill:
                raise ConfigError(f"recipe '{self.name}': pass '{name}' is frozen, so no mask token can fill its gaps: "
                                  "leave fill at false")
            earlier.append(name)
        for name, text in self.texts.items():
            if text.encoder == "frozen" and text.mask_ratio > 0:
                raise ConfigError(f"recipe '{self.name}': text pass '{name}' is frozen, so no mask token can hide its "
                                  "words: leave mask_ratio at 0")
            if name in earlier:
                raise ConfigError(f"recipe '{self.name}': a pass and a text pass are both called '{name}'")
        known = [*earlier, *self.texts]
        for name, objective in self.objectives.items():
            for read in objective.reads:
                if read not in known:
                    raise ConfigError(f"recipe '{self.name}', objective '{name}': {unknown_name('pass', read, known)}")

    @property
    def uses_ema(self) -> bool:
        """Whether any pass runs the EMA encoder."""
        return any(p.encoder == "ema" for p in self.passes.values())

    @property
    def uses_frozen(self) -> bool:
        """Whether any pass or text pass runs the frozen encoder."""
        every: list[Pass | TextPass] = [*self.passes.values(), *self.texts.values()]
        return any(p.encoder == "frozen" for p in every)


def _split_phase(value: Any) -> Any:
    """Parse "SHARE:RESOLUTION"."""
    if not isinstance(value, str):
        return value
    share, _, resolution = value.partition(":")
    return {"share": share, "resolution": resolution}


def parse_image_size(value: Any) -> Any:
    """Return the sides in "192x256", height before width; a single side, "224", and anything else as it is."""
    return tuple(value.lower().split("x")) if isinstance(value, str) and "x" in value.lower() else value


ImageSize = Annotated[Count | tuple[Count, Count] | None, BeforeValidator(parse_image_size)]


@config_class
class ResolutionPhase:
    """Some steps on images of another size.

    Attributes:
        share: fraction of the run's optimizer steps, above 0.
        resolution: image side relative to the recipe's own, rounded to whole patches.
    """

    share: Annotated[float, Field(gt=0.0, le=1.0)]
    resolution: Positive


@config_class
class RunConfig:
    """One execution of a recipe.

    Attributes:
        recipe: the method, by its name (see `aclip recipes`) or as a `Recipe` (default: finetune if the model has
            weights, else a-clip).
        model: open_clip name, NAME:PRETRAINED, NAME:WEIGHT_FILE, a preset (vit-micro, vit-tiny, vit-small), a run, a
            folder of open_clip's or Hugging Face's CLIP, or the A-CLIP release's checkpoint.
        data: training sources, SOURCE or SOURCE=WEIGHT; several are mixed by their weights, or by their sizes.
        output: the run's folder.
        validation: sources to evaluate on, [NAME=]SOURCE.
        teacher: the model whose weights the recipe's frozen encoder has, by a name as of `model` (default: the model
            itself, as it starts).
        teacher_features: features of a teacher, stored by `aclip data encode`, in place of the teacher itself; crops,
            captions and masks are those of as many epochs as there are crops, again and again.
        hard_negatives: an index of the training data (`aclip index MODEL DATA --output INDEX`): batches are filled with
            groups of samples whose images are alike to its model (B3, arXiv 2505.11293).
        group_size: samples in such a group; divides the batch size.
        image_size: input side in pixels, or HEIGHTxWIDTH; positions are interpolated (default: the model's own).
        epochs: passes over the data; ignored if samples is set.
        samples: pairs to train on.
        batch_size: pairs per optimizer step, over all processes (default: 256, or all the data).
        lora: rank of updates of the matrices inside the blocks, which alone are trained of the model (LoRA, arXiv
            2106.09685, with alpha equal to the rank); final/ holds the sums. 0: everything is trained.
        lora_towers: image, text or both; the other stays as it is.
        unmasked_tuning: fraction of the optimizer steps, at the end, in which nothing is masked (FLIP, section 3).
        unmasked_lr: factor on the learning rate in those steps; FLIP's paper takes 0.01.
        resolution_schedule: smaller images first, as SHARE:RESOLUTION, e.g. 0.5:0.5; steps after the last phase see
            whole images.
        seed: of weights, order, crops, captions and masks.
        workers: loader processes (default: what suits the cores and the device).
        device: auto, cpu, cuda, cuda:1, mps.
        precision: of the towers' arithmetic; weights, losses and optimizer stay in fp32 (default: bf16 where the
            device multiplies in it, fp16 on older GPUs, else fp32).
        parallel: over several processes (torchrun): ddp holds everything on each, fsdp a shard.
        micro_batch: pairs whose activations a process holds at a time (default: its share of the batch); the gradient
            is that of the whole batch, at the price of a second forward pass.
        recompute: save memory: keep only the inputs of the blocks, and run them again in the backward pass.
        compile: compile the transformer blocks.
        log_every: optimizer steps between lines of metrics.jsonl.
        evaluate_every: epochs between evaluations, an epoch counting as ten steps at least; 0: only at the end.
        keep_best: a validation set's name, or SET:METRIC with a recall of retrieval (default: image_to_text_r1): the
            run's best/ is the model of the best evaluation, in the form of final/, which stays the last one.
        early_stop: end when so many evaluations in a row were no better than the best; needs keep_best. 0: never.
        save_every: epochs between checkpoints, counted alike; 0: only at the end.
        keep_checkpoints: how many of the newest checkpoints to keep.
        keep_every: also keep every N-th checkpoint for good; 0 keeps none.
        max_skipped: steps in a row that may be skipped for a non-finite loss or gradient before the run stops.
        loggers: where metrics also go, in the run's folder: tensorboard, wandb, mlflow.

    Example:
        >>> config = aclip.RunConfig(recipe=aclip.RECIPES["clip"], model="vit-micro", data="pairs.csv",
        ...                          output="runs/clip", epochs=1)
        >>> run = aclip.train(config)
    """

    recipe: Recipe
    model: str
    data: Names
    output: str
    validation: Names = ()
    teacher: str | None = None
    teacher_features: str | None = None
    hard_negatives: str | None = None
    group_size: Annotated[int, Field(ge=2)] = 4
    image_size: ImageSize = None
    epochs: Positive = 25.0
    samples: Count | None = None
    batch_size: Annotated[int, Field(ge=2)] | None = None
    lora: Natural = 0
    lora_towers: Annotated[tuple[Tower, ...], Field(min_length=1)] = ("image", "text")
    unmasked_tuning: Fraction = 0.0
    unmasked_lr: Positive = 1.0
    resolution_schedule: tuple[Annotated[ResolutionPhase, BeforeValidator(_split_phase)], ...] = ()
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    workers: Natural | None = None
    device: str = "auto"
    precision: Precision | None = None
    parallel: Parallel = "ddp"
    micro_batch: Count | None = None
    recompute: bool = False
    compile: bool = False
    log_every: Count = 10
    evaluate_every: NonNegative = 1.0
    keep_best: str | None = None
    early_stop: Natural = 0
    save_every: NonNegative = 1.0
    keep_checkpoints: Count = 2
    keep_every: Natural = 0
    max_skipped: Natural = 5
    loggers: tuple[Sink, ...] = ()

    def __post_init__(self) -> None:
        if not self.data:
            raise ConfigError("data is missing: name a source of image-text pairs")
        if self.unmasked_lr != 1.0 and self.unmasked_tuning == 0.0:
            raise ConfigError("unmasked_lr has no effect without unmasked_tuning, the fraction of unmasked steps")
        for name in ("teacher", "teacher_features"):
            if getattr(self, name) is not None and not self.recipe.uses_frozen:
                raise ConfigError(f"{name} has no effect: recipe '{self.recipe.name}' has no frozen encoder; choose "
                                  "one that has, such as distill")
        if self.early_stop and self.keep_best is None:
            raise ConfigError("early_stop watches the metric of keep_best: add --keep-best SET, the name of a "
                              "validation set")
        total = sum(phase.share for phase in self.resolution_schedule)
        if total > 1.0 + 1e-9:
            raise ConfigError(f"the shares of a resolution schedule add up to at most 1, not {total:g}")


CHANGEABLE = ("data", "validation", "teacher_features", "workers", "device", "parallel", "micro_batch", "recompute",
              "compile", "log_every", "evaluate_every", "save_every", "keep_checkpoints", "keep_every", "loggers")
"""Settings that may change on resume: data location, hardware, logging frequency. They change results by rounding at
most."""


def to_dict(config: Any) -> dict[str, Any]:
    """Return a config as plain JSON values."""
    values: dict[str, Any] = TypeAdapter(type(config)).dump_python(config, mode="json")
    return values


def from_dict(cls: type[T], values: Mapping[str, Any], where: str = "") -> T:
    """Build a config from JSON values; the inverse of `to_dict`.

    Raises:
        ConfigError: an unknown field, with the closest that exists, or a wrong value; its message begins with `where`.
    """
    try:
        return TypeAdapter(cls).validate_python(dict(values))
    except (ValidationError, ConfigError) as error:
        found = sentence(cls, error) if isinstance(error, ValidationError) else str(error)
        raise ConfigError(f"{where}: {found}" if where else found) from None


def differences(there: Any, here: Any, ignored: Collection[str] = (), path: str = "") -> list[str]:
    """Return what differs between two configs as JSON values, field by field: "epochs is 2.0 there and 3.0 here"."""
    if isinstance(there, dict) and isinstance(here, dict):
        return [one for name in {**here, **there} if name not in ignored
                for one in differences(there.get(name), here.get(name), path=f"{path}.{name}" if path else name)]
    return [] if there == here else [f"{path} is {there} there and {here} here"]


def override(config: T, assignments: Mapping[str, Any]) -> T:
    """Return a config with some fields changed, by their paths.

    Args:
        config: a config.
        assignments: path -> value, e.g. `{"recipe.passes.masked.mask_ratio": 0.75}`; of strings, those that are JSON
            are parsed.

    Raises:
        ConfigError: a path that does not exist, with the closest that does, or a wrong value.
    """
    values = to_dict(config)
    for path, value in assignments.items():
        *parents, last = path.replace("-", "_").split(".")
        node: Any = values
        for name in parents:
            node = node[_known(name, node, path)]
        options = bool(parents) and parents[-1].endswith("options")
        key = last if options else _known(last, node, path)
        node[key] = _parsed(value)
    return from_dict(type(config), values)


def _known(name: str, node: Any, path: str) -> str:
    if not isinstance(node, dict):
        raise ConfigError(f"cannot set '{path}': nothing lies below '{path.split('.' + name)[0]}'")
    for key in (name, name.replace("_", "-")):
        if key in node:
            return key
    raise ConfigError(f"cannot set '{path}': {unknown_name('field', name, node)}")


def _parsed(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value


def sentence(cls: Any, error: ValidationError) -> str:
    """Return the first of pydantic's findings as one sentence."""
    first = error.errors(include_url=False)[0]
    where = [str(part) for part in first["loc"] if not str(part).startswith(("function-", "tuple[", "constrained-"))]
    if where and where[0].isdigit():  # a positional argument
        where[0] = fields(cls)[int(where[0])].name
    path = ".".join(where)
    if first["type"] in ("missing", "missing_argument"):
        return f"{path} is missing"
    message = first["msg"].replace("Input should", "should").replace("a valid tuple", "a list")
    return f"{path} {message}, not {repr(first['input'])[:80]}"
