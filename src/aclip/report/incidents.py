"""What went wrong during a run: skipped steps, rollbacks, checkpoints that were damaged or could not be written."""

from collections import Counter

from aclip.report.formats import compact, count
from aclip.report.markup import Html, join, table, tag
from aclip.report.run_files import Record, RunFiles, number

KINDS = {
    "non_finite": "step skipped", "loss_spike": "loss jumped", "rolled_back": "gone back to a checkpoint",
    "damaged_checkpoint": "checkpoint damaged", "save_failed": "checkpoint not written",
    "evaluation_failed": "results not written",
}

MAX_SHOWN = 50

_NUMBERS = (("loss", "loss"), ("median", "median before"), ("grad_norm", "gradient norm"))


def incidents(run: RunFiles) -> Html:
    """Return how often what happened, and the first incidents in their order."""
    kinds = [KINDS.get(str(record.get("kind")), str(record.get("kind"))) for record in run.incidents]
    often = ", ".join(f"{kind} ({count(n)})" for kind, n in Counter(kinds).most_common())
    rows = [[count(number(record, "step")), kind, _words(record)]
            for record, kind in zip(run.incidents[:MAX_SHOWN], kinds, strict=False)]
    more = len(run.incidents) - len(rows)
    return join(
        tag("p", f"What went wrong, and how often: {often}. The samples of each step are in incidents.jsonl."),
        table(["step", "what", "why"], rows, numeric_from=3),
        tag("p", f"… and {count(more)} more.") if more else None,
    )


def _words(record: Record) -> str:
    """Return the reason that was journalled, or the numbers."""
    if "reason" in record:
        return ": ".join(str(record[key]) for key in ("name", "reason") if key in record)
    known = ((words, record[key], number(record, key)) for key, words in _NUMBERS if key in record)
    return ", ".join(f"{words} {value if finite is None else compact(finite)}" for words, value, finite in known)
