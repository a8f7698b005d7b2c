"""Pictures as evaluation sees them: every one once, in order, whole, with its own caption."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor

from aclip.data.captions import caption_id, clean_captions
from aclip.data.decode import decode_image
from aclip.data.sources import Source
from aclip.data.workers import read_ahead
from aclip.errors import BadSampleError, DataError

Target = Literal["caption", "label"]
"""What a picture must have to be evaluated: a caption for retrieval, a label for classification."""


@dataclass(frozen=True)
class EvaluationBatch:
    """Some pictures with what they are compared to.

    Attributes:
        pixels: (B, 3, h, w) float32, preprocessed.
        captions: the pictures' first captions, without tags; empty where a label is the target.
        all_captions: all captions of each picture, the first included; none where a label is the target.
        caption_ids: (B,) int64, see `aclip.data.captions.caption_id`.
        labels: the pictures' classes, or None.
        keys: the samples' names.
        indices: the samples' numbers in the source.
    """

    pixels: Float[Tensor, "B 3 h w"]
    captions: tuple[str, ...]
    all_captions: tuple[tuple[str, ...], ...]
    caption_ids: Int[Tensor, " B"]
    labels: tuple[str | None, ...]
    keys: tuple[str, ...]
    indices: tuple[int, ...]


@dataclass(frozen=True)
class _Picture:
    pixels: Float[Tensor, "3 h w"]
    captions: tuple[str, ...]
    label: str | None
    key: str
    index: int

    @property
    def caption(self) -> str:
        return self.captions[0] if self.captions else ""


class EvaluationSet:
    """The pictures of a source for evaluation, in batches: every good one once, in the source's order.

    Bad samples are left out, with nothing in their place; `skipped` names them. The batches are the same
    for any number of workers. Captions are cleaned and never drawn, so iterating twice gives the same.

    Attributes:
        source: where the pictures come from.
        skipped: (name, reason) of those that the latest iteration has left out so far.
    """

    def __init__(
        self,
        source: Source,
        preprocess: Callable[[Image.Image], Tensor],
        *,
        batch_size: int = 64,
        workers: int = 0,
        target: Target = "caption",
        share: tuple[int, int] = (0, 1),
    ) -> None:
        """Evaluate `source`.

        Args:
            source: the pictures.
            preprocess: maps an RGB picture to (3, h, w) float32, all of one size; open_clip's evaluation
                transform.
            batch_size: samples read for a batch, so at most this many pictures in it.
            workers: processes that read ahead; 0 reads in this one.
            target: a picture without it is a bad sample.
            share: (i, n) reads the i-th of n runs of whole batches alone, i from 0; the batches are the same for any n.
        """
        self.source = source
        self.skipped: list[tuple[str, str]] = []
        self._read = _ReadPictures(source, preprocess, target)
        self._batch_size = batch_size
        self._workers = workers
        index, count = share
        batches = -(-len(source) // batch_size)
        first, last = (batches * i // count * batch_size for i in (index, index + 1))
        self._numbers = range(first, min(last, len(source)))
        self._whole = count == 1

    def __len__(self) -> int:
        """Return the number of samples in the share, bad ones included."""
        return len(self._numbers)

    def image(self, index: int) -> Image.Image:
        """Return picture `index` of the source as it is, upright and in RGB.

        Raises:
            BadSampleError: it cannot be used.
        """
        return decode_image(self.source.read(index).image)

    def __iter__(self) -> Iterator[EvaluationBatch]:
        """Yield the good pictures.

        Raises:
            DataError: there is none in the whole source; a share may be empty.
        """
        self.skipped = []
        numbers = self._numbers
        chunks = (numbers[first : first + self._batch_size] for first in range(0, len(numbers), self._batch_size))
        for samples in read_ahead(self._read, chunks, workers=self._workers):
            self.skipped.extend(sample for sample in samples if isinstance(sample, tuple))
            pictures = [sample for sample in samples if isinstance(sample, _Picture)]
            if pictures:
                yield _collate(pictures)
        if self._whole and len(self.skipped) == len(self):
            name, reason = self.skipped[0]
            raise DataError(
                f"no usable sample in {self.source.name}: all {len(self)} are bad, "
                f"the first is {name} ({reason})"
            )


class _ReadPictures:
    """What a worker does for one batch: pictures, and (name, reason) where one is bad."""

    def __init__(self, source: Source, preprocess: Callable[[Image.Image], Tensor], target: Target) -> None:
        self._source = source
        self._preprocess = preprocess
        self._target = target

    def __call__(self, indices: range) -> list[_Picture | tuple[str, str]]:
        return [self._read(index) for index in indices]

    def _read(self, index: int) -> _Picture | tuple[str, str]:
        try:
            raw = self._source.read(index)
            if self._target == "label" and raw.label is None:
                raise BadSampleError("missing label")
            captions = clean_captions(raw.captions) if self._target == "caption" else ()
            pixels = self._preprocess(decode_image(raw.image))
        except BadSampleError as error:
            return self._source.key(index), error.reason
        return _Picture(pixels, captions, raw.label, raw.key, index)


def _collate(pictures: list[_Picture]) -> EvaluationBatch:
    return EvaluationBatch(
        pixels=torch.stack([picture.pixels for picture in pictures]),
        captions=tuple(picture.caption for picture in pictures),
        all_captions=tuple(picture.captions for picture in pictures),
        caption_ids=torch.tensor([caption_id(picture.caption) for picture in pictures], dtype=torch.int64),
        labels=tuple(picture.label for picture in pictures),
        keys=tuple(picture.key for picture in pictures),
        indices=tuple(picture.index for picture in pictures),
    )
