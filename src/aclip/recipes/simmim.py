"""SimMIM: predict the pixels behind mask tokens with one linear layer, without captions (Xie et al., arXiv 2111.09886).

    aclip train --recipe simmim --model ViT-B-16 --data pairs.csv

60 % masked in blocks of 2 x 2 patches (32 pixels at patch 16); the sequence keeps its full length, so nothing is saved.
L1 on the masked pixels. Weight decay and betas are SimMIM's, the learning rate A-CLIP's. Saves an image tower without a
projection.
"""

from aclip.config import ObjectiveConfig, Optimization, Pass, Recipe

SIMMIM = Recipe(
    name="simmim",
    title="pixels behind mask tokens, no captions",
    paper="SimMIM, arXiv 2111.09886",
    views="one_crop",
    view_options={"scale": (0.67, 1.0), "flip": 0.5},
    passes=(Pass("masked", views=("a",), masking="uniform", mask_ratio=0.6, masking_options={"block_size": 2},
                 fill=True),),
    objectives=(ObjectiveConfig("reconstruction", reads=("masked",),
                                options={"decoder_layers": 0, "loss": "l1", "normalize": False}),),
    optimization=Optimization(weight_decay=0.05, betas=(0.9, 0.999)),
)
