"""What an evaluator is, and what it returns."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from aclip.data import EvaluationSet
from aclip.evaluation.features import ImageFeatures, Space, TextEncoder, encode_image_set
from aclip.models import LoadedModel


@dataclass(frozen=True)
class Example:
    """An image shown in the report.

    Attributes:
        kind: "best" (right, by the widest margin) or "worst" (true caption ranked last).
        key: name of the image. caption: its true caption.
        rank: of the true caption, from 1.
        similarity: cosine with the true caption.
        top: {"caption", "similarity"} of the most similar captions, best first.
        thumbnail: PNG, base64 encoded.
    """

    kind: str
    key: str
    caption: str
    rank: int
    similarity: float
    top: tuple[dict[str, Any], ...]
    thumbnail: str


@dataclass(frozen=True)
class Evaluation:
    """What an evaluator found on a set.

    Attributes:
        evaluator: its name.
        metrics: name -> value; recalls and accuracies are fractions in [0, 1].
        chance: name -> expected value of that metric for a random order, where it has one.
        counts: name -> number of images, captions, classes, skipped images.
        examples: images shown in the report.
        settings: name -> what a probe was fitted with.
        details: plain JSON values that the report draws.
    """

    evaluator: str
    metrics: Mapping[str, float]
    chance: Mapping[str, float] = field(default_factory=dict)
    counts: Mapping[str, int] = field(default_factory=dict)
    examples: tuple[Example, ...] = ()
    settings: Mapping[str, float] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)

    def to_record(
        self, *, set_name: str, weights: str, step: int, samples_seen: int, training_set: str | None = None
    ) -> dict[str, Any]:
        """Return a line of `evaluations.jsonl`: everything but examples and details, as plain JSON values.

        Args:
            set_name: of the evaluation set. weights: "online" or "ema".
            step: optimizer steps done. samples_seen: pairs seen over all ranks.
            training_set: of a probe.
        """
        fitted = {} if training_set is None else {"training_set": training_set, "settings": dict(self.settings)}
        return {"step": step, "samples_seen": samples_seen, "weights": weights, "evaluator": self.evaluator,
                "set": set_name, "metrics": dict(self.metrics), "chance": dict(self.chance),
                "counts": dict(self.counts), **fitted}


class Evaluator(ABC):
    """Measures one ability of a model; subclasses implement `measure`.

    Attributes:
        name: in records; the key in `EVALUATORS` if not defined.
        space: of the image features that it reads; "joint" needs a model with text.
        needs_captions: whether images without a caption are skipped even if they have a label.
    """

    name: str
    space: Space = "joint"
    needs_captions: bool = False

    @property
    def variant(self) -> str:
        """What distinguishes it from its defaults, in a word; records add it to the name of the set."""
        return ""

    @abstractmethod
    def measure(self, images: ImageFeatures, texts: TextEncoder) -> Evaluation | Mapping[str, float]:
        """Measure on a set that `encode_image_set` has encoded into `space`; `texts` is of the same model.

        Returns:
            An `Evaluation`, or metrics alone.
        """

    def evaluate(self, images: ImageFeatures, texts: TextEncoder) -> Evaluation:
        """Return `measure(images, texts)` as an `Evaluation`."""
        found = self.measure(images, texts)
        if isinstance(found, Evaluation):
            return found
        return Evaluation(self.name, {key: float(value) for key, value in found.items()},
                          counts={"pictures": len(images), "skipped": len(images.skipped)})

    def run(self, model: LoadedModel, images: EvaluationSet, device: torch.device) -> Evaluation:
        """Encode a set and measure; see `encode_image_set` for the arguments."""
        return self.evaluate(encode_image_set(model, images, device, space=self.space), TextEncoder(model, device))


MeasureFunction = Callable[[ImageFeatures, TextEncoder], Mapping[str, Any]]
"""The shortest evaluator: encoded images and the model's text encoder -> metrics by name."""


class FunctionEvaluator(Evaluator):
    """A `MeasureFunction` from `EVALUATORS`, by its name there."""

    def __init__(self, name: str, function: MeasureFunction) -> None:
        self.name = name
        self._function = function

    def measure(self, images: ImageFeatures, texts: TextEncoder) -> Mapping[str, float]:
        """See `Evaluator.measure`."""
        return self._function(images, texts)
