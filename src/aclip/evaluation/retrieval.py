"""Retrieval: find the caption of a picture, and a picture of a caption.

Candidates are the set's distinct captions (case and spacing aside). Image to text: the right item is the
picture's own caption. Text to image: every picture with the caption is right and the best of them counts.
"""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from PIL import Image
from torch import Tensor

from aclip.evaluation.base import Evaluation, Evaluator, Example
from aclip.evaluation.features import PictureFeatures, encode_texts
from aclip.evaluation.interface import Encoder
from aclip.evaluation.ranking import CHUNK_ELEMENTS, chance_recall, ranks, recall

CUTOFFS = (1, 5, 10)
"""The k of R@k."""

_TOP = 5  # captions shown with an example


@dataclass(frozen=True)
class Retrieval(Evaluator):
    """R@1, R@5, R@10 and the median rank, both ways.

    Metrics are `image_to_text_r1`, `_r5`, `_r10` (shares in [0, 1]), `image_to_text_median_rank`, and the
    same with `text_to_image_`; counts are `pictures`, `captions` (distinct) and `skipped`. The rule for
    ranks and ties is that of `aclip.evaluation.ranking`.

    Attributes:
        examples: how many best and how many worst pictures to return (fewer where there are fewer).
        chunk_elements: see `ranks`.
    """

    name = "retrieval"
    examples: int = 8
    chunk_elements: int = CHUNK_ELEMENTS

    def measure(
        self,
        model: Encoder,
        pictures: PictureFeatures,
        device: torch.device,
        *,
        precision: torch.dtype | None = None,
    ) -> Evaluation:
        """See `Evaluator.measure`."""
        captions, of_picture = distinct(pictures.captions)
        texts = encode_texts(model, captions, device, precision=precision)
        groups = torch.tensor(of_picture, device=texts.device)
        numbers = torch.arange(len(captions), device=texts.device)
        images, chunk = pictures.features, self.chunk_elements
        to_text, margins = ranks(images, texts, groups, numbers, chunk_elements=chunk)
        to_image, _ = ranks(texts, images, numbers, groups, chunk_elements=chunk)
        copies = np.bincount(of_picture).tolist()
        metrics: dict[str, float] = {}
        chance: dict[str, float] = {}
        for direction, rank in (("image_to_text", to_text), ("text_to_image", to_image)):
            metrics |= {f"{direction}_r{k}": recall(rank, k) for k in CUTOFFS}
            metrics[f"{direction}_median_rank"] = float(np.median(rank.numpy()))
        for k in CUTOFFS:
            chance[f"image_to_text_r{k}"] = chance_recall(1, len(captions), k)
            chance[f"text_to_image_r{k}"] = fmean(chance_recall(n, pictures.size, k) for n in copies)
        counts = {"pictures": pictures.size, "captions": len(captions), "skipped": len(pictures.skipped)}
        shown = _choose(pictures, of_picture, to_text, margins, self.examples)
        examples = tuple(_example(kind, i, pictures, captions, of_picture[i], texts, int(to_text[i]))
                         for kind, i in shown)
        return Evaluation(self.name, metrics, chance, counts, examples)


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
    pictures: PictureFeatures,
    of_picture: Sequence[int],
    rank: Int[Tensor, " B"],
    margins: Float[Tensor, " B"],
    count: int,
) -> list[tuple[str, int]]:
    """Choose pictures to show: rank 1 by the widest margin, and the furthest from it; each caption once."""
    pool = [(int(rank[i]), float(margins[i].nan_to_num(-2.0)), i) for i in pictures.thumbnails]
    best = sorted((-margin, i) for r, margin, i in pool if r == 1)
    worst = sorted((-r, margin, i) for r, margin, i in pool if r > 1)
    chosen: list[tuple[str, int]] = []
    for kind, candidates in (("best", [i for *_, i in best]), ("worst", [i for *_, i in worst])):
        by_caption: dict[int, int] = {}
        for i in candidates:
            by_caption.setdefault(of_picture[i], i)
        chosen += [(kind, i) for i in list(by_caption.values())[:count]]
    return chosen


def _example(
    kind: str,
    index: int,
    pictures: PictureFeatures,
    captions: Sequence[str],
    caption: int,
    texts: Float[Tensor, "M D"],
    rank: int,
) -> Example:
    similarity = (texts @ pictures.features[index]).nan_to_num(-1.0).cpu()
    values, indices = similarity.topk(min(_TOP, len(captions)))
    top = tuple((captions[i], v) for i, v in zip(indices.tolist(), values.tolist(), strict=True))
    return Example(kind, pictures.keys[index], pictures.captions[index], rank, float(similarity[caption]),
                   top, _png(pictures.thumbnails[index]))


def _png(image: UInt8[Tensor, "3 h w"]) -> str:
    buffer = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(buffer, format="PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode("ascii")
