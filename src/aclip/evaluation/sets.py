"""Evaluating a model on named sets: encoded once a space, measured by every evaluator, printed and journalled."""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import Progress

from aclip import data
from aclip.errors import AclipError, BadSampleError, ConfigError, DataError, UnsupportedModelError, unknown_name
from aclip.evaluation import sharding
from aclip.evaluation.base import Evaluation, Evaluator, Result
from aclip.evaluation.features import ImageFeatures, MaskedEncoder, Space, TextEncoder, encode_image_set
from aclip.evaluation.probes import LinearProbe, NearestNeighbours, Probe
from aclip.evaluation.retrieval import Retrieval
from aclip.evaluation.zero_shot import Calibration, ZeroShot, find_classes, find_templates
from aclip.files import as_file_name, write_atomically
from aclip.models import LoadedModel
from aclip.report.journals import at_start
from aclip.report.tables import change, is_fraction
from aclip.run_folder import RunFolder

MeasureFunction = Callable[[ImageFeatures, TextEncoder], Mapping[str, Any]]
"""The shortest evaluator: encoded images and the model's text encoder -> metrics by name."""

EVALUATORS: dict[str, type[Evaluator] | MeasureFunction] = {
    "retrieval": Retrieval, "zero_shot": ZeroShot, "calibration": Calibration, "linear_probe": LinearProbe,
    "knn": NearestNeighbours,
}
"""All evaluators by name; add your own: a subclass of `Evaluator`, or a function of (images, texts) -> metrics.

Example:
    >>> list(aclip.EVALUATORS)
    ['retrieval', 'zero_shot', 'calibration', 'linear_probe', 'knn']
"""

BATCH_SIZE = 256

CAPTIONS_CHECKED = 32
"""Samples of a set whose captions `check_sets` reads."""



@dataclass(frozen=True)
class FunctionEvaluator(Evaluator):
    """A `MeasureFunction`, by its name in `EVALUATORS`."""

    name: str
    function: MeasureFunction

    def measure(self, images: ImageFeatures, texts: TextEncoder) -> Mapping[str, Any]:
        return self.function(images, texts)


class HeldOut(NamedTuple):
    """A named source to evaluate on."""

    name: str
    source: data.Source


def build_evaluators(
    names: Sequence[str] | None = None, *, with_training: bool = False, protocol: str = "distinct",
    templates: Sequence[str] | str | None = None, classes: str | None = None,
) -> list[Evaluator]:
    """Return evaluators with their options, before anything is loaded; see `aclip.evaluate`."""
    if names is None:
        names = ["retrieval", *(["linear_probe", "knn"] if with_training else [])]
    prompts: dict[str, Any] = {"templates": find_templates(templates)} if templates else {}
    if classes is not None:
        prompts["classes"] = find_classes(classes)
    built: list[Evaluator] = []
    for name in names:
        entry = find_evaluator(name)
        if not isinstance(entry, type):
            built.append(FunctionEvaluator(name, entry))
            continue
        built.append(entry(**{"protocol": protocol} if issubclass(entry, Retrieval) else
                           prompts if issubclass(entry, ZeroShot) else {}))
        if not hasattr(entry, "name"):
            built[-1].name = name
    for kind, given, what in ((Probe, with_training, "--train is for probes: add linear_probe or knn"),
                              (ZeroShot, prompts, "--templates and --classes are for zero-shot: add zero_shot"),
                              (Retrieval, protocol != "distinct", "--protocol is for retrieval: add retrieval")):
        if given and not any(isinstance(evaluator, kind) for evaluator in built):
            raise ConfigError(f"{what} to --evaluators")
    probes = [evaluator.name for evaluator in built if isinstance(evaluator, Probe)]
    if probes and not with_training:
        raise ConfigError(f"{probes[0]} learns from labelled images: name them with --train, as in "
                          "--data cifar10:test --train cifar10:train")
    return built


def find_evaluator(name: str) -> type[Evaluator] | MeasureFunction:
    """Return an entry of `EVALUATORS`, or raise a `ConfigError`."""
    if name not in EVALUATORS:
        raise ConfigError(unknown_name("evaluator", name, EVALUATORS))
    return EVALUATORS[name]


def is_probe(name: str) -> bool:
    """Return whether an evaluator learns from labelled images."""
    entry = find_evaluator(name)
    return isinstance(entry, type) and issubclass(entry, Probe)


def select_for_model(evaluators: list[Evaluator], model: LoadedModel, *, by_default: bool) -> list[Evaluator]:
    """Return the evaluators that a model can do; raise an `UnsupportedModelError` for one that was asked for."""
    left = [evaluator for evaluator in evaluators if model.has_text or evaluator.space != "joint"]
    if not left or (len(left) < len(evaluators) and not by_default):
        joint = [evaluator.name for evaluator in evaluators if evaluator not in left]
        raise UnsupportedModelError(
            f"{model.name} has an image tower only, which {' and '.join(joint)} cannot compare with text: give "
            "labelled images with --train, and --evaluators linear_probe knn")
    return left


def open_sets(specs: Sequence[str]) -> list[HeldOut]:
    """Open `[NAME=]SOURCE` specifications, by default named `set_name`; two of one name are a `ConfigError`."""
    sets = [HeldOut(name or set_name(spec), data.open_source(spec)) for name, spec in map(data.split_name, specs)]
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
    """Raise a `DataError` if the samples looked at of a set that retrieval is to be evaluated on have no caption."""
    for held in sets:
        looked_at = range(0, len(held.source), -(-len(held.source) // CAPTIONS_CHECKED) or 1)
        problem = "it is empty"
        for index in looked_at:
            try:
                data.clean_captions(held.source.captions(index))
                break
            except BadSampleError as error:
                problem = error.reason
        else:
            raise DataError(f"held-out set '{held.name}' has no usable caption among the {len(looked_at)} samples "
                            f"looked at ({problem}): give a set with captions, or leave --validation out")


def evaluate_sets(
    model: LoadedModel, sets: Sequence[HeldOut], evaluators: Sequence[Evaluator], folder: RunFolder | None,
    console: Console, *, step: int, samples_seen: int, device: torch.device, workers: int, weights: str = "online",
    training: HeldOut | None = None, masked: Sequence[MaskedEncoder] = (),
) -> list[Result]:
    """Run evaluators on sets, print their metrics, and journal them if there is a run folder.

    A set that fails does not keep the others from being evaluated; its `AclipError` is raised at the end. Inside
    `sharding.sharded` all ranks share the work and return the same, and rank 0 journals; otherwise one rank calls this.

    The model is on `device`. Probes are fitted on `training` first. Records go to `evaluations.jsonl`, with the model's
    step, samples and weights, and what the report shows with them to `examples/` and `details/`; those of `masked`,
    encoders of the same model to measure as well, go to `robustness.jsonl`.
    """
    encode = partial(_encode_set, console=console, device=device, workers=workers)
    tokenizer = data.CaptionTokenizer(model.tokenizer) if model.has_text else None  # bounds the time of long captions
    texts = TextEncoder(model, device, tokenizer=tokenizer)
    if training is not None:
        with sharding.as_aclip_errors():
            images = encode(model, training, "trunk", "label")
            with console.status(f"fitting probes on {len(images):,} images"):
                evaluators = [one.fit(images) if isinstance(one, Probe) else one for one in evaluators]
    named: data.Target = "caption" if any(evaluator.needs_captions for evaluator in evaluators) else "either"

    def measure(held: HeldOut, encoder: LoadedModel) -> Iterator[Result]:
        encoded: dict[Space, ImageFeatures] = {}
        for evaluator in evaluators:
            space = evaluator.space
            if space not in encoded:
                encoded[space] = encode(encoder, held, space, named if space == "joint" else "label")
            found = evaluator.evaluate(encoded[space], texts)
            masking = encoder.to_record() if isinstance(encoder, MaskedEncoder) else {}
            name = f"{held.name}, {evaluator.variant}" if evaluator.variant else held.name
            fitted = {"training_set": training.name, "settings": dict(found.settings)} if (
                training and isinstance(evaluator, Probe)) else {}
            record = {"step": step, "samples_seen": samples_seen, "weights": weights, "evaluator": found.evaluator,
                      "set": name, "metrics": dict(found.metrics), "chance": dict(found.chance),
                      "counts": dict(found.counts), **fitted, **masking}
            start = at_start(folder.records("evaluations"), record) if folder and not masking else {}
            console.print(_sentence(held.name, evaluator, found, masking, start), markup=False, soft_wrap=True)
            with sharding.raise_on_all_ranks():
                if folder is not None and sharding.rank() == 0:
                    _write(folder, record, found)
            for metric, value in found.metrics.items():
                yield Result(name, found.evaluator, metric, value, masking.get("keep"), masking.get("kept_by"))

    results: list[Result] = []
    failed: dict[str, AclipError] = {}
    for held in sets:
        try:
            with sharding.as_aclip_errors():
                for encoder in (model, *masked):
                    results += measure(held, encoder)
        except AclipError as error:
            failed[held.name] = error
    for name, problem in failed.items():
        raise type(problem)(f"set '{name}': {problem}" if len(sets) > 1 else str(problem)) from problem
    return results


def name_skipped(bad: Sequence[tuple[str, str]], most: int = 5) -> str:
    """Return the sentence that counts bad samples and names the first few with their reasons."""
    shown = "; ".join(f"{key} ({reason})" for key, reason in bad[:most])
    more = f" and {len(bad) - most:,} more" if len(bad) > most else ""
    return f"skipped {len(bad):,} bad sample{'' if len(bad) == 1 else 's'}: {shown}{more}"


def _encode_set(
    model: LoadedModel, held: HeldOut, space: Space, target: data.Target, *, console: Console, device: torch.device,
    workers: int,
) -> ImageFeatures:
    """Encode the images of a set under a progress bar, and name those that were skipped."""
    images = data.EvaluationSet(held.source, model.preprocess, batch_size=BATCH_SIZE, workers=workers, target=target,
                                share=(sharding.rank(), sharding.world_size()))
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(f"encoding {held.name}", total=len(images))
        encoded = encode_image_set(model, images, device, space=space, progress=partial(progress.advance, task))
    if encoded.skipped and not isinstance(model, MaskedEncoder):
        console.print(f"{held.name}: {name_skipped(encoded.skipped)}", markup=False, soft_wrap=True)
    return encoded


def _write(folder: RunFolder, record: dict[str, Any], found: Evaluation) -> None:
    """Write a record to the journals, those of masked images apart from others, and what the report shows with it."""
    if "keep" in record:
        folder.append("robustness", record)
        return
    folder.append("evaluations", record)
    file = as_file_name(record["set"])
    if found.examples:  # an evaluator without any must not erase those of another
        write_atomically(folder.path / "examples" / f"{file}.json",
                         json.dumps(found.examples, ensure_ascii=False, indent=1))
    if found.details:
        details = {key: record[key] for key in ("set", "evaluator", "weights", "step")} | dict(found.details)
        write_atomically(folder.path / "details" / f"{file}-{found.evaluator}.json",
                         json.dumps(details, ensure_ascii=False))


def _sentence(
    set_name: str, evaluator: Evaluator, found: Evaluation, masking: dict[str, Any], start: Mapping[str, float]
) -> str:
    def write(key: str, value: float) -> str:
        fraction = is_fraction(key)
        return f"{key} {value:{'.1%' if fraction else '.4g'}}{change(value, start.get(key), fraction)}"

    metrics = "  ".join(write(key, value) for key, value in found.metrics.items())
    counts = ", ".join(f"{value:,} {key.replace('_', ' ').replace('picture', 'image')}"
                       for key, value in found.counts.items() if value)
    settings = "".join(f"; {key} {value:g}" for key, value in found.settings.items())
    settings += "; in brackets the change since the start" if start else ""
    part = ", {num_keep} of {num_patches} patches, {kept_by}".format_map(masking) if masking else ""
    name = f"{evaluator.name} {evaluator.variant}".strip()
    return f"{set_name} {name}{part} ({counts}{settings}): {metrics}"
