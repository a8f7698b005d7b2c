"""An evaluator: a name, and numbers about a model on a set of pictures."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from aclip.evaluation.features import PictureFeatures, encode_pictures
from aclip.evaluation.interface import Encoder, PictureSet, Progress, Space
from aclip.evaluation.texts import TextEncoder


@dataclass(frozen=True)
class Example:
    """One picture that an evaluation found telling.

    Attributes:
        kind: "best" (right, by the widest margin) or "worst" (the true caption ranked last).
        key: the picture's name. caption: its true caption.
        rank: of the true caption, from 1.
        similarity: cosine with the true caption.
        top: the most similar captions with their cosine similarities, best first.
        thumbnail: PNG, base64 encoded, at most 96 pixels a side.
    """

    kind: str
    key: str
    caption: str
    rank: int
    similarity: float
    top: tuple[tuple[str, float], ...]
    thumbnail: str

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain JSON values, as `examples/<set>.json` holds it."""
        top = [{"caption": caption, "similarity": similarity} for caption, similarity in self.top]
        return {"kind": self.kind, "key": self.key, "caption": self.caption, "rank": self.rank,
                "similarity": self.similarity, "top": top, "thumbnail": self.thumbnail}


@dataclass(frozen=True)
class Evaluation:
    """What an evaluator found.

    Attributes:
        evaluator: its name.
        metrics: name -> value; recalls and accuracies are shares in [0, 1].
        chance: name -> expected value of that metric for a random order, where it has one.
        counts: name -> how many pictures, captions, classes, skipped pictures.
        examples: telling pictures, possibly none.
        settings: name -> what a probe was fitted with.
        details: what a report draws besides numbers, as plain JSON values.
    """

    evaluator: str
    metrics: Mapping[str, float]
    chance: Mapping[str, float]
    counts: Mapping[str, int]
    examples: tuple[Example, ...] = field(default=())
    settings: Mapping[str, float] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)

    def to_record(
        self, *, set_name: str, weights: str, step: int, samples_seen: int, training_set: str | None = None
    ) -> dict[str, Any]:
        """Return one line of `evaluations.jsonl`: everything but examples and details, as plain JSON values.

        Args:
            set_name: the pictures' set. weights: "online" or "ema".
            step: optimizer steps done. samples_seen: pairs seen over all ranks.
            training_set: the set that the evaluator has learned from, if it learns.
        """
        learned = {} if training_set is None else {"training_set": training_set, "settings": dict(self.settings)}
        return {"step": step, "samples_seen": samples_seen, "weights": weights, "evaluator": self.evaluator,
                "set": set_name, "metrics": dict(self.metrics), "chance": dict(self.chance),
                "counts": dict(self.counts), **learned}


class Evaluator(ABC):
    """Measures one ability of a model; subclasses implement `measure`.

    Attributes:
        name: in `EVALUATORS` and in records.
        space: of the features that it reads; "joint" needs a model with text.
        needs_captions: whether every picture must have one; others can do with labels.
    """

    name: ClassVar[str]
    space: ClassVar[Space] = "joint"
    needs_captions: ClassVar[bool] = False

    @property
    def variant(self) -> str:
        """What sets it apart from the evaluator as it is by default, in a word; added to a set's name in records."""
        return ""

    def run(
        self,
        model: Encoder,
        pictures: PictureSet,
        device: torch.device,
        *,
        precision: torch.dtype | None = None,
        progress: Progress | None = None,
    ) -> Evaluation:
        """Encode the pictures and measure; see `encode_pictures` for the arguments.

        With several evaluators for one set, call `encode_pictures` once a space and `measure` of each.
        """
        encoded = encode_pictures(model, pictures, device, space=self.space, precision=precision, progress=progress)
        return self.measure(TextEncoder(model, device, precision=precision), encoded)

    @abstractmethod
    def measure(self, texts: TextEncoder, pictures: PictureFeatures) -> Evaluation:
        """Measure on pictures that `encode_pictures` has encoded into `space`; `texts` is of the same model."""
