"""What several test files build on."""

import torch

from aclip.data import RawSample, Source
from aclip.data.augment import AUGMENTATIONS, draw
from aclip.plan import Plan
from aclip.rng import generator
from aclip.structs import Batch, ViewBatch


class Numbers(Source):
    """A source whose samples are their numbers."""

    spec = "numbers"

    def __init__(self, count: int, groups: tuple[int, ...] = ()) -> None:
        self._count = count
        self.groups = groups

    def __len__(self) -> int:
        return self._count

    def name(self, index: int) -> str:
        return str(index)

    def read(self, index: int) -> RawSample:
        return RawSample(str(index), b"", (str(index),))


SOT, EOT = 49406, 49407


def random_batch(plan: Plan, batch_size: int, seed: int = 0, text_length: int = 9) -> Batch:
    """Return a batch of noise in the shape that a plan asks for: random boxes, flips, colours, captions."""
    noise = torch.Generator().manual_seed(seed)
    views = {}
    for name in (view for view in plan.pipeline.names if view in plan.view_sizes):
        size = plan.view_sizes[name]
        top_left = torch.rand(batch_size, 2, generator=noise) * 20
        extent = 30 + torch.rand(batch_size, 2, generator=noise) * 30
        if name == "context":
            top_left, extent = torch.zeros(batch_size, 2), torch.full((batch_size, 2), 80.0)
        drawn = [draw(AUGMENTATIONS["a-clip"], generator(seed, name, i)) for i in range(batch_size)]
        views[name] = ViewBatch(
            pixels=torch.randint(0, 256, (batch_size, 3, *size), generator=noise, dtype=torch.uint8),
            boxes=torch.cat([top_left, extent], dim=1),
            flipped=torch.rand(batch_size, generator=noise) < (0.0 if name == "context" else 0.5),
            augmentation=None if name == "context" else torch.stack([torch.from_numpy(d) for d in drawn]),
        )
    tokens = torch.randint(1, 1000, (batch_size, text_length), generator=noise)
    tokens[:, 0], tokens[:, -1] = SOT, EOT
    return Batch(
        views=views, tokens=tokens, caption_ids=torch.arange(batch_size),
        seeds=torch.randint(0, 2**62, (batch_size,), generator=noise),
    )
