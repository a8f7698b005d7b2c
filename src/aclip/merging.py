"""`aclip.merge`: the weights of models of one shape, averaged."""

from __future__ import annotations

import copy
import functools
import operator
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from aclip.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from aclip.evaluation import Evaluator, Result
    from aclip.evaluation.sets import HeldOut
    from aclip.models import LoadedModel

    Names = Sequence[str | Path]
else:  # what the command line parses
    Names = tuple[str, ...]

ALPHAS = tuple(step / 10 for step in range(11))
"""The shares of the second model that a sweep measures."""

TOLERANCE = 1e-4
"""Largest difference of an entry of an L2-normalised feature at which two models still compute the same."""


def merge(
    models: Names, *, output: str, alpha: float | Literal["sweep"] | None = None, evaluate: Names = (),
    lose: float = 1.0, evaluator: str = "retrieval", device: str = "auto", workers: int | None = None,
) -> Path:
    """Average the weights of models of one shape, such as one before and after fine-tuning (WiSE-FT, arXiv 2109.01903).

    Two models are interpolated, (1 - alpha) A + alpha B, in every weight, so that the multiplier of similarities, whose
    logarithm is one, becomes a geometric mean. Of more models each has the same share (model soups, arXiv 2203.05482).
    Tables of integers are those of the model with the largest share. The result is a folder like a run's final/, which
    every command takes as MODEL; merge.json in it says what was merged.

    With --alpha sweep, alpha 0, 0.1, ... 1 are measured on two sets, and the alpha is taken that is best on the second
    among those that lose at most so many points of A's on the first; frontier.json and frontier.html show them all.

    Args:
        models: two models or more, each of any kind that training starts from: a run, a folder, NAME:TAG, NAME:FILE.
        output: folder to write, new or empty.
        alpha: share of the second of two models, in [0, 1], or "sweep" (default: 0.5).
        evaluate: of a sweep, two sets, [NAME=]SOURCE: what the first model is good at, and what the second has learned.
        lose: percentage points that a sweep may lose on the first set.
        evaluator: what a sweep measures: retrieval (R@1 of captions), zero_shot (top-1), or your own in EVALUATORS.
        device: auto, cpu, cuda, cuda:1, mps, for a sweep.
        workers: processes that read images; default: what suits the cores and the device.

    Returns:
        The folder.

    Raises:
        ConfigError: models of different shape, or an argument that makes no sense.
        AclipError: a model or set cannot be read or used.

    Example:
        >>> folder = aclip.merge(["runs/first", "runs/fine"], alpha=0.5, output="merged")
    """
    from rich.console import Console

    names = [str(name) for name in models]
    _check_arguments(names, Path(output), alpha, evaluate)

    from aclip import models as towers
    from aclip.exporters import open_clip
    from aclip.exporters.base import write_json
    from aclip.report.frontier import write_frontier

    loaded = [towers.load(name) for name in names]
    for other in loaded[1:]:
        check_same(loaded[0], other)
    console, result = Console(highlight=False), copy.deepcopy(loaded[0])
    states = [one.model.state_dict() for one in loaded]
    frontier: dict[str, Any] | None = None
    if alpha == "sweep":
        frontier = {"models": names, **_sweep(result, states, evaluate, evaluator, lose, device, workers, console)}
        alpha = float(frontier["alpha"])
    share = 0.5 if alpha is None else alpha
    shares = [1 - share, share] if len(names) == 2 else [1 / len(names)] * len(names)
    result.cpu().model.load_state_dict(mix(states, shares))
    folder = Path(output)
    open_clip.save(result.model, towers.model_config(names[0]), towers.preprocess_config(result.model),
                   result.tokenizer, folder)
    write_json(folder / "merge.json", {"models": names, "shares": shares})
    written = f"merged {', '.join(f'{part:.3g} x {name}' for part, name in zip(shares, names, strict=True))}: {folder}"
    if frontier is not None:
        write_json(folder / "frontier.json", frontier)
        written += f"  frontier: {write_frontier(folder / 'frontier.html', frontier)}"
    console.print(written, markup=False, soft_wrap=True)
    return folder


def mix(states: Sequence[Mapping[str, Tensor]], shares: Sequence[float]) -> dict[str, Tensor]:
    """Return the sum of share x tensor of state dicts of one shape, computed in float64.

    A state whose share is 1 comes out bit for bit. Tensors that are not floating-point are taken from the state with
    the largest share.
    """
    leading = states[max(range(len(states)), key=shares.__getitem__)]
    mixed = {}
    for name, like in leading.items():
        if not like.is_floating_point():
            mixed[name] = like.clone()
            continue
        terms = [share * state[name].double() for state, share in zip(states, shares, strict=True) if share]
        mixed[name] = functools.reduce(operator.add, terms).to(like.dtype)  # not sum: 0 + -0 is 0
    return mixed


def check_same(first: LoadedModel, other: LoadedModel) -> None:
    """Refuse, by a ConfigError, a model whose weights mean something else in the modules of the first.

    Names and shapes must agree, pixels and token ids of the same images and captions too, and the weights of `other`
    must compute the same features in a copy of the first one's modules.
    """
    import torch

    from aclip.exporters.base import CAPTIONS, synthetic_images

    def refuse(reason: str) -> ConfigError:
        return ConfigError(f"{first.name} and {other.name} cannot be merged: {reason}; merge models that were trained "
                           "from the same one")

    ours, theirs = first.model.state_dict(), other.model.state_dict()
    for name in sorted(ours.keys() ^ theirs.keys()):
        raise refuse(f"only {first.name if name in ours else other.name} has '{name}'")
    for name, tensor in ours.items():
        if tensor.shape != theirs[name].shape:
            raise refuse(f"'{name}' has shape {list(tensor.shape)} in one and {list(theirs[name].shape)} in the other")
    images, captions = synthetic_images(first.image_size), list(CAPTIONS)
    pixels, others = (torch.stack([one.preprocess(image) for image in images]) for one in (first, other))
    if not torch.equal(pixels, others):
        raise refuse("they normalise or resize images differently")
    host = copy.deepcopy(first)
    host.model.load_state_dict(theirs)
    with torch.inference_mode():
        pairs = [(host.encode_image(pixels), other.encode_image(pixels))]
        if first.has_text:
            tokens = first.tokenizer(captions)
            if not torch.equal(tokens, other.tokenizer(captions)):
                raise refuse("they split captions into other tokens")
            pairs.append((host.encode_text(tokens), other.encode_text(tokens)))
    if any((a - b).abs().max() > TOLERANCE for a, b in pairs):
        raise refuse("the weights of one compute other features in the other, which differs in its heads, activation "
                     "or pooling")


def best_alpha(points: Sequence[Mapping[str, float]], lose: float) -> float:
    """Return the alpha that is best on the new set among those that lose at most `lose` points of alpha 0's on the old.

    `points` hold "alpha" from 0 up, "old" and "new", fractions.
    """
    least = points[0]["old"] - lose / 100 - 1e-9  # rounding is no loss
    return max((point for point in points if point["old"] >= least), key=lambda point: point["new"])["alpha"]


def _check_arguments(names: list[str], output: Path, alpha: float | str | None, evaluate: Names) -> None:
    if len(names) < 2:
        raise ConfigError("merge takes two models or more, as in: aclip merge A B --output FOLDER")
    if len(names) > 2 and alpha is not None:
        raise ConfigError("--alpha is the share of the second of two models; of more, each has the same share")
    if alpha == "sweep" and (isinstance(evaluate, str) or len(evaluate) != 2):
        raise ConfigError("--alpha sweep measures on two sets: --evaluate OLD_SET NEW_SET")
    if alpha != "sweep" and evaluate:
        raise ConfigError("--evaluate is for --alpha sweep; a merged model is measured by aclip evaluate")
    if isinstance(alpha, int | float) and not 0 <= alpha <= 1:
        raise ConfigError(f"alpha is the share of the second model, from 0 to 1, not {alpha:g}")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(f"{output} exists already: choose another --output")


def _sweep(
    model: LoadedModel, states: list[dict[str, Tensor]], specs: Names, evaluator: str, lose: float, device: str,
    workers: int | None, console: Any,
) -> dict[str, Any]:
    """Measure every alpha, printing a line each, with its weights in `model`; return the frontier as JSON values."""
    from rich.console import Console

    from aclip.data import suitable_workers
    from aclip.devices import choose_device
    from aclip.evaluation.sets import EVALUATORS, build_evaluators, evaluate_sets, is_probe, open_sets, select_for_model
    from aclip.report.journals import PRIMARY

    if is_probe(evaluator):
        raise ConfigError(f"a sweep cannot fit {evaluator}: choose another --evaluator, such as "
                          f"{', '.join(name for name in EVALUATORS if not is_probe(name))}")
    instances: list[Evaluator] = select_for_model(build_evaluators([evaluator]), model, by_default=False)
    sets: list[HeldOut] = open_sets([str(spec) for spec in specs])
    chosen, metric = choose_device(device), PRIMARY.get(evaluator)
    old, new = (held.name for held in sets)
    width = max(len(old), len(new), 8)
    points: list[dict[str, float]] = []
    for alpha in ALPHAS:
        model.cpu().model.load_state_dict(mix(states, (1 - alpha, alpha)))
        shown = console if alpha == 0 else Console(quiet=True)  # counts and skipped images are the same each time
        results: list[Result] = evaluate_sets(model.to(chosen), sets, instances, None, shown, step=0, samples_seen=0,
                                              device=chosen, workers=suitable_workers(chosen, workers))
        metric = metric or results[0].metric
        value = {result.set: result.value for result in results if result.metric == metric}
        if alpha == 0:
            console.print(f"alpha  {old:>{width}}  {new:>{width}}  ({metric})", markup=False)
        console.print(f"{alpha:5.1f}  {value[old]:>{width}.1%}  {value[new]:>{width}.1%}", markup=False)
        points.append({"alpha": alpha, "old": value[old], "new": value[new]})
    alpha = best_alpha(points, lose)
    end = next(point for point in points if point["alpha"] == alpha)
    console.print(f"alpha {alpha:g} is best on {new} among those that lose at most {lose:g} points on {old}: "
                  f"{100 * (end['old'] - points[0]['old']):+.1f} points on {old}, "
                  f"{100 * (end['new'] - points[0]['new']):+.1f} on {new}", markup=False, soft_wrap=True)
    return {"sets": [old, new], "evaluator": evaluator, "metric": metric, "lose": lose, "alpha": alpha,
            "points": points}
