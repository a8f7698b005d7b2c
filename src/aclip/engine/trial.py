"""Batches made of noise: what a step costs does not depend on what the pictures show."""

import math
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from aclip.data.views import Crop
from aclip.plan import Plan
from aclip.structs import Batch, KnownScores, ViewBatch

SPREAD = 0.5
"""Standard deviation of the logarithm of a caption's length, see `caption_lengths`."""

_SOURCE = (240, 320)  # height and width of the picture that the views are cut from


def caption_lengths(count: int, mean: float, longest: int, generator: torch.Generator) -> Int[Tensor, " count"]:
    """Return the lengths of captions in tokens, SOT and EOT included: a log-normal distribution, cut off.

        length = round(exp(N(ln mean - SPREAD^2 / 2, SPREAD^2))), between 3 and `longest`

    With a mean of 14 tokens, half lie between 9 and 17 and one in a hundred is longer than 39.

    Args:
        count: how many.
        mean: of the distribution before it is cut off.
        longest: the text tower's context.
        generator: on the CPU.
    """
    logarithms = torch.randn(count, generator=generator) * SPREAD + (math.log(mean) - SPREAD**2 / 2)
    return logarithms.exp().round().long().clamp(3, longest)


def made_tokens(lengths: Int[Tensor, " B"], width: int, vocabulary: int, generator: torch.Generator) -> Tensor:
    """Return (B, width) int64 tokens of captions of these lengths: random words, EOT (the highest id), zeros."""
    words = torch.randint(1, vocabulary - 2, (len(lengths), width), generator=generator)
    place = torch.arange(width)
    eot = place == lengths[:, None] - 1
    return torch.where(eot, vocabulary - 1, words).masked_fill(place >= lengths[:, None], 0)


def made_batch(
    plan: Plan, batch_size: int, *, text_tokens: float = 14.0, cut_text: bool = True, augmented: bool = True,
    seed: int = 0,
) -> Batch:
    """Return a batch for a plan, on the CPU: the recipe's own crops of one picture of noise, and made captions.

    Args:
        plan: says which views there are, and how large.
        batch_size: pairs.
        text_tokens: mean length of the captions, see `caption_lengths`.
        cut_text: whether the text ends with its longest caption, where the tower allows it, or is padded to the full
            context.
        augmented: whether the recipe's colour augmentation is drawn, to be applied within the step.
        seed: of everything in it.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = plan.shape
    lengths = caption_lengths(batch_size, text_tokens, shape.context_length, generator)
    width = int(lengths.max()) if cut_text and shape.text_cut else shape.context_length
    noise = torch.randint(0, 256, (*_SOURCE, 3), dtype=torch.uint8, generator=generator)
    picture = noise.numpy()
    crops = [plan.pipeline(picture, seed=seed, epoch=0, sample=i, sizes=plan.view_sizes) for i in range(batch_size)]
    return Batch(
        views={name: _stacked([crop[name] for crop in crops], augmented) for name in plan.view_sizes},
        tokens=made_tokens(lengths, width, shape.vocab_size, generator),
        caption_ids=torch.arange(batch_size),
        seeds=torch.randint(0, 2**62, (batch_size,), generator=generator),
    )


def with_known_scores(batch: Batch, plan: Plan, seed: int = 0) -> Batch:
    """Return a batch as in a step in which all scores that serve for several epochs are known: random ones."""
    generator = torch.Generator().manual_seed(seed)
    known = {p.spec.name: KnownScores(
        torch.randint(0, 256, (batch.size, p.num_patches), dtype=torch.uint8, generator=generator), ())
        for p in plan.passes if p.spec.refresh > 1}
    return replace(batch, known={name: scores.to(batch.tokens.device) for name, scores in known.items()})


def _stacked(crops: list[Crop], augmented: bool) -> ViewBatch:
    drawn = [crop.augmentation for crop in crops if crop.augmentation is not None]
    return ViewBatch(
        pixels=torch.from_numpy(np.stack([crop.pixels for crop in crops])),
        boxes=torch.tensor([crop.box for crop in crops], dtype=torch.float32),
        flipped=torch.tensor([crop.flipped for crop in crops]),
        augmentation=torch.from_numpy(np.stack(drawn)) if augmented and drawn else None,
    )
