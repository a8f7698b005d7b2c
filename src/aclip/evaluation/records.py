"""What evaluations leave in a run folder, besides the line in `evaluations.jsonl`."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from aclip.evaluation.base import Example
from aclip.files import as_file_name, write_atomically


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
    path = run_folder / "examples" / f"{as_file_name(set_name)}.json"
    write_atomically(path, json.dumps([example.to_dict() for example in examples], ensure_ascii=False, indent=1))
    return path


def write_details(run_folder: Path, record: Mapping[str, Any], details: Mapping[str, Any]) -> Path | None:
    """Write `details/<set>-<evaluator>.json`, in one move, over what an earlier evaluation left.

    Args:
        run_folder: the run's folder, which exists.
        record: the evaluation's line in `evaluations.jsonl`; the file repeats what it was measured on and with.
        details: see `Evaluation.details`.

    Returns:
        The file, or None if there was nothing to write.
    """
    if not details:
        return None
    path = run_folder / "details" / f"{as_file_name(record['set'])}-{record['evaluator']}.json"
    about = {key: record[key] for key in ("set", "evaluator", "weights", "step")}
    write_atomically(path, json.dumps(about | dict(details), ensure_ascii=False))
    return path
