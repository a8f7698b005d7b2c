"""Recipes that learn from images alone: mae, simmim, simclr, byol.

    aclip train --recipe mae --model ViT-B-16 --data images/

They save an image tower without a projection: evaluate it with a linear probe, or start a CLIP from it with
`--model RUN`. Where a paper's setting is not stated, A-CLIP's optimization is used.
"""

from aclip.config import EmaMomentum, ObjectiveConfig, Optimization, Pass, Recipe

MAE = Recipe(
    name="mae",
    title="pixels of the removed patches, no captions",
    paper="MAE, arXiv 2111.06377",
    views="one_crop",
    view_options={"scale": (0.2, 1.0), "flip": 0.5},
    passes={"masked": Pass(views=("a",), masking="uniform", mask_ratio=0.75)},
    objectives={"reconstruction": ObjectiveConfig(reads=("masked",), options={"decoder_layers": 8})},
    optimization=Optimization(weight_decay=0.05, betas=(0.9, 0.95)),
)
"""Cost 0.47. A decoder of 8 blocks, 512 wide (two thirds of narrower towers); mean squared error on pixels normalised
per patch. Weight decay and betas are MAE's."""

SIMMIM = Recipe(
    name="simmim",
    title="pixels behind mask tokens, no captions",
    paper="SimMIM, arXiv 2111.09886",
    views="one_crop",
    view_options={"scale": (0.67, 1.0), "flip": 0.5},
    passes={"masked": Pass(views=("a",), masking="uniform", mask_ratio=0.6, masking_options={"block_size": 2},
                           fill=True)},
    objectives={"reconstruction": ObjectiveConfig(
        reads=("masked",), options={"decoder_layers": 0, "loss": "l1", "normalize": False})},
    optimization=Optimization(weight_decay=0.05, betas=(0.9, 0.999)),
)
"""Cost 0.85. 60 % masked in blocks of 2 x 2 patches (32 pixels at patch 16); the sequence keeps its full length. L1 on
the masked pixels through one linear layer. Weight decay and betas are SimMIM's."""

SIMCLR = Recipe(
    name="simclr",
    title="two augmented views against other images, no captions",
    paper="SimCLR, arXiv 2002.05709",
    views="two_augs",
    view_options={"scale": (0.08, 1.0), "augmentation": "slip", "flip": 0.5},
    passes={"augmented": Pass(views=("a", "b"))},
    objectives={"ntxent": ObjectiveConfig(reads=("augmented",), options={"temperature": 0.1})},
)
"""Cost 1.71. The self-supervised term of SLIP and A-CLIP alone: their head, temperature 0.1, SLIP's augmentation."""

BYOL = Recipe(
    name="byol",
    title="each view predicts the EMA encoder's of the other, no captions",
    paper="BYOL, arXiv 2006.07733",
    views="two_augs",
    view_options={"scale": (0.08, 1.0), "augmentation": "slip", "flip": 0.5},
    passes={"augmented": Pass(views=("a", "b")), "target": Pass(views=("a", "b"), encoder="ema")},
    objectives={"byol": ObjectiveConfig(reads=("augmented", "target"), weight=2.0)},
    ema_momentum=EmaMomentum(0.996, 1.0, warmup=10.0),  # without warm-up the target of a short run stays random
)
"""Cost 2.28. The other self-supervised term of A-CLIP alone, with its heads and momentum, and SLIP's augmentation.
Weight 2: BYOL's paper sums over the two directions, the objective averages."""

IMAGE_RECIPES = (MAE, SIMMIM, SIMCLR, BYOL)
