"""Encoded passes of noise, for objectives to read."""

import torch
import torch.nn.functional as F

from aclip.config import Pass
from aclip.structs import Encoded, StepContext, TowerShape

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
    text_cut=True,
)
B = 5


def made_pass(name: str, views: tuple[str, ...], encoder: str = "online") -> Pass:
    return Pass(name, views, encoder=encoder)


def encoded(p: Pass, seed: int = 0) -> Encoded:
    noise = torch.Generator().manual_seed(seed)
    return Encoded(
        features=F.normalize(torch.randn(len(p.views), B, SHAPE.joint_dim, generator=noise), dim=-1),
        cls=torch.randn(len(p.views), B, SHAPE.width, generator=noise).requires_grad_(p.encoder == "online"),
        scores=None,
        keep_indices=None,
        num_tokens=17,
    )


def step_context(*passes: Pass, caption_ids: tuple[int, ...] = (0, 1, 2, 3, 4), with_text: bool = True) -> StepContext:
    text = F.normalize(torch.randn(B, SHAPE.joint_dim, generator=torch.Generator().manual_seed(99)), dim=-1)
    return StepContext(
        passes={p.name: encoded(p, seed) for seed, p in enumerate(passes)},
        text_features=text if with_text else None,
        caption_ids=torch.tensor(caption_ids),
        logit_scale=torch.tensor(12.0) if with_text else None,
    )
