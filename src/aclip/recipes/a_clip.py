"""A-CLIP: two views on their most attended half, SimCLR and BYOL (Yang et al., arXiv 2212.08653).

    aclip train --recipe a-clip --model ViT-B-16 --data pairs.csv

Arithmetic cost 1.29 of CLIP (text padded to 77 tokens). Published (YFCC15M, ViT-B/16, 25 epochs): 1.16 of
CLIP's time, ImageNet zero-shot 43.9, Flickr30K 62.7 / 42.1, COCO 38.0 / 23.2.

Departs from the paper in the first 2,240 steps (of its 90,000): the EMA momentum rises to the published 0.996 from 0.1.
`--set recipe.ema_momentum.warmup=0` does without.
"""

from dataclasses import replace

from aclip.config import EmaMomentum, ObjectiveConfig, Pass, Recipe

A_CLIP = Recipe(
    name="a-clip",
    title="two views on their most attended half, with SimCLR and BYOL",
    paper="A-CLIP, arXiv 2212.08653",
    views="two_crops_in_context",
    view_options={"scale": (0.5, 1.0), "augmentation": "a-clip"},
    passes=(
        Pass("context", views=("context",), encoder="ema"),
        Pass(
            "masked", views=("a", "b"), masking="attentive", mask_ratio=0.5,
            masking_options={"block_size": 2, "keep": "highest"}, scores_from="context",
        ),
    ),
    objectives=(
        ObjectiveConfig("contrastive", reads=("masked", "captions")),
        ObjectiveConfig("ntxent", reads=("masked",), options={"temperature": 0.1}),
        ObjectiveConfig("byol", reads=("masked", "context"), weight=2.0),
    ),
    ema_momentum=EmaMomentum(0.996, 1.0, warmup=10.0),  # or short runs score with random weights to their end
    freeze=("patch_embedding",),  # as MoCo v3 does for stability
)


def passes_with_ema_at(resolution: float) -> tuple[Pass, ...]:
    """Return A-CLIP's passes with its EMA encoder at another resolution, relative to the model's own."""
    return tuple(replace(p, resolution=resolution) if p.encoder == "ema" else p for p in A_CLIP.passes)
