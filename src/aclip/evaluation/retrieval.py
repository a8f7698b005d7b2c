"""Retrieval: find the caption of a picture, and a picture of a caption.

Which captions are candidates is a `Protocol`. Image to text: the picture's own captions are right and the best of
them counts. Text to image: every picture with the caption is right and the best of them counts.
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
from aclip.evaluation.features import PictureFeatures
from aclip.evaluation.ranking import CHUNK_ELEMENTS, Ranks, chance_recall, rank_both_ways, recall
from aclip.evaluation.texts import TextEncoder

CUTOFFS = (1, 5, 10)
"""The k of R@k."""

_TOP = 5  # captions shown with an example


@dataclass(frozen=True)
class Protocol:
    """What retrieval is asked among.

    Attributes:
        about: in one line.
        captions: at most this many of each picture's captions, the first ones, each a candidate of its own; None for
            all. 0: first captions alone, those that are equal one candidate that is right for all of their pictures.
        fold: pictures that are asked among at a time, in the order of the set; metrics are means over whole folds, and
            what is left over is left out. None asks among all.
    """

    about: str
    captions: int | None = 0
    fold: int | None = None


PROTOCOLS = {
    "distinct": Protocol("first captions; equal ones are one, and right for all of their pictures"),
    "all": Protocol("all captions of every picture, each right for its own picture alone", captions=None),
    "karpathy": Protocol("the first five captions, each right for its own picture alone (COCO 5K, Flickr30K 1K)",
                         captions=5),
    "karpathy-1k": Protocol("likewise, mean over folds of 1,000 pictures (COCO 1K)", captions=5, fold=1000),
}
"""`karpathy` is the protocol of Karpathy & Fei-Fei 2015 (arXiv 1412.2306, section 4.2) on their splits."""


class _Candidates(NamedTuple):
    """Texts with whom they belong to: a text and a picture of one group are right for each other."""

    texts: list[str]
    of_text: Int[Tensor, " M"]
    of_picture: Int[Tensor, " B"]


@dataclass(frozen=True)
class Retrieval(Evaluator):
    """R@1, R@5, R@10 and the median rank, both ways.

    Metrics are `image_to_text_r1`, `_r5`, `_r10` (shares in [0, 1]), `image_to_text_median_rank`, and the
    same with `text_to_image_`; counts are `pictures`, `captions` (candidates), `skipped`, with folds `folds` and
    `left_over`, and where every caption is right for its own picture alone `shared`: candidates whose words another
    picture has, too. Nothing tells these apart, and ties count against the model, so that no picture finds such a
    caption first; the published protocols are kept as they are. The rule for ranks and ties is that of
    `aclip.evaluation.ranking`.

    Attributes:
        examples: how many best and how many worst pictures to return (fewer where there are fewer).
        chunk_elements: see `rank_both_ways`.
        protocol: in `PROTOCOLS`.

    Raises:
        ConfigError: an unknown protocol.
    """

    name = "retrieval"
    needs_captions = True
    examples: int = 8
    chunk_elements: int = CHUNK_ELEMENTS
    protocol: str = "distinct"

    def __post_init__(self) -> None:
        if self.protocol not in PROTOCOLS:
            raise ConfigError(unknown_name("retrieval protocol", self.protocol, PROTOCOLS))

    @property
    def variant(self) -> str:
        """See `Evaluator.variant`."""
        return "" if self.protocol == "distinct" else self.protocol

    def measure(self, texts: TextEncoder, pictures: PictureFeatures) -> Evaluation:
        """See `Evaluator.measure`.

        Raises:
            ConfigError: fewer pictures than one fold of the protocol.
        """
        protocol = PROTOCOLS[self.protocol]
        fold = protocol.fold or pictures.size
        folds = pictures.size // fold
        if folds == 0:
            raise ConfigError(f"retrieval protocol '{self.protocol}' asks among {fold:,} pictures at a time, and the "
                              f"set has {pictures.size:,}: choose another with --protocol")
        found = [self._measure(texts, pictures, range(n * fold, (n + 1) * fold)) for n in range(folds)]
        metrics = {key: fmean(part[0][key] for part in found) for key in found[0][0]}
        chance = {key: fmean(part[1][key] for part in found) for key in found[0][1]}
        counts = {"pictures": folds * fold, "captions": round(fmean(part[2] for part in found)),
                  "skipped": len(pictures.skipped)}
        if protocol.captions != 0:
            counts["shared"] = round(fmean(part[4] for part in found))
        if protocol.fold is not None:
            counts |= {"folds": folds, "left_over": pictures.size - folds * fold}
        return Evaluation(self.name, metrics, chance, counts, found[0][3])

    def _measure(
        self, encoder: TextEncoder, pictures: PictureFeatures, some: range
    ) -> tuple[dict[str, float], dict[str, float], int, tuple[Example, ...], int]:
        """Return metrics, chance, the number of candidates, examples, and how many candidates are shared, of a fold."""
        protocol = PROTOCOLS[self.protocol]
        asked = _candidates(pictures, some, protocol.captions)
        texts = encoder.once(tuple(asked.texts), lambda: encoder.encode(asked.texts))
        images = pictures.features[some.start : some.stop]
        found = rank_both_ways(images, texts, asked.of_picture.to(texts.device), asked.of_text.to(texts.device),
                               chunk_elements=self.chunk_elements)
        metrics: dict[str, float] = {}
        chance: dict[str, float] = {}
        right_texts = asked.of_text.bincount()[asked.of_picture].tolist()
        right_pictures = asked.of_picture.bincount(minlength=int(asked.of_text.max()) + 1)[asked.of_text].tolist()
        for direction, rank, right, among in (("image_to_text", found.queries, right_texts, len(asked.texts)),
                                              ("text_to_image", found.items, right_pictures, len(some))):
            metrics |= {f"{direction}_r{k}": recall(rank, k) for k in CUTOFFS}
            metrics[f"{direction}_median_rank"] = float(np.median(rank.numpy()))
            chance |= {f"{direction}_r{k}": sum(n * chance_recall(copies, among, k) for copies, n in
                                                Counter(right).items()) / len(right) for k in CUTOFFS}
        examples = tuple(_example(kind, i, pictures, some.start, asked, texts, int(found.queries[i]))
                         for kind, i in _choose(pictures, some, asked, found, self.examples))
        shared = _shared(asked) if protocol.captions != 0 else 0
        return metrics, chance, len(asked.texts), examples, shared


def _candidates(pictures: PictureFeatures, some: range, captions: int | None) -> _Candidates:
    """Return the candidates of some pictures; see `Protocol.captions`."""
    if captions == 0:
        texts, numbers = distinct(pictures.captions[some.start : some.stop])
        return _Candidates(texts, torch.arange(len(texts)), torch.tensor(numbers))
    given = [pictures.all_captions[i][:captions] for i in some]
    owners = torch.arange(len(given)).repeat_interleave(torch.tensor([len(own) for own in given]))
    return _Candidates([text for own in given for text in own], owners, torch.arange(len(given)))


def _shared(asked: _Candidates) -> int:
    """Return how many candidates are the same (`distinct`) as one of another group."""
    _, numbers = distinct(asked.texts)
    owners: dict[int, set[int]] = {}
    for number, owner in zip(numbers, asked.of_text.tolist(), strict=True):
        owners.setdefault(number, set()).add(owner)
    return sum(len(owners[number]) > 1 for number in numbers)


def distinct(captions: Sequence[str]) -> tuple[list[str], list[int]]:
    """Return the distinct captions, each as first written, and the number of each picture's among them.

    Captions are the same when they differ in case and spacing only.
    """
    first: dict[str, int] = {}
    spelled: list[str] = []
    numbers = []
    for caption in captions:
        number = first.setdefault(" ".join(caption.casefold().split()), len(first))
        if number == len(spelled):
            spelled.append(caption)
        numbers.append(number)
    return spelled, numbers


def _choose(
    pictures: PictureFeatures, some: range, asked: _Candidates, found: Ranks, count: int
) -> list[tuple[str, int]]:
    """Choose pictures to show: rank 1 by the widest margin, and the furthest from it; each group once."""
    shown = [i - some.start for i in pictures.thumbnails if i in some]
    pool = [(int(found.queries[i]), float(found.margins[i].nan_to_num(-2.0)), i) for i in shown]
    best = sorted((-margin, i) for r, margin, i in pool if r == 1)
    worst = sorted((-r, margin, i) for r, margin, i in pool if r > 1)
    chosen: list[tuple[str, int]] = []
    for kind, candidates in (("best", [i for *_, i in best]), ("worst", [i for *_, i in worst])):
        by_group: dict[int, int] = {}
        for i in candidates:
            by_group.setdefault(int(asked.of_picture[i]), i)
        chosen += [(kind, i) for i in list(by_group.values())[:count]]
    return chosen


def _example(
    kind: str,
    index: int,
    pictures: PictureFeatures,
    first: int,
    asked: _Candidates,
    texts: Float[Tensor, "M D"],
    rank: int,
) -> Example:
    """Return picture `first + index` as an example, with the most similar of its own captions."""
    similarity = (texts @ pictures.features[first + index]).nan_to_num(-1.0).cpu()
    values, indices = similarity.topk(min(_TOP, len(asked.texts)))
    top = tuple((asked.texts[i], v) for i, v in zip(indices.tolist(), values.tolist(), strict=True))
    own = torch.where(asked.of_text == asked.of_picture[index], similarity, -torch.inf)
    return Example(kind, pictures.keys[first + index], asked.texts[int(own.argmax())], rank, float(own.max()), top,
                   _png(pictures.thumbnails[first + index]))


def _png(image: UInt8[Tensor, "3 h w"]) -> str:
    buffer = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(buffer, format="PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode("ascii")
