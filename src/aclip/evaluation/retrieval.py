"""Retrieval: the caption of an image among captions, and the image of a caption among images."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from aclip.data.captions import caption_id
from aclip.errors import ConfigError, unknown_name
from aclip.evaluation import sharding
from aclip.evaluation.base import Evaluation, Evaluator
from aclip.evaluation.features import ImageFeatures, TextEncoder
from aclip.evaluation.ranking import Ranks, chance_recall, rank_both_ways, recall
from aclip.report.page import data_uri

CUTOFFS = (1, 5, 10)
"""The k of R@k."""

RECALLS = tuple(f"{direction}_r{k}" for direction in ("image_to_text", "text_to_image") for k in CUTOFFS)

THUMBNAIL_SIDE = 96
"""Longest side of the image of an example, in pixels."""

_TOP = 5  # captions shown with an example


PROTOCOLS: dict[str, tuple[int | None, int | None]] = {
    "distinct": (0, None), "all": (None, None), "karpathy": (5, None), "karpathy-1k": (5, 1000)}
"""How many captions of each image are candidates (None: all; 0: the first, equal ones merged into one that is right for
all of their images), and images ranked at a time, in order (None: all; metrics are means over whole folds).

`karpathy` is the protocol of Karpathy & Fei-Fei 2015 (arXiv 1412.2306, section 4.2) on their splits: COCO 5K and
Flickr30K 1K; `karpathy-1k` is COCO 1K."""


@dataclass(frozen=True)
class Retrieval(Evaluator):
    """R@1, R@5, R@10 and the median rank, in both directions.

    Metrics are `image_to_text_r1`, `_r5`, `_r10` (fractions), `image_to_text_median_rank`, and the same with
    `text_to_image_`. Of several right items the best counts; for ties see `aclip.evaluation.ranking`. Counts are
    `pictures`, `captions` (candidates) and `skipped`; with folds `folds` and `left_over`; where each caption is right
    for its own image only `shared`, the candidates whose words another image has too. Nothing distinguishes these, so
    no image finds such a caption first; the published protocols are kept as they are.

    Attributes:
        examples: number of best and of worst images returned.
        protocol: key of `PROTOCOLS`.
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
        return "" if self.protocol == "distinct" else self.protocol

    def measure(self, images: ImageFeatures, texts: TextEncoder) -> Evaluation:
        """See `Evaluator.measure`; raises a `ConfigError` for fewer images than one fold of the protocol."""
        each, fold = PROTOCOLS[self.protocol]
        size = fold or len(images)
        count = len(images) // size
        if count == 0:
            raise ConfigError(f"retrieval protocol '{self.protocol}' ranks {size:,} images at a time and the set has "
                              f"{len(images):,}: choose another --protocol")
        folds = [self._measure_fold(images, texts, each, n * size, size) for n in range(count)]
        counts = {"pictures": count * size, "skipped": len(images.skipped)}
        counts |= {name: round(mean) for name, mean in _means([fold.counts for fold in folds]).items()}
        if fold is not None:
            counts |= {"folds": count, "left_over": len(images) - count * size}
        return Evaluation(self.name, _means([fold.metrics for fold in folds]), _means([fold.chance for fold in folds]),
                          counts, examples=folds[0].examples)

    def _measure_fold(
        self, images: ImageFeatures, encoder: TextEncoder, each: int | None, first: int, size: int
    ) -> Evaluation:
        texts, right = _candidates(images.captions[first : first + size], each)
        features = encoder.cached(tuple(texts), lambda: encoder(texts))
        found = rank_both_ways(images.features[first : first + size], features, right.to(features.device))
        metrics: dict[str, float] = {}
        chance: dict[str, float] = {}
        for direction, rank, own, candidates in (("image_to_text", found.queries, right[0], len(texts)),
                                                 ("text_to_image", found.items, right[1], size)):
            metrics |= {f"{direction}_r{k}": recall(rank, k) for k in CUTOFFS}
            metrics[f"{direction}_median_rank"] = float(np.median(rank.numpy()))
            several = Counter(own.bincount().tolist()).items()  # number of right candidates, and how many have it
            chance |= {f"{direction}_r{k}": sum(n * chance_recall(number, candidates, k) for number, n in several)
                       / len(rank) for k in CUTOFFS}
        counts = {"captions": len(texts)} | ({} if each == 0 else {"shared": _count_shared(texts, right)})
        examples = self._examples(images, texts, features, right, found) if first == 0 else []
        return Evaluation(self.name, metrics, chance, counts, examples=examples)

    def _examples(
        self, images: ImageFeatures, texts: list[str], features: Float[Tensor, "M D"], right: Int[Tensor, "2 P"],
        found: Ranks,
    ) -> list[dict[str, Any]]:
        """Choose images to show: rank 1 by the widest margin, and the worst ranks; each caption once."""
        if images.open_image is None:
            return []
        text_of = dict(right.T.tolist())  # equal for images that share one caption
        pool = list(zip(found.queries.tolist(), found.margins.tolist(), text_of, strict=True))
        best = sorted((one for one in pool if one[0] == 1), key=lambda one: -one[1])
        worst = sorted((one for one in pool if one[0] > 1), key=lambda one: (-one[0], one[1]))
        examples: list[dict[str, Any]] = []
        with sharding.raise_on_all_ranks():
            for kind, candidates in (("best", best), ("worst", worst)):
                chosen: dict[int, tuple[int, int]] = {}
                for rank, _, i in candidates:
                    chosen.setdefault(text_of[i], (rank, i))
                for rank, i in list(chosen.values())[: self.examples]:
                    similarity = (features @ images.features[i]).cpu()
                    own = right[1, right[0] == i]
                    caption = int(own[similarity[own].argmax()])
                    values, indices = similarity.topk(min(_TOP, len(texts)))
                    top = [{"caption": texts[text], "similarity": value}
                           for text, value in zip(indices.tolist(), values.tolist(), strict=True)]
                    image = images.open_image(i)
                    image.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
                    examples.append({"kind": kind, "key": images.keys[i], "caption": texts[caption], "rank": rank,
                                     "similarity": float(similarity[caption]), "top": top,
                                     "thumbnail": data_uri(image).partition(",")[2]})
        return examples


def _candidates(captions: Sequence[tuple[str, ...]], each: int | None) -> tuple[list[str], Int[Tensor, "2 P"]]:
    """Return the texts, and all pairs (image, text) that are right, in the order of the images."""
    if each == 0:
        texts, numbers = distinct([own[0] for own in captions])
        return texts, torch.stack([torch.arange(len(captions)), torch.tensor(numbers)])
    given = [(i, text) for i, own in enumerate(captions) for text in own[:each]]
    owners = torch.tensor([i for i, _ in given])
    return [text for _, text in given], torch.stack([owners, torch.arange(len(given))])


def _count_shared(texts: Sequence[str], right: Int[Tensor, "2 P"]) -> int:
    """Return how many texts equal (`distinct`) one of another image."""
    _, numbers = distinct(texts)
    owners = Counter(number for number, _ in set(zip(numbers, right[0].tolist(), strict=True)))
    return sum(owners[number] > 1 for number in numbers)


def _means(tables: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: fmean(table[name] for table in tables) for name in tables[0]}


def distinct(captions: Sequence[str]) -> tuple[list[str], list[int]]:
    """Return the distinct captions, case and spacing aside, each as first written, and the index of each image's."""
    keys = list(map(caption_id, captions))
    first: dict[int, int] = {}
    numbers = [first.setdefault(key, len(first)) for key in keys]
    spelled = dict(zip(reversed(keys), reversed(captions), strict=True))
    return [spelled[key] for key in first], numbers
