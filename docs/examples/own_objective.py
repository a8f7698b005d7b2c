"""An objective of one's own: features of unit variance in every dimension (the variance term of VICReg, 2105.04906).

    python docs/examples/own_objective.py pairs.csv runs/variance
"""

import sys
from dataclasses import replace

import torch

import aclip
from aclip.objectives import Objective
from aclip.structs import StepContext, TowerShape


class VarianceObjective(Objective):
    """Pushes the standard deviation of every feature over the batch above `target`."""

    def __init__(self, reads: dict[str, aclip.Pass], shape: TowerShape, target: float = 1.0) -> None:
        super().__init__(reads, shape)
        self.target = target

    def forward(self, context: StepContext) -> torch.Tensor:
        """Return the loss, a scalar."""
        features = context.passes[self.reads[0]].cls.float().flatten(0, 1)
        return torch.relu(self.target - features.std(dim=0)).mean()


aclip.OBJECTIVES["variance"] = VarianceObjective

if __name__ == "__main__":
    clip = aclip.RECIPES["clip"]
    variance = aclip.ObjectiveConfig(reads=("full",), weight=0.1, options={"target": 0.5})
    aclip.train(recipe=replace(clip, name="clip-variance", objectives={**clip.objectives, "variance": variance}),
                model="vit-micro", data=sys.argv[1], output=sys.argv[2], epochs=1)
