"""BYOL: each view predicts what the EMA encoder sees in the other, without captions (Grill et al., arXiv 2006.07733).

    aclip train --recipe byol --model ViT-B-16 --data pairs.csv

The other self-supervised term of A-CLIP alone, with its heads and momentum (0.996 to 1, with our warm-up), and SLIP's
augmentation. Weight 2: BYOL's paper sums over the two directions, the objective averages. A-CLIP's optimization. Saves
an image tower without a projection.
"""

from aclip.config import EmaMomentum, ObjectiveConfig, Pass, Recipe

BYOL = Recipe(
    name="byol",
    title="each view predicts the EMA encoder's of the other, no captions",
    paper="BYOL, arXiv 2006.07733",
    views="two_augs",
    view_options={"scale": (0.08, 1.0), "augmentation": "slip", "flip": 0.5},
    passes=(Pass("augmented", views=("a", "b")), Pass("target", views=("a", "b"), encoder="ema")),
    objectives=(ObjectiveConfig("byol", reads=("augmented", "target"), weight=2.0),),
    ema_momentum=EmaMomentum(0.996, 1.0, warmup=10.0),  # or the target of a short run is its random start
)
