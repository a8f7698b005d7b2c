"""An evaluator of one's own: how far apart images and their captions lie.

    python docs/examples/own_evaluator.py runs/first pairs.csv
"""

import sys

import torch

import aclip
from aclip.evaluation import ImageFeatures, TextEncoder


def modality_gap(images: ImageFeatures, texts: TextEncoder) -> dict[str, torch.Tensor]:
    """Return the distance between the mean image feature and the mean caption feature (arXiv 2203.02053)."""
    captions = texts([captions[0] for captions in images.captions])
    return {"modality gap": (images.features.mean(dim=0) - captions.mean(dim=0)).norm()}


aclip.EVALUATORS["modality_gap"] = modality_gap

if __name__ == "__main__":
    for result in aclip.evaluate(sys.argv[1], data=sys.argv[2], evaluators=("modality_gap",)):
        print(result.set, result.metric, result.value)
