"""The ablations of the A-CLIP paper (arXiv 2212.08653, section 4), each A-CLIP or CLIP with one thing changed.

    aclip compare --recipes clip random-2x50 attentive-2x50 a-clip --model ViT-B-16 --data pairs.csv \\
                  --validation held-out.csv --epochs 25 --seeds 0 1 2 --output comparisons/ablations

Published, ImageNet zero-shot on YFCC15M, ViT-B/16, 25 epochs: CLIP 37.6; random-1x50 35.0, random-2x50 38.0,
attentive-1x50 39.5, attentive-2x50 41.3, A-CLIP 43.9; attentive-lowest 28.5 is known at second hand.

`random-*` draw single patches, as FLIP does, and `attentive-*` blocks of 2 x 2, as the paper does; to change the choice
alone, `--set 'recipe.passes.masked.masking_options={"block_size": 2}'`. `a-clip-fixed-momentum` equals `a-clip` in runs
within the momentum's warm-up; `--set recipe.ema_momentum.warmup=0` compares the two in short ones.
"""

from dataclasses import replace
from typing import Any

from aclip.config import EmaMomentum, ObjectiveConfig, Pass, Recipe
from aclip.recipes.a_clip import A_CLIP, passes_with_ema_at
from aclip.recipes.clip import CLIP


def masked_views(views: tuple[str, ...], mask_ratio: float, masking: str, **options: Any) -> tuple[Pass, ...]:
    """Return the passes of a recipe that masks some views, scored by the EMA encoder where the masking ranks."""
    scored = masking == "attentive"
    masked = Pass("masked", views, masking=masking, mask_ratio=mask_ratio,
                  masking_options=options, scores_from="context" if scored else None)
    return (Pass("context", ("context",), encoder="ema"), masked) if scored else (masked,)


def without_ssl(name: str, title: str, passes: tuple[Pass, ...], views: str = "two_crops_in_context") -> Recipe:
    """Return A-CLIP with other passes and the contrast alone."""
    scored = any(p.encoder == "ema" for p in passes)
    return replace(
        A_CLIP, name=name, title=title, views=views, passes=passes,
        objectives=(ObjectiveConfig("contrastive", reads=("masked", "captions")),),
        ema_momentum=A_CLIP.ema_momentum if scored else None,
    )


def with_objectives(name: str, title: str, *names: str) -> Recipe:
    """Return A-CLIP with some of its objectives."""
    objectives = tuple(o for o in A_CLIP.objectives if o.name in names)
    return replace(A_CLIP, name=name, title=title, objectives=objectives)


def with_ema_resolution(name: str, resolution: float) -> Recipe:
    """Return A-CLIP whose EMA encoder sees another resolution."""
    return replace(
        A_CLIP, name=name, title=f"A-CLIP with the EMA encoder at {resolution:g} of the resolution",
        passes=passes_with_ema_at(resolution),
    )


ABLATIONS: tuple[Recipe, ...] = (
    replace(CLIP, name="clip-augmented", title="CLIP on one view, augmented as A-CLIP's are",
            view_options={**CLIP.view_options, "augmentation": "a-clip"}),
    without_ssl("random-1x50", "one view, a random half", masked_views(("a",), 0.5, "uniform"), "two_augs"),
    without_ssl("random-2x50", "two views, a random half of each",
                masked_views(("a", "b"), 0.5, "uniform"), "two_augs"),
    without_ssl("attentive-1x50", "one view, its most attended half",
                masked_views(("a",), 0.5, "attentive", block_size=2)),
    without_ssl("attentive-2x50", "two views on their most attended half, no self-supervision",
                masked_views(("a", "b"), 0.5, "attentive", block_size=2)),
    without_ssl("attentive-lowest", "two views on their least attended half",
                masked_views(("a", "b"), 0.5, "attentive", block_size=2, keep="lowest")),
    without_ssl("attentive-mixed", "two views, half of the kept by attention, half at random",
                masked_views(("a", "b"), 0.5, "attentive", block_size=2, keep="mixed")),
    without_ssl("attentive-3x33", "three views on their most attended third",
                masked_views(("a", "b", "c"), 2 / 3, "attentive", block_size=2), "three_crops_in_context"),
    with_objectives("a-clip-online", "A-CLIP with SimCLR alone (online to online)", "contrastive", "ntxent"),
    with_objectives("a-clip-ema", "A-CLIP with BYOL alone (online to EMA)", "contrastive", "byol"),
    with_ema_resolution("a-clip-ema-75", 0.75),
    with_ema_resolution("a-clip-ema-25", 0.25),
    replace(A_CLIP, name="a-clip-fixed-momentum", title="A-CLIP with an EMA momentum that stays at 0.996",
            ema_momentum=EmaMomentum(0.996, 0.996, warmup=10.0)),
)
