"""Which patches a view keeps: one strategy a file, one line each in `MASKING`.

A strategy is built from a `mask_ratio` and its options, and called with a `MaskingContext`; it returns
`keep_indices`, (B, K) int64 ascending on the patch grid. To add one: a file with a class that follows
`MaskingStrategy`, and a line in the table; the contract tests run over the table.
"""

from aclip.masking.attentive import AttentiveMasking
from aclip.masking.base import (
    MaskingContext,
    MaskingStrategy,
    fitting_block_size,
    kept_blocks_to_patches,
    num_keep,
)
from aclip.masking.crop_scores import crop_scores
from aclip.masking.none import NoMasking
from aclip.masking.uniform import UniformMasking

MASKING: dict[str, type[MaskingStrategy]] = {
    "none": NoMasking,
    "uniform": UniformMasking,
    "attentive": AttentiveMasking,
}

__all__ = [
    "MASKING",
    "AttentiveMasking",
    "MaskingContext",
    "MaskingStrategy",
    "NoMasking",
    "UniformMasking",
    "crop_scores",
    "fitting_block_size",
    "kept_blocks_to_patches",
    "num_keep",
]
