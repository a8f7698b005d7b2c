"""CLIP: one full view against its caption (Radford et al., arXiv 2103.00020).

    aclip train --recipe clip --model ViT-B-16 --data pairs.csv

Cost 1.00 by definition. Published in the A-CLIP paper's comparison (YFCC15M, ViT-B/16, 25 epochs):
ImageNet zero-shot 37.6, Flickr30K 51.4 / 32.6, COCO 27.9 / 17.6 (R@1 image-to-text / text-to-image).
"""

from aclip.config import ObjectiveConfig, Pass, Recipe

CLIP = Recipe(
    name="clip",
    title="full view against caption",
    paper="CLIP, arXiv 2103.00020",
    views="one_crop",
    view_options={"scale": (0.5, 1.0)},
    passes=(Pass("full", views=("a",)),),
    objectives=(ObjectiveConfig("contrastive", reads=("full", "captions")),),
)
