"""Which patches a view keeps: one strategy a file, one line each in `MASKING`.

A strategy is built from a `mask_ratio` and its options, and called with a `MaskingContext`; it returns
`keep_indices`, (B, K) int64 ascending on the patch grid. To add one: a file with a class that follows
`MaskingStrategy`, and a line in the table; the contract tests run over the table.
"""

from aclip.masking.attentive import AttentiveMasking, Keep
from aclip.masking.base import (
    MaskingContext,
    MaskingStrategy,
    fitting_block_size,
    kept_blocks_to_patches,
    num_keep,
)
from aclip.masking.cluster import ClusterMasking
from aclip.masking.crop_scores import crop_scores
from aclip.masking.edge import EdgeMasking
from aclip.masking.gaussian import GaussianMasking
from aclip.masking.hide_tokens import HiddenTokens, hide_tokens
from aclip.masking.none import NoMasking
from aclip.masking.score_bytes import from_bytes, to_bytes
from aclip.masking.text_reduction import TEXT_REDUCTIONS, TextReduction, TextReductionContext
from aclip.masking.uniform import UniformMasking

MASKING: dict[str, type[MaskingStrategy]] = {
    "none": NoMasking,
    "uniform": UniformMasking,
    "attentive": AttentiveMasking,
    "gaussian": GaussianMasking,
    "cluster": ClusterMasking,
    "edge": EdgeMasking,
}

__all__ = [
    "MASKING",
    "TEXT_REDUCTIONS",
    "AttentiveMasking",
    "ClusterMasking",
    "EdgeMasking",
    "GaussianMasking",
    "HiddenTokens",
    "Keep",
    "MaskingContext",
    "MaskingStrategy",
    "NoMasking",
    "TextReduction",
    "TextReductionContext",
    "UniformMasking",
    "crop_scores",
    "fitting_block_size",
    "from_bytes",
    "hide_tokens",
    "kept_blocks_to_patches",
    "num_keep",
    "to_bytes",
]
