"""Feed batches: worker processes read and crop ahead of the optimizer, in an order that does not depend
on how many of them there are."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from aclip.data.captions import CaptionTokenizer
from aclip.data.dataset import Item, PairDataset
from aclip.data.order import BatchSampler, Request
from aclip.data.views import Crop
from aclip.data.workers import read_ahead
from aclip.structs import Batch, ViewBatch

CutText = Callable[[Tensor], Tensor]
"""Maps (B, T) tokens to (B, T') without the columns that no caption needs."""


class BatchLoader:
    """The batches of a run's steps, in order; iterating again starts again at the first of them.

    Attributes:
        steps_per_epoch: whole batches in an epoch.
    """

    def __init__(
        self,
        read: "ReadBatch",
        sampler: BatchSampler,
        *,
        workers: int,
        prefetch: int,
        pin_memory: bool,
    ) -> None:
        """Combine the parts; see `build_loader`."""
        self.steps_per_epoch = sampler.steps_per_epoch
        self._read = read
        self._sampler = sampler
        self._workers = workers
        self._prefetch = prefetch
        self._pin_memory = pin_memory

    def __len__(self) -> int:
        """Return the number of steps."""
        return len(self._sampler)

    def __iter__(self) -> Iterator[Batch]:
        """Yield this rank's share of every step's batch.

        Raises:
            DataError: a source without usable samples.
        """
        return read_ahead(
            self._read,
            self._sampler,
            workers=self._workers,
            prefetch=self._prefetch,
            pin_memory=self._pin_memory,
        )


class ReadBatch:
    """Answers the requests of one step with their batch; picklable if its parts are."""

    def __init__(self, dataset: PairDataset, cut_text: CutText | None) -> None:
        """Read from `dataset` and shorten tokens with `cut_text`."""
        self._dataset = dataset
        self._cut_text = cut_text

    def __call__(self, requests: Sequence[Request]) -> Batch:
        """Return the batch whose row b answers `requests[b]`."""
        items = [self._dataset[request] for request in requests]
        return collate(items, self._dataset.tokenizer, self._cut_text)


def build_loader(
    dataset: PairDataset,
    *,
    batch_size: int,
    total_steps: int,
    start_step: int = 0,
    workers: int = 0,
    prefetch: int = 4,
    device: torch.device | None = None,
    cut_text: CutText | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> BatchLoader:
    """Return the loader of a run's optimizer steps [`start_step`, `total_steps`).

    The batches are the same for any number of workers, and for any `start_step` the rest of the same
    stream. Neither building nor iterating touches a global random generator.

    Args:
        dataset: the samples; its seed gives the order.
        batch_size: pairs in a step, over all ranks.
        total_steps, start_step: the step after the last, and the first.
        workers: processes that read ahead; 0 reads in this one.
        prefetch: batches that each worker reads ahead.
        device: where batches will go; for CUDA they come in page-locked memory.
        cut_text: shortens the tokens of a batch, see `CutText`; None leaves them at full length.
        rank, world_size: which contiguous slice of every batch is delivered.

    Raises:
        ConfigError: a batch size that does not divide among the ranks.
        DataError: fewer samples than one batch.
    """
    sampler = BatchSampler(
        dataset.source,
        batch_size=batch_size,
        seed=dataset.seed,
        start_step=start_step,
        total_steps=total_steps,
        rank=rank,
        world_size=world_size,
    )
    return BatchLoader(
        ReadBatch(dataset, cut_text),
        sampler,
        workers=workers,
        prefetch=prefetch,
        pin_memory=device is not None and device.type == "cuda",
    )


def collate(items: Sequence[Item], tokenizer: CaptionTokenizer, cut_text: CutText | None = None) -> Batch:
    """Return the batch of `items`, every tensor's row b from item b."""
    tokens = torch.stack([item.tokens for item in items])
    return Batch(
        views={name: _stack([item.views[name] for item in items]) for name in items[0].views},
        tokens=tokens if cut_text is None else cut_text(tokens).contiguous(),
        caption_ids=torch.tensor([item.caption_id for item in items], dtype=torch.int64),
        seeds=torch.tensor([item.seed for item in items], dtype=torch.int64),
        keys=tuple(item.key for item in items),
        skipped=tuple(dict.fromkeys(bad for item in items for bad in item.skipped)),
        truncated=tokenizer.count_truncated(tokens),
    )


def _stack(crops: Sequence[Crop]) -> ViewBatch:
    augmentations = [crop.augmentation for crop in crops if crop.augmentation is not None]
    # Colours come pixel by pixel and leave plane by plane, as towers read them: one copy does both.
    pixels = torch.empty((len(crops), *crops[0].pixels.shape), dtype=torch.uint8)
    for row, crop in zip(pixels.numpy(), crops, strict=True):
        row[...] = crop.pixels
    return ViewBatch(
        pixels=pixels,
        boxes=torch.tensor([crop.box for crop in crops], dtype=torch.float32),
        flipped=torch.tensor([crop.flipped for crop in crops], dtype=torch.bool),
        augmentation=torch.from_numpy(np.stack(augmentations)) if augmentations else None,
    )
