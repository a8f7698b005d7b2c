"""What is asked of the encoded passes: one objective a file, one line each in `OBJECTIVES`.

An objective reads named passes of the step and returns one scalar; it owns its heads. To add one: a file
with a class that follows `Objective`, and a line in the table; the contract tests run over the table.
"""

from aclip.objectives import functional
from aclip.objectives.base import Objective
from aclip.objectives.byol import Byol
from aclip.objectives.contrastive import Contrastive
from aclip.objectives.ntxent import NtXent

OBJECTIVES: dict[str, type[Objective]] = {
    "contrastive": Contrastive,
    "ntxent": NtXent,
    "byol": Byol,
}

__all__ = ["OBJECTIVES", "Byol", "Contrastive", "NtXent", "Objective", "functional"]
