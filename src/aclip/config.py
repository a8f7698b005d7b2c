"""Recipes as data, and how the command line changes any field of a frozen dataclass.

A recipe says which views are drawn, which encoder sees them in which order and under which mask, and
which objectives read the result. It is validated when it is built; it holds no code.
"""

import dataclasses
import json
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from aclip.errors import ConfigError, unknown_name


@dataclass(frozen=True)
class Pass:
    """One run of an image encoder over some views.

    Attributes:
        name: how objectives and later passes refer to it.
        views: names of views of the recipe's view pipeline; all go through in one batch.
        encoder: "online" (trained) or "ema" (its moving average, no gradient).
        masking: name in `aclip.MASKING`.
        mask_ratio: fraction of patches removed, in [0, 1).
        masking_options: further arguments of the strategy, e.g. `{"block_size": 2, "keep": "lowest"}`.
        scores_from: name of an earlier pass whose CLS attention ranks this pass's patches.
        score_padding: what lies outside the scored box: "border" clamps, "zeros" as the release does.
        resolution: image side relative to the model's own, rounded to whole patches.
        fill: removed patches stay in the sequence as a learned mask token (SimMIM) instead of leaving it.
        score_layers: scores that others take from this pass are averaged over so many of its first layers; None is all
            of them, as in the paper. A pass of which nothing else is read stops there.
        refresh: epochs for which a sample's scores serve before they are computed anew; 1 computes them in every step,
            as in the paper. Only for a pass of which nothing else is read; it then sees whole pictures.
    """

    name: str
    views: tuple[str, ...]
    encoder: Literal["online", "ema"] = "online"
    masking: str = "none"
    mask_ratio: float = 0.0
    masking_options: Mapping[str, Any] = field(default_factory=dict)
    scores_from: str | None = None
    score_padding: Literal["border", "zeros"] = "border"
    resolution: float = 1.0
    fill: bool = False
    score_layers: int | None = None
    refresh: int = 1

    def __post_init__(self) -> None:
        if self.refresh < 1:
            raise ConfigError(f"pass '{self.name}': refresh counts the epochs for which scores serve, at least 1, not "
                              f"{self.refresh}")
        if self.score_layers is not None and self.score_layers < 1:
            raise ConfigError(f"pass '{self.name}': score_layers counts the first layers that scores come from, at "
                              f"least 1, not {self.score_layers}")
        if not self.views:
            raise ConfigError(f"pass '{self.name}' encodes no view: name at least one")
        if not 0.0 <= self.mask_ratio < 1.0:
            raise ConfigError(f"pass '{self.name}': mask_ratio is the fraction removed, 0 <= ratio < 1, "
                              f"not {self.mask_ratio}")
        if self.resolution <= 0.0:
            raise ConfigError(f"pass '{self.name}': resolution must be positive, not {self.resolution}")


@dataclass(frozen=True)
class TextPass:
    """One run of the text encoder over the captions.

    Attributes:
        name: how objectives refer to it.
        reduction: name in `aclip.masking.TEXT_REDUCTIONS`, or "none": which of a caption's tokens are encoded.
        reduction_options: arguments of that strategy, e.g. `{"num_keep": 8}`.
        mask_ratio: fraction of a caption's tokens that are hidden from the encoder, in [0, 1), as BERT hides them
            (arXiv 1810.04805, section 3.1): 80 % behind a mask token, 10 % behind a random one, 10 % left as they are.
    """

    name: str = "captions"
    reduction: str = "none"
    reduction_options: Mapping[str, Any] = field(default_factory=dict)
    mask_ratio: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.mask_ratio < 1.0:
            raise ConfigError(f"text pass '{self.name}': mask_ratio is the fraction hidden, 0 <= ratio < 1, "
                              f"not {self.mask_ratio}")


@dataclass(frozen=True)
class ObjectiveConfig:
    """One weighted term of the loss.

    Attributes:
        name: name in `aclip.OBJECTIVES`, and in the logs.
        reads: names of the passes it reads, text passes included, in the order that its class documents.
        weight: factor in the total loss.
        options: further arguments of its class (head widths, temperature).
    """

    name: str
    reads: tuple[str, ...]
    weight: float = 1.0
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class EmaMomentum:
    """EMA momentum, a cosine from `start` to `end` over all optimizer steps (equal values: constant).

    Attributes:
        start, end: of the cosine.
        warmup: w > 0 begins with the momentum (1 + t) / (w + t) in step t until that reaches `start`, so that the
            average soon leaves the random weights it began with and remembers about the last t / w steps. With w = 10
            it reaches 0.996 after 2,240 steps. 0: the cosine from the first step on.
    """

    start: float = 0.996
    end: float = 1.0
    warmup: float = 0.0

    def __post_init__(self) -> None:
        if self.warmup != 0 and not 1 <= self.warmup < math.inf:
            raise ConfigError(f"the warm-up of the EMA momentum is 0 or a number from 1, not {self.warmup}")
        if not (0.0 <= self.start <= 1.0 and 0.0 <= self.end <= 1.0):
            raise ConfigError(f"the EMA momentum lies between 0 and 1, not {self.start} -> {self.end}")


@dataclass(frozen=True)
class Optimization:
    """AdamW and its schedule; the defaults are A-CLIP's for YFCC15M at batch 4096.

    Attributes:
        lr: peak learning rate. end_lr: last value of the cosine. warmup_start_lr: first value.
        warmup_epochs: linear warm-up, at most a tenth of a run shorter than ten epochs.
        weight_decay: on matrices only; vectors, norms, biases, positions and logit_scale have none.
        grad_clip: largest global gradient norm; 0 means none.
        layer_decay: factor on the learning rate from a block of a tower to the one before it; 1 means none.
    """

    lr: float = 5e-4
    end_lr: float = 1e-5
    warmup_epochs: float = 1.0
    warmup_start_lr: float = 1e-6
    weight_decay: float = 0.5
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-8
    grad_clip: float = 0.0
    layer_decay: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 < self.layer_decay <= 1.0:
            raise ConfigError(f"layer_decay lies above 0 and is at most 1, not {self.layer_decay}")
        for name in ("lr", "eps"):
            if not getattr(self, name) > 0.0:
                raise ConfigError(f"{name} must be positive, not {getattr(self, name)}")
        for name in ("end_lr", "warmup_epochs", "warmup_start_lr", "weight_decay", "grad_clip"):
            if not getattr(self, name) >= 0.0:
                raise ConfigError(f"{name} must not be negative, but is {getattr(self, name)}")
        if not all(0.0 <= beta < 1.0 for beta in self.betas):
            raise ConfigError(f"betas lie in [0, 1), not {self.betas}")


@dataclass(frozen=True)
class Recipe:
    """A training method: what is seen, by whom, under which mask, and what is asked of it.

    Attributes:
        name: name in `aclip.RECIPES`.
        title: one line for lists.
        paper: where it comes from.
        views: name in `aclip.data.views.VIEWS`. view_options: arguments of that pipeline.
        passes: run in this order. objectives: summed with their weights.
        texts: the text passes; those that no objective reads are not run.
        ema_momentum: needed if a pass uses the EMA encoder.
        freeze: parameters of the model that are not trained: names, prefixes ending in ".", patterns with "*", or
            `patch_embedding`, the image tower's whatever it is called.
        optimization: the settings of its paper where the recipe says so, else A-CLIP's; `aclip compare --lr` gives all
            recipes the same choice of learning rates.
    """

    name: str
    title: str
    paper: str
    views: str
    passes: tuple[Pass, ...]
    objectives: tuple[ObjectiveConfig, ...]
    view_options: Mapping[str, Any] = field(default_factory=dict)
    ema_momentum: EmaMomentum | None = None
    texts: tuple[TextPass, ...] = (TextPass(),)
    freeze: tuple[str, ...] = ()
    optimization: Optimization = Optimization()

    def __post_init__(self) -> None:
        earlier: dict[str, Pass | TextPass] = {}
        for p in self.passes:
            if p.name in earlier:
                raise ConfigError(f"recipe '{self.name}': two passes are called '{p.name}'")
            if p.scores_from is not None and p.scores_from not in earlier:
                raise ConfigError(f"recipe '{self.name}', pass '{p.name}': scores must come from an earlier "
                                  f"pass; {unknown_name('pass', p.scores_from, earlier)}")
            if p.encoder == "ema" and self.ema_momentum is None:
                raise ConfigError(f"recipe '{self.name}': pass '{p.name}' uses the EMA encoder, "
                                  "so the recipe needs an ema_momentum")
            earlier[p.name] = p
        for text in self.texts:
            if text.name in earlier:
                raise ConfigError(f"recipe '{self.name}': two passes are called '{text.name}'")
            earlier[text.name] = text
        if not self.objectives:
            raise ConfigError(f"recipe '{self.name}' has no objective")
        names = [o.name for o in self.objectives]
        for o in self.objectives:
            if names.count(o.name) > 1:
                raise ConfigError(f"recipe '{self.name}': two objectives are called '{o.name}'")
            for read in o.reads:
                if read not in earlier:
                    raise ConfigError(f"recipe '{self.name}', objective '{o.name}': "
                                      f"{unknown_name('pass', read, earlier)}")

    @property
    def uses_ema(self) -> bool:
        """Whether any pass runs the EMA encoder."""
        return any(p.encoder == "ema" for p in self.passes)


def to_dict(config: Any) -> Any:
    """Return `config` (a dataclass) as plain JSON values."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {f.name: to_dict(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, Mapping):
        return {key: to_dict(value) for key, value in config.items()}
    if isinstance(config, list | tuple):
        return [to_dict(value) for value in config]
    return config


def from_dict(cls: type[Any], values: Any, where: str = "") -> Any:
    """Build a dataclass `cls` from JSON values; the inverse of `to_dict`.

    Raises:
        ConfigError: an unknown field (with the closest known one), or a value of the wrong type.
    """
    return _convert(cls, values, where or cls.__name__)


def override(config: Any, assignments: list[str]) -> Any:
    """Return `config` with `path=value` assignments applied, e.g. `recipe.passes.masked.mask_ratio=0.75`.

    Paths follow fields; members of a tuple of named dataclasses are addressed by their name, options by
    their key. Values are JSON where they parse as JSON, else strings.

    Raises:
        ConfigError: a path that does not exist (with the closest that does), or a value of the wrong type.
    """
    for assignment in assignments:
        path, separator, text = assignment.partition("=")
        if not separator:
            raise ConfigError(f"cannot set '{assignment}': write FIELD=VALUE, e.g. seed=1")
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            value = text
        config = _assign(config, path.split("."), value, path)
    return config


def _assign(config: Any, path: list[str], value: Any, full_path: str) -> Any:
    head, rest = path[0], path[1:]
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        hints = typing.get_type_hints(type(config))
        if head not in hints:
            raise ConfigError(f"cannot set '{full_path}': {unknown_name('field', head, hints)}")
        current = getattr(config, head)
        new = _assign(current, rest, value, full_path) if rest else _convert(hints[head], value, full_path)
        return dataclasses.replace(config, **{head: new})
    if isinstance(config, tuple) and all(hasattr(item, "name") for item in config):
        names = [item.name for item in config]
        if head not in names:
            raise ConfigError(f"cannot set '{full_path}': {unknown_name('name', head, names)}")
        if not rest:
            raise ConfigError(f"cannot set '{full_path}': name one of its fields")
        return tuple(_assign(i, rest, value, full_path) if i.name == head else i for i in config)
    if isinstance(config, Mapping):
        if rest:
            raise ConfigError(f"cannot set '{full_path}': options are one level deep")
        return {**config, head: tuple(value) if isinstance(value, list) else value}
    raise ConfigError(f"cannot set '{full_path}': there is nothing below '{type(config).__name__}' "
                      f"to reach '{head}'")


def _convert(hint: Any, value: Any, where: str) -> Any:
    """Check and convert a JSON value to the annotated type `hint`."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        errors = []
        for choice in arguments:
            if choice is not type(None):
                try:
                    return _convert(choice, value, where)
                except ConfigError as error:
                    errors.append(error)
        raise errors[0]
    if origin is Literal:
        if value not in arguments:
            raise ConfigError(unknown_name(f"value for {where}", str(value), map(str, arguments)))
        return value
    if origin is tuple and isinstance(value, list | tuple):
        items = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else list(arguments)
        if len(items) != len(value):
            raise ConfigError(f"{where} takes {len(items)} values, not {len(value)}")
        return tuple(_convert(item, v, where) for item, v in zip(items, value, strict=True))
    if origin is not None and issubclass(origin, Mapping) and isinstance(value, Mapping):
        return {k: tuple(v) if isinstance(v, list) else v for k, v in value.items()}
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if isinstance(value, hint):
            return value
        if isinstance(value, Mapping):
            hints = typing.get_type_hints(hint)
            for key in value:
                if key not in hints:
                    raise ConfigError(f"{where}: {unknown_name('field', str(key), hints)}")
            try:
                return hint(**{k: _convert(hints[k], v, f"{where}.{k}") for k, v in value.items()})
            except TypeError as error:
                raise ConfigError(f"{where}: {error}") from error
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(hint, type) and isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise ConfigError(f"{where} takes {getattr(hint, '__name__', hint)}, not {value!r}")
