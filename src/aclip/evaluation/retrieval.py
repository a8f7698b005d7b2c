"""Retrieval: the caption of an image among captions, and the image of a caption among images.

A `Protocol` says which captions are candidates. Of several right items the best counts.
"""

import base64
import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from PIL import Image
from torch import Tensor

from aclip.errors import ConfigError, unknown_name
from aclip.evaluation.base import Evaluation, Evaluator, Example
from aclip.evaluation.features import ImageFeatures, TextEncoder
from aclip.evaluation.ranking import Ranks, chance_recall, rank_both_ways, recall

CUTOFFS = (1, 5, 10)
"""The k of R@k."""

_TOP = 5  # captions shown with an example


@dataclass(frozen=True)
class Protocol:
    """Which captions and images are candidates.

    Attributes:
        captions: number of captions of each image, the first ones, each a candidate of its own; None for all. 0: first
            captions only, equal ones merged into one candidate that is right for all of their images.
        fold: images ranked at a time, in the order of the set; metrics are means over whole folds, and a rest is left
            out. None ranks all at once.
    """

    captions: int | None = 0
    fold: int | None = None


PROTOCOLS = {
    "distinct": Protocol(),
    "all": Protocol(captions=None),
    "karpathy": Protocol(captions=5),
    "karpathy-1k": Protocol(captions=5, fold=1000),
}
"""`karpathy` is the protocol of Karpathy & Fei-Fei 2015 (arXiv 1412.2306, section 4.2) on their splits: COCO 5K and
Flickr30K 1K; `karpathy-1k` is COCO 1K."""


class _Candidates(NamedTuple):
    """Texts with their groups: a text and an image of one group are right for each other."""

    texts: list[str]
    of_text: Int[Tensor, " M"]
    of_image: Int[Tensor, " B"]


class _Fold(NamedTuple):
    metrics: dict[str, float]
    chance: dict[str, float]
    captions: int
    shared: int
    examples: tuple[Example, ...]


@dataclass(frozen=True)
class Retrieval(Evaluator):
    """R@1, R@5, R@10 and the median rank, in both directions.

    Metrics are `image_to_text_r1`, `_r5`, `_r10` (fractions), `image_to_text_median_rank`, and the same with
    `text_to_image_`. Counts are `pictures`, `captions` (candidates) and `skipped`; with folds `folds` and `left_over`;
    where each caption is right for its own image only `shared`, the candidates whose words another image has too.
    Nothing distinguishes these, and ties count against the model, so that no image finds such a caption first; the
    published protocols are kept as they are. For ranks and ties see `aclip.evaluation.ranking`.

    Attributes:
        examples: number of best and of worst images returned.
        protocol: key of `PROTOCOLS`.

    Raises:
        ConfigError: an unknown protocol.
    """

    name = "retrieval"
    needs_captions = True
    examples: int = 8
    protocol: str = "distinct"

    def __post_init__(self) -> None:
        if self.protocol not in PROTOCOLS:
            raise ConfigError(unknown_name("retrieval protocol", self.protocol, PROTOCOLS))

    @property
    def variant(self) -> str:
        """See `Evaluator.variant`."""
        return "" if self.protocol == "distinct" else self.protocol

    def measure(self, images: ImageFeatures, texts: TextEncoder) -> Evaluation:
        """See `Evaluator.measure`.

        Raises:
            ConfigError: fewer images than one fold of the protocol.
        """
        protocol = PROTOCOLS[self.protocol]
        size = protocol.fold or len(images)
        count = len(images) // size
        if count == 0:
            raise ConfigError(f"retrieval protocol '{self.protocol}' ranks {size:,} images at a time and the set has "
                              f"{len(images):,}: choose another --protocol")
        folds = [self._measure_fold(images, texts, range(n * size, (n + 1) * size)) for n in range(count)]
        metrics = {key: fmean(fold.metrics[key] for fold in folds) for key in folds[0].metrics}
        chance = {key: fmean(fold.chance[key] for fold in folds) for key in folds[0].chance}
        counts = {"pictures": count * size, "captions": round(fmean(fold.captions for fold in folds)),
                  "skipped": len(images.skipped)}
        if protocol.captions != 0:
            counts["shared"] = round(fmean(fold.shared for fold in folds))
        if protocol.fold is not None:
            counts |= {"folds": count, "left_over": len(images) - count * size}
        return Evaluation(self.name, metrics, chance, counts, folds[0].examples)

    def _measure_fold(self, images: ImageFeatures, encoder: TextEncoder, fold: range) -> _Fold:
        protocol = PROTOCOLS[self.protocol]
        asked = _candidates(images, fold, protocol.captions)
        texts = encoder.cached(tuple(asked.texts), lambda: encoder.encode(asked.texts))
        found = rank_both_ways(images.features[fold.start : fold.stop], texts, asked.of_image.to(texts.device),
                               asked.of_text.to(texts.device))
        metrics: dict[str, float] = {}
        chance: dict[str, float] = {}
        right_texts = asked.of_text.bincount()[asked.of_image].tolist()
        right_images = asked.of_image.bincount(minlength=int(asked.of_text.max()) + 1)[asked.of_text].tolist()
        for direction, rank, right, candidates in (
            ("image_to_text", found.queries, right_texts, len(asked.texts)),
            ("text_to_image", found.items, right_images, len(fold)),
        ):
            metrics |= {f"{direction}_r{k}": recall(rank, k) for k in CUTOFFS}
            metrics[f"{direction}_median_rank"] = float(np.median(rank.numpy()))
            chance |= {f"{direction}_r{k}": sum(n * chance_recall(copies, candidates, k) for copies, n in
                                                Counter(right).items()) / len(right) for k in CUTOFFS}
        examples = tuple(_example(kind, i, images, fold.start, asked, texts, int(found.queries[i]))
                         for kind, i in _choose(images, fold, asked, found, self.examples))
        return _Fold(metrics, chance, len(asked.texts), _count_shared(asked) if protocol.captions != 0 else 0, examples)


def distinct(captions: Sequence[str]) -> tuple[list[str], list[int]]:
    """Return the distinct captions, case and spacing aside, each as first written, and the index of each image's."""
    first: dict[str, int] = {}
    spelled: list[str] = []
    numbers = []
    for caption in captions:
        number = first.setdefault(" ".join(caption.casefold().split()), len(first))
        if number == len(spelled):
            spelled.append(caption)
        numbers.append(number)
    return spelled, numbers


def _candidates(images: ImageFeatures, fold: range, captions: int | None) -> _Candidates:
    if captions == 0:
        texts, numbers = distinct(images.captions[fold.start : fold.stop])
        return _Candidates(texts, torch.arange(len(texts)), torch.tensor(numbers))
    given = [images.all_captions[i][:captions] for i in fold]
    owners = torch.arange(len(given)).repeat_interleave(torch.tensor([len(own) for own in given]))
    return _Candidates([text for own in given for text in own], owners, torch.arange(len(given)))


def _count_shared(asked: _Candidates) -> int:
    """Return how many candidates equal (`distinct`) one of another group."""
    _, numbers = distinct(asked.texts)
    owners: dict[int, set[int]] = {}
    for number, owner in zip(numbers, asked.of_text.tolist(), strict=True):
        owners.setdefault(number, set()).add(owner)
    return sum(len(owners[number]) > 1 for number in numbers)


def _choose(
    images: ImageFeatures, fold: range, asked: _Candidates, found: Ranks, count: int
) -> list[tuple[str, int]]:
    """Choose images to show: rank 1 by the widest margin, and the worst ranks; each group once."""
    shown = [i - fold.start for i in images.thumbnails if i in fold]
    pool = [(int(found.queries[i]), float(found.margins[i]), i) for i in shown]
    best = sorted((-margin, i) for rank, margin, i in pool if rank == 1)
    worst = sorted((-rank, margin, i) for rank, margin, i in pool if rank > 1)
    chosen: list[tuple[str, int]] = []
    for kind, candidates in (("best", [i for *_, i in best]), ("worst", [i for *_, i in worst])):
        by_group: dict[int, int] = {}
        for i in candidates:
            by_group.setdefault(int(asked.of_image[i]), i)
        chosen += [(kind, i) for i in list(by_group.values())[:count]]
    return chosen


def _example(
    kind: str, index: int, images: ImageFeatures, first: int, asked: _Candidates, texts: Float[Tensor, "M D"], rank: int
) -> Example:
    """Return image `first + index` as an example, with the most similar of its own captions."""
    similarity = (texts @ images.features[first + index]).cpu()
    values, indices = similarity.topk(min(_TOP, len(asked.texts)))
    top = tuple({"caption": asked.texts[i], "similarity": value} for i, value in
                zip(indices.tolist(), values.tolist(), strict=True))
    own = torch.where(asked.of_text == asked.of_image[index], similarity, -torch.inf)
    return Example(kind, images.keys[first + index], asked.texts[int(own.argmax())], rank, float(own.max()), top,
                   _png(images.thumbnails[first + index]))


def _png(image: UInt8[Tensor, "3 h w"]) -> str:
    buffer = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(buffer, format="PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode("ascii")
