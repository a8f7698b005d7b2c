"""Sources, models, recipes and batches that several test files use."""

import os
import signal
from dataclasses import replace
from typing import Any

import pytest
import torch

from aclip import models
from aclip.config import Recipe
from aclip.data import RawSample, Source
from aclip.data.augment import AUGMENTATIONS, draw
from aclip.method import Method
from aclip.models.lora import adapt
from aclip.plan import Plan, resolve
from aclip.rng import generator
from aclip.structs import Batch, TowerShape, ViewBatch
from aclip.trainer import Trainer

SOT, EOT = 49406, 49407
VIT_B_16 = TowerShape(
    image_size=(224, 224),
    patch_size=(16, 16),
    width=768,
    layers=12,
    heads=12,
    mlp_width=3072,
    joint_dim=512,
    num_prefix_tokens=1,
    text_width=512,
    text_layers=12,
    text_mlp_width=2048,
    context_length=77,
    vocab_size=49408,
    text_cut=True,
)
SMALL_HEADS = {"ntxent": {"hidden": 32, "out": 16}, "byol": {"hidden": 32, "out": 16}}


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


def small(recipe: Recipe) -> Recipe:
    """Return the recipe with narrow heads: their width changes nothing that is tested."""
    return replace(recipe, objectives={name: replace(o, options={**o.options, **SMALL_HEADS.get(name, {})})
                                       for name, o in recipe.objectives.items()})


def build(recipe: Recipe, model_name: str = "vit-tiny", image_size: int | None = None, lora: int = 0) -> Method:
    """Return a recipe, with narrow heads, on a small model, all of it trained or low-rank updates of its blocks."""
    torch.manual_seed(0)
    plan = resolve(small(recipe), models.shape_of(models.model_config(model_name, image_size=image_size)))
    model = models.create_model(model_name, with_text=plan.uses_text, image_size=image_size)
    if lora:
        adapt(model, lora, ("image", "text"))
    method = Method(model, plan, (0.5,) * 3, (0.25,) * 3).train()
    if method.frozen is not None:  # as after some steps: a copy that agrees with the model teaches nothing
        with torch.no_grad():
            for parameter in method.frozen.parameters():
                parameter += 0.02 * torch.randn(parameter.shape)
    return method


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


def stop_after(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a run get SIGTERM when it has done so many steps."""
    step = Trainer.train_step

    def stopping(self: Any, *given: Any, **options: Any) -> Any:
        output = step(self, *given, **options)
        if self.step == steps:
            os.kill(os.getpid(), signal.SIGTERM)
        return output

    monkeypatch.setattr(Trainer, "train_step", stopping)
