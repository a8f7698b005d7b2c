"""SimCLR: two augmented views of a picture against all others, without captions (Chen et al., arXiv 2002.05709).

    aclip train --recipe simclr --model ViT-B-16 --data pairs.csv

The self-supervised term of SLIP and A-CLIP alone: their head, temperature 0.1, SLIP's augmentation, A-CLIP's
optimization. Saves an image tower without a projection; evaluate it with a linear probe, or start a CLIP from it with
`--model RUN`.
"""

from aclip.config import ObjectiveConfig, Pass, Recipe

SIMCLR = Recipe(
    name="simclr",
    title="two augmented views against other pictures, no captions",
    paper="SimCLR, arXiv 2002.05709",
    views="two_augs",
    view_options={"scale": (0.08, 1.0), "augmentation": "slip", "flip": 0.5},
    passes=(Pass("augmented", views=("a", "b")),),
    objectives=(ObjectiveConfig("ntxent", reads=("augmented",), options={"temperature": 0.1}),),
)
