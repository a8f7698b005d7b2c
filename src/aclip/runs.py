"""Runs: `aclip.train` from its arguments to the finished model; the training itself is `aclip.trainer`."""

import logging
import os
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from aclip import data, dist, models
from aclip.config import CHANGEABLE, RunConfig, differences, to_dict
from aclip.describe import dataflow_table, describe_run, plain_text
from aclip.devices import choose_device, versions
from aclip.errors import AclipError, BadSampleError, ConfigError, DataError, unknown_name
from aclip.evaluation import Result, evaluate
from aclip.evaluation.retrieval import RECALLS, Retrieval
from aclip.evaluation.sets import HeldOut, check_sets, evaluate_sets, name_skipped, open_sets
from aclip.exporters import open_clip
from aclip.files import atomic_file
from aclip.recipes import configure
from aclip.report.journals import PRIMARY
from aclip.report.page import percent
from aclip.report.run import write_report
from aclip.report.snapshots import take_snapshot
from aclip.rng import generator
from aclip.run_folder import RunFolder, command_line
from aclip.search.clusters import cluster_samples
from aclip.trainer import Trainer, build_trainer, fit, open_batches, open_stored
from aclip.training.journal import TrainingProgress, write_peak_memory
from aclip.training.sinks import Sinks

SNAPSHOT_IMAGES = 8

_log = logging.getLogger(__name__)


def train(config: RunConfig | None = None, *, resume: bool | str = False, **settings: Any) -> "Run":
    """Train a recipe on image-text pairs, evaluate it, and write model and report to the run's folder.

    Under torchrun all processes call it, and train what one process with the whole batch would.

    Args:
        config: the run, or None to build it from `settings`.
        resume: True continues the run in the output folder exactly where it was saved, if there is one; a folder
            continues that run.
        settings: arguments of `aclip.configure`: fields of `RunConfig`, lr, weight_decay, mask_ratio, ... On resume
            what is not given stays as it was.

    Raises:
        ConfigError: a setting that does not exist or cannot work.
        DataError: data that cannot be used.
        TrainingError: the loss stays non-finite, or a step does not fit into memory.
        Interrupted: after SIGINT, SIGTERM or SIGUSR1, with a checkpoint saved.

    Example:
        >>> run = aclip.train(recipe="a-clip", model="vit-micro", data="pairs.csv", epochs=1, output="runs/mine")
        >>> run = aclip.train(resume="runs/mine")
    """
    named = config is not None or settings.get("recipe") is not None
    config, resumed = _prepare(config, resume, settings)
    config = replace(config, data=tuple(map(data.absolute, config.data)),
                     validation=tuple(map(data.absolute, config.validation)))
    with dist.joined(config.device) as device:
        config, resumed = dist.collect((config, resumed))[0]
        if dist.rank() == 0 and not (resumed or named) and config.recipe.name == "finetune":
            _log.info("'%s' comes with weights, so the recipe is finetune, which keeps what they know; for another: "
                      "--recipe", config.model)
        _train(config, resumed, choose_device(device))
    return Run(config.output)


class Run:
    """A run's folder.

    Attributes:
        folder: its path; `report.html` shows it, `final/` is the model for open_clip, `best/` the same at the best
            evaluation (`keep_best`).

    Example:
        >>> run = aclip.Run("runs/first")
        >>> run.config.recipe.name, run.metrics[-1]["loss"] < 20
        ('a-clip', True)
        >>> features = run.model.encode_texts(["a cat"])
        >>> results = run.evaluate(data="held-out.csv")
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    @cached_property
    def model(self) -> models.LoadedModel:
        """The trained model, see `aclip.load`."""
        return models.load(str(self.folder))

    @property
    def config(self) -> RunConfig:
        """The configuration, with all defaults resolved."""
        return RunFolder(self.folder).config()

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The records of metrics.jsonl."""
        return RunFolder(self.folder).records("metrics")

    def to_json(self) -> dict[str, Any]:
        """Return where the results are, the last record of metrics.jsonl, and the evaluations' metrics by set."""
        journal = RunFolder(self.folder)
        return {"folder": self.folder, "model": journal.final, "report": self.folder / "report.html",
                "last": self.metrics[-1] if self.metrics else None,
                "evaluations": {one["set"]: one["metrics"] for one in journal.records("evaluations")}}

    def evaluate(self, **options: Any) -> list[Result]:
        """Evaluate the trained model; arguments as of `aclip.evaluate`."""
        return evaluate(str(self.folder), **options)


def _prepare(config: RunConfig | None, resume: bool | str, settings: dict[str, Any]) -> tuple[RunConfig, bool]:
    """Return the configuration, and whether its folder holds a run to continue."""
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0  # torchrun, after a process died
    output = resume if isinstance(resume, str) else settings.get("output")
    if config is None and output is None:
        if resume and not settings.get("data"):
            raise ConfigError("which run is to be resumed? Name its folder, as in --resume runs/first")
        config = configure(**settings)
    folder = RunFolder(Path(config.output if config else str(output)))
    if not (resume or restarted) or not folder.exists():
        if isinstance(resume, str):
            parent = RunFolder(folder.path.parent)
            raise ConfigError(f"{folder.path} holds no run to resume: it has no config.json"
                              + (f"; {parent.path} has one" if parent.exists() else ""))
        folder.check_free()  # before the ranks meet
        return config or configure(**settings), False
    saved = replace(folder.config(), output=str(folder.path))  # it may have moved
    wanted = config or configure(base=saved, **{**settings, "output": saved.output})
    unset = [name for name in ("batch_size", "precision") if getattr(wanted, name) is None]  # resolved at the start
    changed = differences(to_dict(saved), to_dict(wanted), {*CHANGEABLE, *unset})
    if changed:
        others = ", ".join("--" + name.replace("_", "-") for name in CHANGEABLE)
        raise ConfigError(f"the run in {folder.path} was started with other settings ({'; '.join(changed)}): on resume "
                          f"only these may change: {others}; to start a new run from its weights, use --model "
                          f"{folder.path} and another --output")
    return replace(wanted, batch_size=saved.batch_size, precision=saved.precision), True


def _train(config: RunConfig, resumed: bool, device: torch.device) -> None:
    """Train from the start or the newest checkpoint; on every rank. Rank 0 evaluates, writes and prints."""
    console, folder = Console(highlight=False, quiet=dist.rank() > 0), RunFolder(Path(config.output))
    with _explained("if its data has moved, add --data", DataError, resumed):
        source = data.open_training(config.data)
    if len(set(dist.collect(source.digest()))) > 1:
        raise DataError("the ranks opened different data: check that all machines see the same files")
    for advice in source.advice() if dist.rank() == 0 else ():
        _log.warning("%s", advice)
    _check_frozen(config)
    held_out = open_sets(config.validation)
    check_sets(held_out)
    watched = _watched(config, held_out)
    with _explained("if a script registered it, resume from that script by "
                    f"aclip.train(resume={config.output!r})", ConfigError, resumed):
        trainer = build_trainer(config, len(source), device, open_stored(config, source))
    if watched and not trainer.method.plan.uses_text:
        raise ConfigError(f"--keep-best watches retrieval, and recipe '{config.recipe.name}' trains no text tower")
    clusters = _clusters(config, source, folder, resumed)
    method, table, workers = trainer.method, trainer.timetable, data.suitable_workers(device, config.workers)
    flow = dataflow_table(method.plan, config.model, text_tokens=14)
    sizes = {held.name: len(held.source) for held in held_out}
    # a model that has learned already is measured before its first step, for the change since then
    trainer.evaluation_due = bool(held_out and method.plan.uses_text and models.resolve_source(config.model).read)
    if resumed:
        _check_same_data(folder, config, len(source), sizes)
        trainer.resume(folder)
        if dist.rank() == 0:
            _note_changes(folder, trainer.config, sizes, trainer.step)
    elif dist.rank() == 0:
        folder.create()
        if clusters is not None:
            with atomic_file(folder.clusters) as file:
                np.save(file, clusters)
        folder.write_json("config.json", to_dict(trainer.config) | {
            "num_pairs": len(source), "held_out_pairs": sizes, "command": command_line(),
            "dataflow": plain_text(flow), "versions": versions(device)})
    describe_run(console, trainer, flow, len(source))
    if method.frequencies is not None and trainer.step == 0:
        method.frequencies.copy_(data.token_frequencies(
            source, trainer.tokenizer, method.plan.shape.vocab_size, seed=config.seed))
    model = models.LoadedModel(trainer.wrapped.whole.model, trainer.tokenizer)
    shown = _sample_images(held_out[0].source if held_out else source, config.seed)

    def look(step: int) -> None:
        """Keep an image of what the model attends to; all ranks call it."""
        trainer.wrapped.refresh()
        if shown and dist.rank() == 0:
            images, captions = zip(*shown, strict=True)
            tokens = trainer.tokenizer(list(captions)) if method.plan.uses_text else None
            take_snapshot(trainer.wrapped.whole, images, captions, step, folder.snapshots, tokens)

    def evaluate(step: int) -> float | None:
        """Measure the validation sets, on rank 0, and keep the model if it is the best so far."""
        look(step)
        if not method.plan.uses_text or dist.rank() > 0:
            return None
        results = evaluate_sets(model, held_out, (Retrieval(),), folder, console, step=step,
                                samples_seen=trainer.samples_seen, device=device, workers=workers)
        value = next((result.value for result in results if (result.set, result.metric) == watched), None)
        if value is not None and trainer.improves(value):
            _save(trainer, model, folder.best)
        return value

    if trainer.step == 0 and not trainer.evaluation_due:
        look(0)
    if trainer.evaluation_due or (trainer.step < table.total_steps and not trainer.stops_early):
        progress = TrainingProgress(console, table.total_steps, trainer.step)
        with closing(Sinks(config, folder.path, trainer.step)) as sinks, progress:
            fit(trainer, open_batches(trainer, source, workers, clusters), folder, progress, evaluate, sinks)
        if dist.rank() == 0:
            write_peak_memory(folder, device)
    trainer.wrapped.refresh()
    if dist.rank() == 0:
        _finish(trainer, model, folder, console)


def _clusters(config: RunConfig, source: data.Source, folder: RunFolder, resumed: bool) -> np.ndarray | None:
    """Return the clusters of the samples: a new run's of its index, by rank 0, a resumed run's from its folder."""
    if config.hard_negatives is None:
        return None
    found: np.ndarray | None = None
    if dist.rank() == 0 and not resumed:
        found = cluster_samples(config.hard_negatives, source, config.seed)
    elif dist.rank() == 0:
        try:
            found = np.load(folder.clusters)
        except (OSError, ValueError) as error:
            raise ConfigError(f"the run cannot be resumed: the clusters of its samples, {folder.clusters}, cannot be "
                              f"read ({error}); put the file back, or start a new run") from error
    shared: np.ndarray = dist.collect(found)[0]
    return shared


def _check_frozen(config: RunConfig) -> None:
    """Refuse to hold a model to random weights."""
    name = config.teacher or config.model
    if config.teacher_features is None and config.recipe.uses_frozen and models.resolve_source(name).read is None:
        raise ConfigError(f"recipe '{config.recipe.name}' holds the model to frozen weights, and '{name}' is an "
                          "architecture without any: name weights by --model or --teacher, such as a run or NAME:TAG, "
                          "or choose another recipe")


def _watched(config: RunConfig, held_out: list[HeldOut]) -> tuple[str, str] | None:
    """Return set and metric of `keep_best`, which may be named after their colon or not."""
    if config.keep_best is None:
        return None
    names = [held.name for held in held_out]
    name, metric = config.keep_best, PRIMARY["retrieval"]
    if name not in names:
        name, _, metric = config.keep_best.rpartition(":")
    if name not in names:
        raise ConfigError(f"--keep-best {config.keep_best}: {unknown_name('validation set', name or metric, names)}")
    if metric not in RECALLS:
        raise ConfigError(f"--keep-best {config.keep_best}: {unknown_name('metric', metric, RECALLS)}")
    return name, metric


@contextmanager
def _explained(hint: str, kind: type[AclipError], resumed: bool) -> Iterator[None]:
    """Say of an error that keeps a run from being resumed what helps."""
    try:
        yield
    except kind as error:
        if not resumed:
            raise
        raise type(error)(f"the run cannot be resumed: {error}; {hint}") from error


def _check_same_data(folder: RunFolder, config: RunConfig, num_pairs: int, sizes: dict[str, int]) -> None:
    """Refuse to resume on pairs that have grown, shrunk or are mixed otherwise: their order would be another."""
    before = folder.read_json("config.json")
    known = before.get("held_out_pairs", {})
    for what, then, now in (("the data", before.get("num_pairs"), num_pairs),
                            *((f"held-out set '{name}'", known.get(name), size) for name, size in sizes.items())):
        if then not in (None, now):
            raise ConfigError(f"{what} of {folder.path} had {then:,} pairs when the run was started and has {now:,} "
                              "now: put it back to resume, or start a new run")
    if data.weights_of(folder.config().data) != data.weights_of(config.data):
        raise ConfigError(f"--data names other sources or weights than the run in {folder.path} was started with: on "
                          "resume the same sources may lie elsewhere, with the same weights")


def _note_changes(folder: RunFolder, config: RunConfig, sizes: dict[str, int], step: int) -> None:
    """Write changed settings to `config.json`, and the old ones to its `changes`."""
    saved, now = to_dict(folder.config()), to_dict(config)
    old = {name: saved[name] for name in CHANGEABLE if saved[name] != now[name]}
    if old:
        written = folder.read_json("config.json")
        folder.write_json("config.json", written | now | {
            "held_out_pairs": written.get("held_out_pairs", {}) | sizes,
            "changes": [*written.get("changes", []), {"step": step, "before": old}]})


def _sample_images(source: data.Source, seed: int) -> list[tuple[Any, str]]:
    found: list[tuple[Any, str]] = []
    for index in generator(seed, "snapshot").permutation(len(source))[: 8 * SNAPSHOT_IMAGES].tolist():
        with suppress(BadSampleError):
            raw = source.read(index)
            found.append((data.decode_image(raw.image), data.clean_captions(raw.captions)[0]))
        if len(found) == SNAPSHOT_IMAGES:
            break
    return found


def _finish(trainer: Trainer, model: models.LoadedModel, folder: RunFolder, console: Console) -> None:
    """Save the model, name what was skipped, write the report, and say where the results are."""
    _save(trainer, model, folder.final)
    best = trainer.best
    if best is not None:
        stopped = f"stopped early at step {trainer.step}: " if trainer.stops_early else ""
        console.print(f"{stopped}{trainer.config.keep_best} was best at step {best.step}, {percent(best.value)}; "
                      f"model: {folder.best}", markup=False, soft_wrap=True)
    bad = [(record["key"], record["reason"]) for record in folder.records("skipped")]
    if bad:
        console.print(f"{name_skipped(bad)}; all in {folder.path}/skipped.jsonl", markup=False, soft_wrap=True)
    report = write_report(folder.path)
    console.print(f"done. model: {folder.final}  report: {report}", markup=False, soft_wrap=True)


def _save(trainer: Trainer, model: models.LoadedModel, folder: Path) -> None:
    """Write the model as it is now, for open_clip."""
    config = trainer.config
    open_clip.save(
        model.model, models.model_config(config.model, image_size=config.image_size),
        models.preprocess_config(model.model), model.tokenizer, folder,
        step=trainer.step, samples_seen=trainer.samples_seen)
