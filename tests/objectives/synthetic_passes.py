"""Encoded passes of noise for objectives to read."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F

from aclip.config import Pass, TextPass
from aclip.structs import Encoded, EncodedText, StepContext, TowerShape

SHAPE = TowerShape(
    image_size=(32, 32),
    patch_size=(8, 8),
    width=12,
    layers=2,
    heads=2,
    mlp_width=48,
    joint_dim=6,
    num_prefix_tokens=1,
    text_width=8,
    text_layers=2,
    text_mlp_width=32,
    context_length=16,
    vocab_size=40,
    text_cut=True,
)
B, GRID, NUM_PATCHES, LENGTH = 5, (4, 4), 16, 9
SOT, EOT = SHAPE.vocab_size - 2, SHAPE.vocab_size - 1
CAPTIONS = {"captions": TextPass()}
HIDDEN = {"hidden": TextPass(mask_ratio=0.3)}


def masked(views: tuple[str, ...] = ("a", "b"), mask_ratio: float = 0.75, fill: bool = False) -> dict[str, Pass]:
    return {"masked": Pass(views=views, masking="uniform", mask_ratio=mask_ratio, fill=fill)}


def encoded(p: Pass, seed: int = 0) -> Encoded:
    noise = torch.Generator().manual_seed(seed)
    views, trained = len(p.views), p.encoder == "online"
    kept, keep_indices = NUM_PATCHES, None
    if p.mask_ratio > 0:
        kept = round(NUM_PATCHES * (1 - p.mask_ratio))
        order = torch.rand(views, B, NUM_PATCHES, generator=noise).argsort(dim=-1)
        keep_indices = order[..., :kept].sort(dim=-1).values
    tokens = NUM_PATCHES if p.fill else kept
    return Encoded(
        features=F.normalize(torch.randn(views, B, SHAPE.joint_dim, generator=noise), dim=-1),
        cls=torch.randn(views, B, SHAPE.width, generator=noise).requires_grad_(trained),
        scores=None,
        keep_indices=keep_indices,
        num_tokens=tokens + 1,
        grid_size=GRID,
        pixels=torch.randn(views, B, 3, 32, 32, generator=noise),
        patches=torch.randn(views, B, tokens, SHAPE.width, generator=noise).requires_grad_(trained),
    )


def encoded_text(text: TextPass) -> EncodedText:
    """Return captions of 1 to 7 words; a pass that hides tokens hides words 1 and 3 of each caption."""
    noise = torch.Generator().manual_seed(99)
    tokens = torch.zeros(B, LENGTH, dtype=torch.int64)
    for row, words in enumerate((7, 1, 4, 7, 3)):
        tokens[row, 0], tokens[row, words + 1] = SOT, EOT
        tokens[row, 1 : words + 1] = torch.randint(1, SOT, (words,), generator=noise)
    if text.mask_ratio == 0:
        return EncodedText(tokens, F.normalize(torch.randn(B, SHAPE.joint_dim, generator=noise), dim=-1))
    position = torch.arange(LENGTH)
    hidden = ((position == 1) | (position == 3)) & (position < tokens.argmax(dim=1, keepdim=True))
    states = torch.randn(B, LENGTH, SHAPE.text_width, generator=noise).requires_grad_(True)
    return EncodedText(tokens, hidden=hidden, states=states)


def step_context(
    reads: Mapping[str, Pass | TextPass], caption_ids: tuple[int, ...] = (0, 1, 2, 3, 4)
) -> StepContext:
    """Return a step in which the passes `reads`, of images and captions, were encoded."""
    images = {name: p for name, p in reads.items() if isinstance(p, Pass)}
    texts = {name: encoded_text(p) for name, p in reads.items() if isinstance(p, TextPass)}
    return StepContext(
        passes={name: encoded(p, seed) for seed, (name, p) in enumerate(images.items())},
        texts=texts,
        caption_ids=torch.tensor(caption_ids),
        logit_scale=torch.tensor(12.0) if texts else None,
    )
