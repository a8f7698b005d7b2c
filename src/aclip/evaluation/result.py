"""What an evaluation returns, one row a metric."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Result:
    """One metric of one evaluator on one set.

    Attributes:
        set: its name, with the retrieval protocol if that is not the default.
        evaluator: its name in `EVALUATORS`.
        metric: name, such as "image_to_text_r1".
        value: recalls and accuracies are fractions in [0, 1].
        keep: fraction of patches kept, of an evaluation on masked images; else None.
        kept_by: how these were chosen.
    """

    set: str
    evaluator: str
    metric: str
    value: float
    keep: float | None = None
    kept_by: str | None = None
