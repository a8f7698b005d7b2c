"""Putting evaluation together: sets are encoded once a space, measured by every evaluator, printed and journalled."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from aclip import data, models
from aclip.evaluation import (
    Evaluation,
    Evaluator,
    MaskedEncoder,
    PictureFeatures,
    Probe,
    TextEncoder,
    encode_pictures,
    together,
    write_details,
    write_examples,
)
from aclip.evaluation.features import THUMBNAILS
from aclip.evaluation.interface import Space
from aclip.run_folder import RunFolder

COLUMNS = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())


@dataclass(frozen=True)
class HeldOut:
    """A named source to evaluate on."""

    name: str
    source: data.Source


@dataclass(frozen=True)
class Masked:
    """Shares of the patches at which everything is measured again, and the ways in which they are chosen."""

    shares: tuple[float, ...] = ()
    ways: tuple[str, ...] = ()
    block_size: int = 1

    def encoders(self, model: models.LoadedModel) -> Iterator[MaskedEncoder]:
        """Yield the model once for every share and way; a share of 1 only once, for nothing is chosen there."""
        for share in self.shares:
            for way in self.ways if share < 1.0 else self.ways[:1]:
                yield MaskedEncoder(model, share, way, self.block_size)


@dataclass(frozen=True)
class Journal:
    """Where the numbers of an evaluation go, and what is known about the weights.

    Attributes:
        folder: a run's, or None.
        step, samples_seen, weights, training_set: see `Evaluation.to_record`.
    """

    folder: RunFolder | None
    step: int
    samples_seen: int
    weights: str = "online"
    training_set: str | None = None

    def note(self, held: HeldOut, evaluator: Evaluator, result: Evaluation, masking: dict[str, Any] | None) -> None:
        """Add a result; one on masked pictures goes to `robustness.jsonl`, apart from all others."""
        if self.folder is None or together.rank() != 0:
            return
        name = f"{held.name}, {evaluator.variant}" if evaluator.variant else held.name
        record = result.to_record(
            set_name=name, weights=self.weights, step=self.step, samples_seen=self.samples_seen,
            training_set=self.training_set if isinstance(evaluator, Probe) else None)
        if masking is not None:
            self.folder.append("robustness", record | masking)
            return
        self.folder.append("evaluations", record)
        write_examples(self.folder.path, name, result.examples)
        write_details(self.folder.path, record, result.details)


def evaluate_sets(
    encoder: models.LoadedModel, held_out: Sequence[HeldOut], evaluators: Sequence[Evaluator],
    folder: RunFolder | None, console: Console, *, step: int, samples_seen: int, device: torch.device, workers: int,
    weights: str = "online", training: HeldOut | None = None, masked: Masked = Masked(),
) -> None:
    """Run evaluators on held-out sets, print their numbers, and journal them where there is a run folder.

    Probes first learn from `training`, which is there where they are among the evaluators; on whole pictures, also
    where they are then measured on masked ones.
    """
    encode = partial(encode_set, console=console, device=device, workers=workers)
    if training is not None:
        evaluators = learned(evaluators, encode(encoder, training, "trunk", "label"), console)
    named: data.Target = "caption" if any(evaluator.needs_captions for evaluator in evaluators) else "either"
    target: dict[Space, data.Target] = {"joint": named, "trunk": "label"}
    journal = Journal(folder, step, samples_seen, weights, training.name if training is not None else None)
    texts = TextEncoder(encoder, device)
    for held in held_out:
        encoders: list[models.LoadedModel | MaskedEncoder] = [encoder, *masked.encoders(encoder)]
        for model in encoders:
            encoded: dict[Space, PictureFeatures] = {}
            for evaluator in evaluators:
                if evaluator.space not in encoded:
                    encoded[evaluator.space] = encode(model, held, evaluator.space, target[evaluator.space])
                result = evaluator.measure(texts, encoded[evaluator.space])
                masking = _masking(model) if isinstance(model, MaskedEncoder) else None
                console.print(_sentence(held, evaluator, result, masking), markup=False, soft_wrap=True)
                journal.note(held, evaluator, result, masking)


def encode_set(
    encoder: models.LoadedModel | MaskedEncoder, held: HeldOut, space: Space, target: data.Target, *,
    console: Console, device: torch.device, workers: int,
) -> PictureFeatures:
    """Encode the pictures of a set under a progress bar, and name those that were skipped."""
    pictures = data.EvaluationSet(held.source, encoder.preprocess, batch_size=256, workers=workers,
                                  target=target, share=(together.rank(), together.world_size()))
    masked = isinstance(encoder, MaskedEncoder)
    with Progress(*COLUMNS, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(f"encoding {held.name}", total=len(pictures))
        encoded = encode_pictures(
            encoder, pictures, device, space=space, progress=partial(progress.advance, task),
            thumbnails=THUMBNAILS if space == "joint" and not masked else 0)  # the rest is shown in numbers alone
    if encoded.skipped and not masked:
        console.print(f"{held.name}: {name_skipped(encoded.skipped)}", markup=False, soft_wrap=True)
    return encoded


def learned(evaluators: Sequence[Evaluator], training: PictureFeatures, console: Console) -> list[Evaluator]:
    """Return the evaluators with the probes among them fitted."""
    fitted = []
    for evaluator in evaluators:
        with console.status(f"fitting {evaluator.name} on {training.size:,} pictures"):
            fitted.append(evaluator.learn(training) if isinstance(evaluator, Probe) else evaluator)
    return fitted


def name_skipped(bad: Sequence[tuple[str, str]], most: int = 5) -> str:
    """Return the sentence that counts bad samples and names the first few, with the reasons."""
    shown = "; ".join(f"{key} ({reason})" for key, reason in bad[:most])
    return f"skipped {len(bad)} bad samples: {shown}" + (f" and {len(bad) - most} more" if len(bad) > most else "")


def _sentence(held: HeldOut, evaluator: Evaluator, result: Evaluation, masking: dict[str, Any] | None) -> str:
    numbers = "  ".join(f"{key} {value:g}" if "rank" in key or key == "nll" else f"{key} {value:.1%}"
                        for key, value in result.metrics.items())
    counts = ", ".join(f"{value:,} {key.replace('_', ' ')}" for key, value in result.counts.items() if value)
    settings = "".join(f"; {key} {value:g}" for key, value in result.settings.items())
    part = ", {num_keep} of {num_patches} patches, {kept_by}".format_map(masking) if masking is not None else ""
    name = f"{evaluator.name} {evaluator.variant}".strip()
    return f"{held.name} {name}{part} ({counts}{settings}): {numbers}"


def _masking(masked: MaskedEncoder) -> dict[str, Any]:
    """Return what was masked, and the rate of all processes together; one that had no picture knows neither."""
    parts = together.collect((masked.num_keep, masked.num_patches, masked.pictures, masked.seconds))
    num_keep, num_patches = (max(part[i] for part in parts) for i in range(2))
    rate = sum(pictures / seconds for *_, pictures, seconds in parts if seconds)
    return {"keep": masked.keep, "kept_by": masked.kept_by, "num_keep": num_keep, "num_patches": num_patches,
            "block_size": masked.block_size, "pictures_per_second": rate or None}
