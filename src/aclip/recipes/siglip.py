"""SigLIP: CLIP with a sigmoid for every pair instead of a softmax over the batch (Zhai et al., arXiv 2303.15343).

    aclip train --recipe siglip --model ViT-B-16 --data pairs.csv

Cost 1.00 of CLIP. The scale starts where the model's does (1 / 0.07; the paper starts at 10), so does the bias of a
SigLIP model; of others it starts at -10.
"""

from dataclasses import replace

from aclip.config import ObjectiveConfig
from aclip.recipes.clip import CLIP

SIGLIP = replace(
    CLIP,
    name="siglip",
    title="full view against caption, pair by pair",
    paper="SigLIP, arXiv 2303.15343",
    objectives=(ObjectiveConfig("sigmoid", reads=("full", "captions")),),
)
