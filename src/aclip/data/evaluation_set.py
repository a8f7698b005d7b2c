"""Images as evaluation sees them: each once, in order, whole, with its own captions."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from aclip.data.captions import clean_captions
from aclip.data.decode import decode_image
from aclip.data.sources.base import RawSample, Source
from aclip.data.workers import check_workers, empty_shared, read_ahead
from aclip.errors import BadSampleError, DataError

Target = Literal["caption", "label", "either"]
"""What an image must have to be evaluated: a caption for retrieval, a label for probes, either to be named."""

MAX_ASPECT = 100
"""Long side over short side above which an image is cropped before it is resized."""


@dataclass(frozen=True)
class EvaluationBatch:
    """Some images with what they are compared to."""

    pixels: Float[Tensor, "B 3 h w"]  # float32, preprocessed
    all_captions: tuple[tuple[str, ...], ...]  # of each image, without tags; empty if a label is the target
    labels: tuple[str | None, ...]
    keys: tuple[str, ...]
    indices: tuple[int, ...]  # in the source


class EvaluationSet:
    """The images of a source for evaluation, in batches: every good one once, in the source's order.

    Bad samples are left out. Captions are cleaned and never drawn, and the batches are the same for any number of
    workers.

    Args:
        preprocess: maps an RGB image to (3, h, w) float32, all of one size; open_clip's evaluation transform.
        batch_size: samples read for a batch, so at most this many images in it.
        workers: processes that read ahead; 0 reads in this one.
        target: an image without it is a bad sample.
        share: (i, n) reads the i-th of n runs of whole batches, i from 0; the batches are the same for any n.

    Attributes:
        skipped: (name, reason) of the samples that the latest iteration has left out so far.

    Raises:
        ConfigError: a negative number of workers.
    """

    def __init__(self, source: Source, preprocess: Callable[[Image.Image], Tensor], *, batch_size: int = 64,
                 workers: int = 0, target: Target = "caption", share: tuple[int, int] = (0, 1)) -> None:
        self.source = source
        self.skipped: list[tuple[str, str]] = []
        self._read = partial(_read_batch, source, preprocess, target)
        self._batch_size, self._workers = batch_size, check_workers(workers)
        index, count = share
        batches = -(-len(source) // batch_size)
        first, last = (batches * i // count * batch_size for i in (index, index + 1))
        self._numbers = range(first, min(last, len(source)))
        self._whole = count == 1

    def __len__(self) -> int:
        """Return the number of samples in the share, bad ones included."""
        return len(self._numbers)

    def __iter__(self) -> Iterator[EvaluationBatch]:
        """Yield the good images.

        Raises:
            DataError: there is none in the whole source (a share may be empty), or a worker was killed.
        """
        self.skipped = []
        chunks = (self._numbers[i : i + self._batch_size] for i in range(0, len(self), self._batch_size))
        for batch, skipped in read_ahead(self._read, chunks, workers=self._workers):
            self.skipped.extend(skipped)
            if batch is not None:
                yield batch
        if self._whole and len(self.skipped) == len(self):
            name, reason = self.skipped[0]
            raise DataError(
                f"no usable sample in {self.source.spec}: all {len(self)} are bad, the first is {name} ({reason})")


def limit_aspect(image: Image.Image) -> Image.Image:
    """Return the central part of an image that is longer than `MAX_ASPECT` times its short side, others as they are.

    An evaluation transform scales the short side to its size and then crops the centre: an image of 1 x 12,000 pixels
    would be 224 x 2,688,000 in between, gigabytes for a square of which nothing but the centre is kept.
    """
    longest = MAX_ASPECT * min(image.size)
    width, height = (min(side, longest) for side in image.size)
    if (width, height) == image.size:
        return image
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def _read_batch(source: Source, preprocess: Callable[[Image.Image], Tensor], target: Target, indices: range
                ) -> tuple[EvaluationBatch | None, list[tuple[str, str]]]:
    """Return the good images of a batch, and (name, reason) of the bad samples."""
    images, skipped = [], []
    for index in indices:
        try:
            raw = source.read(index)
            captions = _captions(raw, target)
            pixels = preprocess(limit_aspect(decode_image(raw.image)))
            images.append((pixels, captions, raw.label, raw.name, index))
        except BadSampleError as error:
            skipped.append((source.name(index), error.reason))
    if not images:
        return None, skipped
    all_pixels, *about = zip(*images, strict=True)
    shared = empty_shared((len(images), *all_pixels[0].shape), all_pixels[0].dtype)
    return EvaluationBatch(torch.stack(all_pixels, out=shared), *about), skipped


def _captions(raw: RawSample, target: Target) -> tuple[str, ...]:
    if target == "label" and raw.label is None:
        raise BadSampleError("missing label")
    needed = target == "caption" or raw.label is None
    if needed or (target == "either" and any(map(str.strip, raw.captions))):
        return clean_captions(raw.captions)
    return ()
