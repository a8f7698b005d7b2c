"""What evaluations leave in a run folder, besides the line in `evaluations.jsonl`."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

from aclip.evaluation.base import Example
from aclip.files import write_atomically


def write_examples(run_folder: Path, set_name: str, examples: Sequence[Example]) -> Path | None:
    """Write `examples/<set>.json`, in one move, over what an earlier evaluation of the set left.

    No examples leave it as it is: an evaluator that keeps none must not erase those of another.

    Args:
        run_folder: the run's folder, which exists.
        set_name: any name; what does not belong in a file name becomes "_".
        examples: see `Evaluation.examples`.

    Returns:
        The file, or None if there was nothing to write.
    """
    if not examples:
        return None
    path = run_folder / "examples" / (re.sub(r"[^\w-]+", "_", set_name) + ".json")
    write_atomically(path, json.dumps([example.to_dict() for example in examples], ensure_ascii=False, indent=1))
    return path
