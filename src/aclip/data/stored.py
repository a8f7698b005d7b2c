"""Features of a teacher, stored by `aclip data encode`: the loader reads what a step would compute."""

import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from aclip.config import differences
from aclip.errors import ConfigError, DataError

DESCRIPTION = "features.json"


class StoredFeatures:
    """What a teacher's passes give for K crops and captions of every sample: those of the epochs 0 to K - 1.

    Attributes:
        folder: where they lie. description: what its `features.json` says.
        teacher: name of the model. logit_scale: its multiplier, None without text.
        crops: K.
    """

    def __init__(self, folder: str | Path) -> None:
        """Open a folder.

        Raises:
            ConfigError: it is none of stored features, or they are not complete.
            DataError: it is damaged.
        """
        self.folder, self.description = Path(folder), describe(Path(folder))
        if self.description is None:
            raise ConfigError(f"{folder} holds no features: store them with `aclip data encode TEACHER SOURCE --output "
                              f"{folder}`")
        self.teacher: str = self.description["teacher"]
        self.logit_scale: float | None = self.description["logit_scale"]
        self.crops: int = self.description["crops"]
        samples = self.description["settings"]["samples"]
        if self.description["done"] < self.crops * samples:
            raise ConfigError(f"the features in {folder} are not complete: run `aclip data encode {self.teacher} "
                              f"{self.description['source']} --output {folder}` again, it goes on where it stopped")
        for name in self.description["widths"]:
            if _array(self.folder / f"{name}.npy").shape[:2] != (self.crops, samples):
                raise DataError(f"{self.folder / name}.npy is damaged: remove {folder} and encode again")

    def rows(self, epoch: int, sample: int) -> dict[str, np.ndarray]:
        """Return the features of one sample, float16: pass -> (V, D), text pass -> (D,)."""
        return {name: _array(self.folder / f"{name}.npy")[epoch % self.crops, sample]
                for name in self.description["widths"]}

    def to_json(self) -> dict[str, Any]:
        """Return where they lie and what their `features.json` says."""
        return {"folder": self.folder, **self.description}

    def check(self, settings: Mapping[str, Any], source: str) -> None:
        """Raise ConfigError for features of other `settings` (crops, captions, samples) than a run's on `source`."""
        found = differences(self.description["settings"], json.loads(json.dumps(settings)))
        if any(one.startswith(("source ", "samples ")) for one in found):
            found = [f"they are of {self.description['source']}, not of {source}"]
        if found:
            raise ConfigError(f"the features in {self.folder} do not fit this run ({found[0]}): change that, or store "
                              f"others with `aclip data encode {self.teacher} {source} --output OTHER`, which takes "
                              "--recipe, --model and --seed")


def describe(folder: Path) -> Any:
    """Return what `features.json` says of a folder; None without one."""
    try:
        return json.loads((folder / DESCRIPTION).read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise DataError(f"{folder / DESCRIPTION} is damaged: remove {folder} and encode again") from error


@lru_cache(maxsize=32)
def _array(path: Path) -> np.ndarray:
    """Open an array, memory-mapped, once in every process."""
    try:
        array: np.ndarray = np.load(path, mmap_mode="r")
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}): remove {path.parent} and encode again") from error
    return array
