"""A masking strategy of one's own: keep the patches nearest to the centre.

    python docs/examples/own_masking.py pairs.csv runs/centre
"""

import sys

import torch

import aclip
from aclip.masking import MaskingContext, MaskingStrategy


class CentreMasking(MaskingStrategy):
    """Scores patches by their distance from the centre of the image; the base class keeps the highest."""

    def scores(self, context: MaskingContext) -> torch.Tensor:
        """Return (B, N) scores, N patches row by row."""
        rows, columns = (torch.linspace(-1, 1, n, device=context.device) for n in context.grid_size)
        return -(rows[:, None].abs() + columns.abs()).flatten().expand(context.batch_size, -1)


aclip.MASKING["centre"] = CentreMasking

if __name__ == "__main__":
    aclip.train(recipe=aclip.Recipe(
        name="centre", title="the central half", paper="this script", views="one_crop",
        passes={"masked": aclip.Pass(views=("a",), masking="centre", mask_ratio=0.5)},
        objectives={"contrastive": aclip.ObjectiveConfig(reads=("masked", "captions"))},
    ), model="vit-micro", data=sys.argv[1], output=sys.argv[2], epochs=1)
