"""MAE: predict the pixels of the removed three quarters from the rest, without captions (He et al., arXiv 2111.06377).

    aclip train --recipe mae --model ViT-B-16 --data pairs.csv

A decoder of 8 blocks, 512 wide (two thirds of narrower towers), mean squared error on pixels normalised per patch.
Weight decay and betas are MAE's, the learning rate A-CLIP's. Saves an image tower without a projection.
"""

from aclip.config import ObjectiveConfig, Optimization, Pass, Recipe

MAE = Recipe(
    name="mae",
    title="pixels of the removed patches, no captions",
    paper="MAE, arXiv 2111.06377",
    views="one_crop",
    view_options={"scale": (0.2, 1.0), "flip": 0.5},
    passes=(Pass("masked", views=("a",), masking="uniform", mask_ratio=0.75),),
    objectives=(ObjectiveConfig("reconstruction", reads=("masked",), options={"decoder_layers": 8}),),
    optimization=Optimization(weight_decay=0.05, betas=(0.9, 0.95)),
)
