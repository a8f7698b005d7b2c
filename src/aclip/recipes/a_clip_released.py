"""A-CLIP as the authors' code computes it, to compare with what the paper says.

    aclip train --recipe a-clip-released --model ViT-B-16 --data pairs.csv

Differs from `a-clip` in five named options: the EMA momentum has no warm-up; SimCLR compares view 1 with itself; the
scored box often misses a part of a view; patches outside it score 0 and are dropped; the count of kept blocks is
floor(n * kept share) + 1. (The release, patched to run, also masks nothing by its documented command, and
moves the EMA inside the forward pass; neither is reproduced.)
"""

from dataclasses import replace

from aclip.config import EmaMomentum
from aclip.recipes.a_clip import A_CLIP

A_CLIP_RELEASED = replace(
    A_CLIP,
    name="a-clip-released",
    title="A-CLIP with the faults of its authors' code",
    paper="the public release of A-CLIP",
    view_options={**A_CLIP.view_options, "context": "released"},
    passes=tuple(
        replace(p, score_padding="zeros", masking_options={**p.masking_options, "rounding": "released"})
        if p.masking == "attentive" else p
        for p in A_CLIP.passes
    ),
    ema_momentum=EmaMomentum(0.996, 1.0),
    objectives=tuple(
        replace(o, options={**o.options, "views": (0, 0)}) if o.name == "ntxent" else o
        for o in A_CLIP.objectives
    ),
)
