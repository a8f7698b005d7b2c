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
    """One metric of one evaluator on one set.

    Attributes:
        set: its name, with the retrieval protocol if that is not the default.
        evaluator: its name in `EVALUATORS`.
        metric: name, such as "image_to_text_r1".
        value: recalls and accuracies are fractions in [0, 1].
        keep: fraction of patches kept, of an evaluation on masked images; else None.
        kept_by: how these were chosen.
    """

    set: str
    evaluator: str
    metric: str
    value: float
    keep: float | None = None
    kept_by: str | None = None


@dataclass(frozen=True)
class Evaluation:
    """What an evaluator found on a set.

    Attributes:
        metrics: name -> value; recalls and accuracies are fractions in [0, 1].
        chance: name -> expected value of that metric for a random order, where it has one.
        counts: name -> number of images, captions, classes, skipped images.
        settings: name -> what a probe was fitted with.
        examples: images shown in the report: kind ("best": right, by the widest margin; "worst": true caption ranked
            last), key, caption, its rank and similarity, top (most similar captions) and thumbnail (PNG, base64).
        details: what the report draws; like examples, plain JSON values.
    """

    evaluator: str
    metrics: Mapping[str, float]
    chance: Mapping[str, float] = field(default_factory=dict)
    counts: Mapping[str, int] = field(default_factory=dict)
    settings: Mapping[str, float] = field(default_factory=dict)
    examples: Sequence[Mapping[str, Any]] = ()
    details: Mapping[str, Any] = field(default_factory=dict)


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
