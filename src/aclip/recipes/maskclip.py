"""MaskCLIP: CLIP with masked self-distillation (Dong et al., arXiv 2208.12262), a reconstruction: no code was released.

    aclip train --recipe maskclip --model ViT-B-16 --data pairs.csv            image part
    aclip train --recipe maskclip-text --model ViT-B-16 --data pairs.csv       with masked language modelling

The contrast sees the full picture. A second pass sees a random quarter of it, and a decoder predicts at the missing
patches what the EMA encoder makes of the whole. Both weights are 0.05; at 1 the text term falls below plain CLIP.
Arithmetic cost of the image part 1.57 of CLIP. Published in the A-CLIP paper's comparison (YFCC15M, ViT-B/16, 25
epochs): 1.56 of CLIP's time, ImageNet 42.7, Flickr30K 60.0 / 38.8, COCO 34.1 / 21.2.
"""

from dataclasses import replace

from aclip.config import EmaMomentum, ObjectiveConfig, Pass, Recipe, TextPass

MASKCLIP = Recipe(
    name="maskclip",
    title="full view against caption, and masked self-distillation (a reconstruction)",
    paper="MaskCLIP, arXiv 2208.12262",
    views="one_crop",
    view_options={"scale": (0.5, 1.0)},
    passes=(
        Pass("full", views=("a",)),
        Pass("masked", views=("a",), masking="uniform", mask_ratio=0.75),
        Pass("teacher", views=("a",), encoder="ema"),
    ),
    objectives=(
        ObjectiveConfig("contrastive", reads=("full", "captions")),
        ObjectiveConfig("masked_distillation", reads=("masked", "teacher"), weight=0.05),
    ),
    ema_momentum=EmaMomentum(0.996, 1.0, warmup=10.0),  # or the teacher of a short run is its random start
)

MASKCLIP_TEXT = replace(
    MASKCLIP,
    name="maskclip-text",
    title="MaskCLIP with its text part, masked language modelling (a reconstruction)",
    texts=(TextPass("captions"), TextPass("hidden", mask_ratio=0.2)),
    objectives=(*MASKCLIP.objectives, ObjectiveConfig("masked_language", reads=("hidden",), weight=0.05)),
)
