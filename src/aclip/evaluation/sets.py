"""Evaluating a model on named sets: encoded once a space, measured by every evaluator, printed and journalled."""

import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from aclip import data
from aclip.errors import AclipError, BadSampleError, ConfigError, DataError, UnsupportedModelError, unknown_name
from aclip.evaluation import sharding
from aclip.evaluation.base import Evaluation, Evaluator, FunctionEvaluator, MeasureFunction
from aclip.evaluation.features import MAX_THUMBNAILS, ImageFeatures, MaskedEncoder, Space, TextEncoder, encode_image_set
from aclip.evaluation.probes import LinearProbe, NearestNeighbours, Probe
from aclip.evaluation.result import Result
from aclip.evaluation.retrieval import Retrieval
from aclip.evaluation.zero_shot import Calibration, ZeroShot, find_classes, find_templates
from aclip.files import as_file_name, write_atomically
from aclip.models import LoadedModel
from aclip.run_folder import RunFolder

EVALUATORS: dict[str, type[Evaluator] | MeasureFunction] = {
    "retrieval": Retrieval, "zero_shot": ZeroShot, "calibration": Calibration, "linear_probe": LinearProbe,
    "knn": NearestNeighbours,
}
"""All evaluators by name; add your own: a subclass of `Evaluator`, or a function of (images, texts) -> metrics."""

BATCH_SIZE = 256

CAPTIONS_CHECKED = 32
"""Samples of a set whose captions `check_sets` reads."""

_FRACTION = re.compile(r"(_r|top)\d+$|(^|_)(accuracy|mean_per_class|ece|confidence)$")  # shown in percent


@dataclass(frozen=True)
class HeldOut:
    """A named source to evaluate on."""

    name: str
    source: data.Source


def build_evaluators(
    names: Sequence[str] | None = None, *, with_training: bool = False, protocol: str = "distinct",
    templates: Sequence[str] | str | None = None, classes: str | None = None,
) -> list[Evaluator]:
    """Return evaluators with their options, before anything is loaded; see `aclip.evaluate`.

    Raises:
        ConfigError: an unknown name or value, an option without its evaluator, a probe without training images, or
            training images without a probe.
    """
    if names is None:
        names = ["retrieval", *(["linear_probe", "knn"] if with_training else [])]
    prompts: dict[str, Any] = {"templates": find_templates(templates)} if templates else {}
    if classes is not None:
        prompts["classes"] = find_classes(classes)
    built: list[Evaluator] = []
    for name in names:
        entry = find_evaluator(name)
        if isinstance(entry, type):
            options = {"protocol": protocol} if issubclass(entry, Retrieval) else (
                prompts if issubclass(entry, ZeroShot | Calibration) else {})
            built.append(entry(**options))
            if not hasattr(built[-1], "name"):
                built[-1].name = name
        else:
            built.append(FunctionEvaluator(name, entry))
    probes = [evaluator.name for evaluator in built if isinstance(evaluator, Probe)]
    if probes and not with_training:
        raise ConfigError(f"{probes[0]} learns from labelled images: name them with --train, as in "
                          "--data cifar10:test --train cifar10:train")
    if with_training and not probes:
        raise ConfigError(f"--train is for probes, and {', '.join(names)} is none: add linear_probe or knn to "
                          "--evaluators")
    if prompts and not any(isinstance(evaluator, ZeroShot | Calibration) for evaluator in built):
        raise ConfigError("--templates and --classes are for zero-shot classification: add --evaluators zero_shot")
    if protocol != "distinct" and not any(isinstance(evaluator, Retrieval) for evaluator in built):
        raise ConfigError("--protocol is for retrieval: add retrieval to --evaluators")
    return built


def find_evaluator(name: str) -> type[Evaluator] | MeasureFunction:
    """Return an entry of `EVALUATORS`.

    Raises:
        ConfigError: there is none of this name.
    """
    if name not in EVALUATORS:
        raise ConfigError(unknown_name("evaluator", name, EVALUATORS))
    return EVALUATORS[name]


def is_probe(name: str) -> bool:
    """Return whether an evaluator learns from labelled images."""
    entry = find_evaluator(name)
    return isinstance(entry, type) and issubclass(entry, Probe)


def select_for_model(evaluators: list[Evaluator], model: LoadedModel, *, by_default: bool) -> list[Evaluator]:
    """Return the evaluators that a model can do: without text only probes, of those chosen by default.

    Raises:
        UnsupportedModelError: one that was asked for needs text, or none is left.
    """
    if model.has_text:
        return evaluators
    joint = [evaluator.name for evaluator in evaluators if evaluator.space == "joint"]
    left = [evaluator for evaluator in evaluators if evaluator.space != "joint"]
    if (joint and not by_default) or not left:
        raise UnsupportedModelError(
            f"{getattr(model, 'name', 'this model')} has an image tower only, which {' and '.join(joint)} cannot "
            "compare with text: give labelled images with --train, and --evaluators linear_probe knn")
    return left


def open_sets(specs: Sequence[str]) -> list[HeldOut]:
    """Open `[NAME=]SOURCE` specifications; without a name a set is called `set_name` of its source.

    Raises:
        ConfigError: two sets of one name.
        AclipError: a source cannot be opened.
    """
    sets = [HeldOut(*_open(spec)) for spec in specs]
    duplicates = [name for name, count in Counter(held.name for held in sets).items() if count > 1]
    if duplicates:
        raise ConfigError(f"two held-out sets are called '{duplicates[0]}': name them apart, as in NAME=SOURCE")
    return sets


def set_name(spec: str) -> str:
    """Return the last word of a source; a slice of it is a set of its own.

    >>> set_name("emoji:val"), set_name("emoji:val[:60]"), set_name("lists/val.csv?images=d/images")
    ('val', 'val[0:60]', 'val')
    """
    source, slices = re.fullmatch(r"(.*?)((?:\[[^\[\]]*:[^\[\]]*\])*)", spec, re.DOTALL).groups()  # type: ignore[union-attr]
    return Path(source.partition("?")[0].rpartition(":")[2]).stem + slices.replace("[:", "[0:")


def check_sets(sets: Sequence[HeldOut]) -> None:
    """Look at a few captions of each set, before a training starts that evaluates retrieval on it.

    Raises:
        DataError: a set without any usable caption.
    """
    for held in sets:
        looked_at = range(0, len(held.source), -(-len(held.source) // CAPTIONS_CHECKED) or 1)
        problems = [problem for i in looked_at if (problem := _caption_problem(held.source, i)) is not None]
        if len(problems) == len(looked_at):
            raise DataError(f"held-out set '{held.name}' has no usable caption among the {len(looked_at)} samples "
                            f"looked at ({problems[0] if problems else 'it is empty'}): give a set with captions, or "
                            "leave --validation out")


def evaluate_sets(
    model: LoadedModel, sets: Sequence[HeldOut], evaluators: Sequence[Evaluator], folder: RunFolder | None,
    console: Console, *, step: int, samples_seen: int, device: torch.device, workers: int, weights: str = "online",
    training: HeldOut | None = None, masked: Sequence[MaskedEncoder] = (),
) -> list[Result]:
    """Run evaluators on sets, print their metrics, and journal them if there is a run folder.

    A set that fails does not keep the others from being evaluated; its error is raised at the end. Inside
    `sharding.sharded` all ranks share the work and return the same, and rank 0 journals; otherwise one rank calls this.

    Args:
        model: on `device`; not changed.
        sets: see `open_sets`.
        evaluators: instances; probes are fitted on `training` first.
        folder: where `evaluations.jsonl`, `examples/` and `details/` are written.
        console: where metrics are printed.
        step: optimizer steps done by the weights. samples_seen: pairs seen by them.
        device: where the model runs.
        workers: processes that read images.
        weights: "online" or "ema", for the journal.
        training: labelled images for probes.
        masked: encoders of the same model to measure as well; their records go to `robustness.jsonl`.

    Raises:
        AclipError: something cannot be read, encoded, measured or written, or memory ran out.
    """
    encode = partial(_encode_set, console=console, device=device, workers=workers)
    journal = partial(_journal, folder, step=step, samples_seen=samples_seen, weights=weights,
                      training_set=training.name if training is not None else None)
    tokenizer = data.CaptionTokenizer(model.tokenizer) if model.has_text else None  # bounds the time of long captions
    texts = TextEncoder(model, device, tokenizer=tokenizer)
    if training is not None:
        with sharding.as_aclip_errors():
            evaluators = _fit_probes(evaluators, encode(model, training, "trunk", "label"), console)
    named: data.Target = "caption" if any(evaluator.needs_captions for evaluator in evaluators) else "either"
    results: list[Result] = []
    failed: dict[str, AclipError] = {}
    for held in sets:
        try:
            with sharding.as_aclip_errors():
                for encoder in (model, *masked):
                    encoded: dict[Space, ImageFeatures] = {}
                    for evaluator in evaluators:
                        space = evaluator.space
                        if space not in encoded:
                            encoded[space] = encode(encoder, held, space, named if space == "joint" else "label")
                        found = evaluator.evaluate(encoded[space], texts)
                        masking = _masking(encoder) if isinstance(encoder, MaskedEncoder) else None
                        console.print(_sentence(held.name, evaluator, found, masking), markup=False, soft_wrap=True)
                        results += journal(held.name, evaluator, found, masking)
        except AclipError as error:
            failed[held.name] = error
    for name, problem in failed.items():
        raise type(problem)(f"set '{name}': {problem}" if len(sets) > 1 else str(problem)) from problem
    return results


def name_skipped(bad: Sequence[tuple[str, str]], most: int = 5) -> str:
    """Return the sentence that counts bad samples and names the first few with their reasons."""
    shown = "; ".join(f"{key} ({reason})" for key, reason in bad[:most])
    return f"skipped {len(bad)} bad samples: {shown}" + (f" and {len(bad) - most} more" if len(bad) > most else "")


def _open(spec: str) -> tuple[str, data.Source]:
    name, rest = data.split_name(spec)
    return name or set_name(rest), data.open_source(rest)


def _caption_problem(source: data.Source, index: int) -> str | None:
    """Return why a sample has no usable caption, or None if it has one."""
    try:
        captions: Callable[[int], Sequence[str]] | None = getattr(source, "captions", None)
        data.clean_captions(captions(index) if captions is not None else source.read(index).captions)
    except BadSampleError as error:
        return error.reason
    return None


def _encode_set(
    model: LoadedModel, held: HeldOut, space: Space, target: data.Target, *, console: Console, device: torch.device,
    workers: int,
) -> ImageFeatures:
    """Encode the images of a set under a progress bar, and name those that were skipped."""
    images = data.EvaluationSet(held.source, model.preprocess, batch_size=BATCH_SIZE, workers=workers, target=target,
                                share=(sharding.rank(), sharding.world_size()))
    masked = isinstance(model, MaskedEncoder)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(f"encoding {held.name}", total=len(images))
        encoded = encode_image_set(  # examples with thumbnails are of retrieval on whole images
            model, images, device, space=space, progress=partial(progress.advance, task),
            max_thumbnails=MAX_THUMBNAILS if space == "joint" and not masked else 0)
    if encoded.skipped and not masked:
        console.print(f"{held.name}: {name_skipped(encoded.skipped)}", markup=False, soft_wrap=True)
    return encoded


def _fit_probes(evaluators: Sequence[Evaluator], training: ImageFeatures, console: Console) -> list[Evaluator]:
    fitted = []
    for evaluator in evaluators:
        with console.status(f"fitting {evaluator.name} on {len(training):,} images"):
            fitted.append(evaluator.fit(training) if isinstance(evaluator, Probe) else evaluator)
    return fitted


def _journal(
    folder: RunFolder | None, set_name: str, evaluator: Evaluator, found: Evaluation, masking: dict[str, Any] | None,
    *, training_set: str | None, **about: Any,
) -> list[Result]:
    """Write a result to the run folder, those on masked images apart from others; return it as rows."""
    name = f"{set_name}, {evaluator.variant}" if evaluator.variant else set_name
    learned_from = training_set if isinstance(evaluator, Probe) else None
    record = found.to_record(set_name=name, training_set=learned_from, **about)
    with sharding.raise_on_all_ranks():
        if folder is not None and sharding.rank() == 0:
            _write(folder, record, found, masking)
    part = {} if masking is None else {"keep": masking["keep"], "kept_by": masking["kept_by"]}
    return [Result(name, found.evaluator, metric, value, **part) for metric, value in found.metrics.items()]


def _write(folder: RunFolder, record: dict[str, Any], found: Evaluation, masking: dict[str, Any] | None) -> None:
    if masking is not None:
        folder.append("robustness", record | masking)
        return
    folder.append("evaluations", record)
    file = as_file_name(record["set"])
    if found.examples:  # an evaluator without any must not erase those of another
        examples = [asdict(example) for example in found.examples]
        write_atomically(folder.path / "examples" / f"{file}.json",
                         json.dumps(examples, ensure_ascii=False, indent=1))
    if found.details:
        details = {key: record[key] for key in ("set", "evaluator", "weights", "step")} | dict(found.details)
        write_atomically(folder.path / "details" / f"{file}-{found.evaluator}.json",
                         json.dumps(details, ensure_ascii=False))


def _sentence(set_name: str, evaluator: Evaluator, found: Evaluation, masking: dict[str, Any] | None) -> str:
    metrics = "  ".join(f"{key} {value:.1%}" if _FRACTION.search(key) else f"{key} {value:.4g}"
                        for key, value in found.metrics.items())
    counts = ", ".join(f"{value:,} {key.replace('_', ' ').replace('picture', 'image')}"
                       for key, value in found.counts.items() if value)
    settings = "".join(f"; {key} {value:g}" for key, value in found.settings.items())
    part = ", {num_keep} of {num_patches} patches, {kept_by}".format_map(masking) if masking is not None else ""
    name = f"{evaluator.name} {evaluator.variant}".strip()
    return f"{set_name} {name}{part} ({counts}{settings}): {metrics}"


def _masking(masked: MaskedEncoder) -> dict[str, Any]:
    num_keep, num_patches, rate = masked.throughput()
    return {"keep": masked.keep, "kept_by": masked.kept_by, "num_keep": num_keep, "num_patches": num_patches,
            "block_size": masked.block_size, "pictures_per_second": rate}
