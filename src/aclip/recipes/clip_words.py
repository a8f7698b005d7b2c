"""CLIP whose image tower also names the words of the caption, as in SuperClass (Huang et al., arXiv 2411.03313).

    aclip train --recipe clip-words --model ViT-B-16 --data pairs.csv

A linear layer on the mean patch token, against the caption's tokens weighted by how rare they are. Cost 1.00 of CLIP:
the layer is counted with the heads, and left out.
"""

from dataclasses import replace

from aclip.config import ObjectiveConfig
from aclip.recipes.clip import CLIP

CLIP_WORDS = replace(
    CLIP,
    name="clip-words",
    title="full view against caption, and a bag of its words",
    paper="CLIP with the head of SuperClass, arXiv 2411.03313",
    objectives=(*CLIP.objectives, ObjectiveConfig("bag_of_words", reads=("full", "captions"))),
)
