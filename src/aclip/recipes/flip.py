"""FLIP: CLIP on a random half of the patches (Li et al., arXiv 2212.00794).

    aclip train --recipe flip --model ViT-B-16 --data pairs.csv

Arithmetic cost 0.57 of CLIP at half of the patches, 0.36 at a quarter (`--mask-ratio 0.75`). Published in
the A-CLIP paper's comparison as one random view at 50 %: ImageNet 35.0, Flickr30K 48.8 / 32.5, COCO
28.9 / 16.6. Two deviations from FLIP's paper: the image feature is the model's own CLS token rather than
the mean of all tokens, and the unmasked tuning phase at the end is left to `--unmasked-tuning`.
"""

from aclip.config import ObjectiveConfig, Pass, Recipe

FLIP = Recipe(
    name="flip",
    title="a random half of the patches",
    paper="FLIP, arXiv 2212.00794",
    views="one_crop",
    view_options={"scale": (0.5, 1.0)},
    passes=(Pass("masked", views=("a",), masking="uniform", mask_ratio=0.5),),
    objectives=(ObjectiveConfig("contrastive", reads=("masked", "captions")),),
)
