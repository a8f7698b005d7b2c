"""Evaluation on held-out images: `aclip.evaluate`, a model and data in, results out.

Everything else is imported on first use, so that `evaluate` costs nothing to import.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from aclip.evaluation.base import Evaluation, Evaluator, Result

if TYPE_CHECKING:
    from aclip.evaluation.features import ImageFeatures, TextEncoder
    from aclip.evaluation.sets import EVALUATORS
    from aclip.models import LoadedModel
    from aclip.run_folder import RunFolder

    ModelLike = str | Path | LoadedModel
    Words = str | tuple[str, ...]
else:  # what the command line parses
    ModelLike, Words = str, tuple[str, ...]

__all__ = ["EVALUATORS", "Evaluation", "Evaluator", "ImageFeatures", "Result", "TextEncoder", "evaluate"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module("aclip.evaluation.sets"), name)
    raise AttributeError(f"module 'aclip.evaluation' has no attribute '{name}'")


def evaluate(
    model: ModelLike, *, data: Words, evaluators: Words | None = None, train: str | None = None,
    protocol: str = "distinct", templates: Words | None = None, classes: str | None = None,
    keep: tuple[float, ...] = (), keep_by: tuple[str, ...] = ("attentive", "uniform"), block_size: int = 1,
    weights: Literal["online", "ema"] = "online", output: str | None = None, device: str = "auto",
    workers: int | None = None,
) -> list[Result]:
    """Measure a model on held-out images: retrieval, zero-shot classification, calibration, probes.

    Prints the metrics; those of a run are also added to its evaluations.jsonl and report. Under torchrun the ranks
    share the work, and each returns all results.

    Args:
        model: a run's folder, any model that training starts from (NAME:TAG, NAME:FILE, a folder), or a loaded model.
        data: [NAME=]SOURCE of held-out images, of every kind that training takes.
        evaluators: retrieval, zero_shot, calibration, linear_probe, knn, or your own in EVALUATORS; default: retrieval
            if the model has text, with train also linear_probe and knn.
        train: [NAME=]SOURCE of labelled images that linear_probe and knn are fitted on.
        protocol: candidates of retrieval: distinct, all, karpathy (first five captions), karpathy-1k (folds of 1,000).
        templates: zero-shot prompts with {} for the class name, a file with one a line, or openai, simple or the name
            of a published set.
        classes: zero-shot classes: a file with one name a line, with LABEL<TAB>NAME lines or with JSON; or imagenet,
            imagenet-subset or the name of a published set; default: the labels of the set, else its captions.
        keep: fractions of patches to keep; measures again on images masked so, e.g. 1 0.75 0.5 0.25.
        keep_by: how keep chooses patches: attentive, attentive-half (scored at half size), uniform.
        block_size: side of the blocks that keep keeps or removes, in patches.
        weights: of a run: the trained model, or its image tower's moving average (ema).
        output: folder for numbers and report of a model that is no run.
        device: auto, cpu, cuda, cuda:1, mps; auto leaves a loaded model where it is.
        workers: processes that read images; default: what suits the cores and the device.

    Returns:
        One `Result` a metric.

    Raises:
        ConfigError: an argument that makes no sense.
        AclipError: the model or data cannot be read or used.

    Example:
        >>> for result in aclip.evaluate("runs/first", data="held-out.csv"):
        ...     print(result.set, result.metric, f"{result.value:.1%}")
    """
    from rich.console import Console

    from aclip.data import suitable_workers
    from aclip.devices import choose_device
    from aclip.dist import joined
    from aclip.errors import ConfigError
    from aclip.evaluation import sharding
    from aclip.evaluation.features import MaskedEncoder, check_masking
    from aclip.evaluation.sets import build_evaluators, evaluate_sets, open_sets, select_for_model
    from aclip.models import load
    from aclip.report.run import write_report

    with joined(device) as device_name, sharding.sharded():
        if not data:
            raise ConfigError("--data names no set to measure on, or the model is missing: aclip evaluate MODEL --data "
                              "SOURCE")
        check_masking(keep, keep_by, block_size)
        names = (evaluators,) if isinstance(evaluators, str) else evaluators
        instances = build_evaluators(names, with_training=train is not None, protocol=protocol, templates=templates,
                                     classes=classes)
        console = Console(highlight=False, quiet=sharding.rank() > 0)
        with sharding.raise_on_all_ranks():
            folder = _open_journal(str(model) if isinstance(model, str | Path) else None, output)
            journal = folder.path / "evaluations.jsonl" if folder is not None else None
            size = journal.stat().st_size if journal is not None and journal.exists() else 0
            if isinstance(model, str | Path):
                loaded, chosen = load(model, weights=weights), choose_device(device_name)
            else:
                loaded, chosen = model, model.device if device_name == "auto" else choose_device(device_name)
            instances = select_for_model(instances, loaded, by_default=names is None)
            loaded = loaded.to(chosen)
            sets = open_sets((data,) if isinstance(data, str) else data)
            training = open_sets([train])[0] if train is not None else None
        masked = [MaskedEncoder(loaded, fraction, way, block_size) for fraction in keep
                  for way in (keep_by if fraction < 1.0 else keep_by[:1])]  # 1 leaves nothing to choose
        try:
            return evaluate_sets(
                loaded, sets, instances, folder, console, device=chosen, workers=suitable_workers(chosen, workers),
                weights=weights, step=loaded.step or 0, samples_seen=loaded.samples_seen or 0, training=training,
                masked=masked)
        finally:
            if journal is not None and sharding.rank() == 0 and journal.exists() and journal.stat().st_size > size:
                report = write_report(journal.parent)
                console.print(f"added to {journal} and to {report}", markup=False, soft_wrap=True)


def _open_journal(model: str | None, output: str | None) -> RunFolder | None:
    """Return where the numbers go, if anywhere."""
    from aclip.errors import ConfigError
    from aclip.evaluation import sharding
    from aclip.run_folder import RunFolder, command_line

    run = RunFolder(Path(model or ""))
    if model and run.exists() and (run.final.is_dir() or run.checkpoints.is_dir()):
        if output is not None:
            raise ConfigError(f"{model} is a run, and its numbers go into its own folder: leave --output out")
        return run
    if output is None:
        return None
    folder, recipe = RunFolder(Path(output)), {"name": model or "a loaded model"}
    if folder.exists() and folder.read_json("config.json").get("recipe") != recipe:
        raise ConfigError(f"--output {output} has the config.json of something else than an evaluation of "
                          f"{recipe['name']}: choose another folder")
    if sharding.rank() == 0:
        folder.write_json("config.json", {"recipe": recipe, "command": command_line()})
    return folder
