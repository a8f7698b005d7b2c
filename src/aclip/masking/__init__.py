"""Masking: which patches of a view, and which tokens of a caption, are encoded.

A strategy scores the patches of a view; its base class keeps the K highest. To add one from a script:

    import torch
    from aclip.masking import MASKING, MaskingStrategy

    class CentreMasking(MaskingStrategy):
        def scores(self, context):
            rows, columns = (torch.linspace(-1, 1, n, device=context.device) for n in context.grid_size)
            return -(rows[:, None].abs() + columns.abs()).flatten().expand(context.batch_size, -1)

    MASKING["centre"] = CentreMasking

A pass of a recipe then names it: `masking="centre", mask_ratio=0.5`; further constructor arguments are its
`masking_options`. `TEXT_REDUCTIONS` is the same table for captions.
"""

from aclip.masking.attentive import AttentiveMasking, Keep, crop_scores
from aclip.masking.base import MaskingContext, MaskingStrategy, NoMasking, fitting_block_size, num_keep
from aclip.masking.strategies import ClusterMasking, EdgeMasking, GaussianMasking, UniformMasking
from aclip.masking.text import TEXT_REDUCTIONS, HiddenTokens, TextReduction, TextReductionContext, hide_tokens

MASKING: dict[str, type[MaskingStrategy]] = {
    "none": NoMasking,
    "uniform": UniformMasking,
    "attentive": AttentiveMasking,
    "gaussian": GaussianMasking,
    "cluster": ClusterMasking,
    "edge": EdgeMasking,
}
"""Masking strategies by name; add your own.

Example:
    >>> list(aclip.MASKING)
    ['none', 'uniform', 'attentive', 'gaussian', 'cluster', 'edge']
"""

__all__ = ["MASKING", "TEXT_REDUCTIONS", "AttentiveMasking", "ClusterMasking", "EdgeMasking", "GaussianMasking",
           "HiddenTokens", "Keep", "MaskingContext", "MaskingStrategy", "NoMasking", "TextReduction",
           "TextReductionContext", "UniformMasking", "crop_scores", "fitting_block_size", "hide_tokens", "num_keep"]
