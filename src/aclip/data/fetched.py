"""Data sets that have been fetched by name: where `emoji:train` lies."""

import json
import os
import re
from pathlib import Path

from aclip.errors import DataError
from aclip.files import data_root

DESCRIPTION = "dataset.json"  # file of a set's folder that is written when the set is complete
_SET = re.compile(r"([A-Za-z][\w-]+)(?::([\w-]*))?")  # two letters, as C: is a drive


def split_sizes(folder: Path) -> dict[str, int]:
    """Return the number of samples in each split of a complete set; empty for any other folder."""
    try:
        splits = json.loads((folder / DESCRIPTION).read_bytes())["splits"]
        return {split: int(facts["samples"]) for split, facts in splits.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def resolve(path: str) -> str | None:
    """Return the folder of shards that `NAME:SPLIT` stands for, or None if the path has another form or exists."""
    match = _SET.fullmatch(path)
    if match is None or os.path.exists(path):
        return None
    name, split = match.groups()
    folder = data_root() / name
    splits = split_sizes(folder)
    if split in splits:
        return str(folder / split)
    if splits:
        choices = ", ".join(f"{name}:{one}" for one in splits)
        raise DataError(f"'{path}' names no split of the data set '{name}': there are {choices}")
    if split is None:
        return None
    raise DataError(f"'{path}' does not exist, and the data set '{name}' is not in {folder.parent}: fetch it with "
                    f"`aclip data fetch {name}`")
