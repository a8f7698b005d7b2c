"""Recipes with a frozen encoder: finetune and finetune-attentive, which forget less, distill, and align.

    aclip train --model ViT-B-32:laion2b_s34b_b79k --data pairs.csv
    aclip train --recipe distill --teacher ViT-L-14:openai --model ViT-B-32 --data pairs.csv

The frozen encoder is the model that training started from, or `--teacher`: both towers, without gradient. Costs are
arithmetic at ViT-B/16, relative to CLIP.
"""

from dataclasses import replace

from aclip.config import ObjectiveConfig, Optimization, Pass, TextPass
from aclip.recipes.clip import CLIP

FINETUNE = replace(
    CLIP,
    name="finetune",
    title="CLIP from pretrained weights, held to what they knew",
    paper="CLIP with the hybrid distillation of CLIP-Refine, arXiv 2504.12717",
    passes={"full": Pass(views=("a",)), "frozen": Pass(views=("a",), encoder="frozen")},
    texts={"captions": TextPass(), "frozen-captions": TextPass(encoder="frozen")},
    objectives={
        **CLIP.objectives,
        "anchor": ObjectiveConfig(reads=("full", "captions", "frozen", "frozen-captions")),
    },
    optimization=Optimization(lr=1e-5, end_lr=0.0, warmup_epochs=0.1, warmup_start_lr=0.0, weight_decay=0.1),
)
"""Cost 1.33. The default with pretrained weights."""

FINETUNE_ATTENTIVE = replace(
    FINETUNE,
    name="finetune-attentive",
    title="finetune on the half of each image that the frozen encoder attends to",
    passes={
        "frozen": FINETUNE.passes["frozen"],
        "masked": Pass(views=("a",), masking="attentive", mask_ratio=0.5, masking_options={"block_size": 2},
                       scores_from="frozen"),
    },
    objectives={
        "contrastive": ObjectiveConfig(reads=("masked", "captions")),
        "anchor": ObjectiveConfig(reads=("masked", "captions", "frozen", "frozen-captions")),
    },
)
"""Cost 0.91. A pretrained model has never seen half an image, and is used on whole ones: end with unmasked steps,
`--unmasked-tuning 0.15`."""

DISTILL = replace(
    CLIP,
    name="distill",
    title="the similarities that a teacher sees in each batch",
    paper="the distillation of MobileCLIP, arXiv 2311.17049",
    passes=FINETUNE.passes,
    texts=FINETUNE.texts,
    objectives={"affinity": ObjectiveConfig(reads=("full", "captions", "frozen", "frozen-captions"))},
)
"""Cost 1.33 and more, by the teacher's size. The teacher is `--teacher MODEL`, which reads the same tokens; its input
size and widths may differ."""

ALIGN = replace(
    CLIP,
    name="align",
    title="only the projections into the joint space, between towers that stay as they are",
    paper="SAIL, arXiv 2412.04616, and ShareLock, arXiv 2410.07173",
    freeze=("towers",),
    optimization=Optimization(lr=1e-3, warmup_epochs=0.1, warmup_start_lr=0.0, weight_decay=0.1),
)
"""Cost 0.33, and the memory of a forward pass. For an image and a text tower that are good apart; a model without
projections, such as a SigLIP, has nothing to train. The papers' projectors have hidden layers: `"timm_proj": "mlp"` and
`"hf_proj_type": "mlp"` in the model's config."""

FROZEN_RECIPES = (FINETUNE, FINETUNE_ATTENTIVE, DISTILL, ALIGN)
