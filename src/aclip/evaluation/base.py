"""What an evaluator is, and what it returns."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from aclip.data import EvaluationSet
    from aclip.evaluation.features import ImageFeatures, Space, TextEncoder
    from aclip.models import LoadedModel


@dataclass(frozen=True)
class Result:
    """One metric of one evaluator on one set."""

    set: str  # its name, with the retrieval protocol if that is not the default
    evaluator: str  # its name in `EVALUATORS`
    metric: str  # such as "image_to_text_r1"
    value: float  # recalls and accuracies are fractions in [0, 1]
    keep: float | None = None  # fraction of patches kept, of an evaluation on masked images
    kept_by: str | None = None  # how these were chosen


@dataclass(frozen=True)
class Evaluation:
    """What an evaluator found on a set, by the names of metrics and numbers.

    Examples are images shown in the report: kind ("best": right, by the widest margin; "worst": true caption ranked
    last), key, caption, its rank and similarity, top (most similar captions) and thumbnail (PNG, base64).
    """

    evaluator: str
    metrics: Mapping[str, float]  # recalls and accuracies are fractions in [0, 1]
    chance: Mapping[str, float] = field(default_factory=dict)  # expected for a random order, where a metric has it
    counts: Mapping[str, int] = field(default_factory=dict)  # of images, captions, classes, skipped images
    settings: Mapping[str, float] = field(default_factory=dict)  # what a probe was fitted with
    examples: Sequence[Mapping[str, Any]] = ()
    details: Mapping[str, Any] = field(default_factory=dict)  # what the report draws, plain JSON values


class Evaluator(ABC):
    """Measures one ability of a model; subclasses implement `measure`."""

    name: str  # in records; the key in `EVALUATORS` if not defined
    space: Space = "joint"  # of the image features that it reads; "joint" needs a model with text
    needs_captions: bool = False  # whether images without a caption are skipped even if they have a label

    @property
    def variant(self) -> str:
        """What distinguishes it from its defaults, in a word; records add it to the name of the set."""
        return ""

    @abstractmethod
    def measure(self, images: ImageFeatures, texts: TextEncoder) -> Evaluation | Mapping[str, Any]:
        """Measure on a set that `encode_image_set` has encoded into `space`; return metrics, or an `Evaluation`."""

    def evaluate(self, images: ImageFeatures, texts: TextEncoder) -> Evaluation:
        found = self.measure(images, texts)
        if isinstance(found, Evaluation):
            return found
        return Evaluation(self.name, {key: float(value) for key, value in found.items()},
                          counts={"pictures": len(images), "skipped": len(images.skipped)})

    def run(self, model: LoadedModel, images: EvaluationSet, device: torch.device) -> Evaluation:
        """Encode a set and measure; see `encode_image_set` for the arguments."""
        from aclip.evaluation.features import TextEncoder, encode_image_set

        return self.evaluate(encode_image_set(model, images, device, space=self.space), TextEncoder(model, device))
