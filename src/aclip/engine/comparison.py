"""A comparison's folder: its runs, what makes one finished, and what makes one another run than was asked for."""

import fcntl
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aclip.config import to_dict
from aclip.engine.run_config import RESUMABLE, RunConfig, saved_config
from aclip.errors import ConfigError
from aclip.run_folder import RunFolder

WORDS = {"output", "recipe.title", "recipe.paper", *RESUMABLE} - {"data", "validation"}
"""Fields of a configuration that change nothing in what is computed; a run that was resumed by hand may have others."""


@dataclass(frozen=True)
class Measured:
    """What is measured of a finished model: every evaluator on every set, by their names."""

    evaluators: tuple[str, ...]
    sets: tuple[str, ...]


@dataclass(frozen=True)
class PlannedRun:
    """One run of a comparison.

    Attributes:
        arguments: of `aclip train`, with which it starts.
        config: settled; its output is the run's folder.
        total_steps: optimizer steps of the run.
        num_pairs: in its data.
        trained: what `aclip train` measures at its end. added: what `aclip evaluate` adds to that.
    """

    arguments: tuple[str, ...]
    config: RunConfig
    total_steps: int
    num_pairs: int
    trained: Measured
    added: Measured

    @property
    def folder(self) -> RunFolder:
        """The run's folder."""
        return RunFolder(Path(self.config.output))

    @property
    def name(self) -> str:
        """The name of its folder."""
        return self.folder.path.name

    def missing(self, measured: Measured) -> list[str]:
        """Return those evaluators that have not measured the finished model on all of their sets."""
        done = {(r.get("evaluator"), r.get("set")) for r in self.folder.records("evaluations")
                if r.get("step") == self.total_steps and r.get("weights") == "online"}
        return [name for name in measured.evaluators if any((name, held) not in done for held in measured.sets)]

    def only_planned(self, results: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
        """Return of results, set -> evaluator -> anything, those that are planned."""
        planned = {(held, name) for one in (self.trained, self.added) for held in one.sets for name in one.evaluators}
        kept = {held: {name: value for name, value in of_set.items() if (held, name) in planned}
                for held, of_set in results.items()}
        return {held: of_set for held, of_set in kept.items() if of_set}

    def is_trained(self) -> bool:
        """Return whether the model is finished and was evaluated as training does it."""
        return self.folder.final.is_dir() and not self.missing(self.trained)

    def is_finished(self) -> bool:
        """Return whether nothing is left to do."""
        return self.is_trained() and not self.missing(self.added)

    def check_same(self) -> None:
        """Accept an empty place, or this very run.

        Raises:
            ConfigError: the folder holds a run with other settings, or on more or fewer pairs; each is named.
        """
        if not (self.folder.path / "config.json").exists():
            return
        found, wanted = (
            {key: value for key, value in flat(to_dict(config)).items() if key not in WORDS}
            for config in (saved_config(self.folder), self.config))
        found["num_pairs"] = self.folder.read_json("config.json").get("num_pairs", self.num_pairs)
        wanted["num_pairs"] = self.num_pairs
        other = [f"{key} is {found.get(key, 'not there')} there and {wanted.get(key, 'not there')} here"
                 for key in dict.fromkeys([*wanted, *found]) if found.get(key) != wanted.get(key)]
        if other:
            raise ConfigError(f"{self.folder.path} holds a run with other settings ({'; '.join(other)}): give the "
                              "same options to continue the comparison, or choose another --output")


def run_name(recipe: str, lr: float, seed: int) -> str:
    """Return the name of a run's folder.

    >>> run_name("a-clip", 5e-4, 0)
    'a-clip-lr0.0005-s0'
    """
    return f"{recipe}-lr{lr!r}-s{seed}"


def flat(value: Any, path: str = "") -> dict[str, Any]:
    """Return nested JSON objects as one, with dotted keys; members of lists are called by their name if they have one.

    >>> flat({"seed": 1, "recipe": {"passes": [{"name": "full", "views": ["a"]}]}})
    {'seed': 1, 'recipe.passes.full.name': 'full', 'recipe.passes.full.views': ['a']}
    """
    if isinstance(value, Mapping):
        items = [(str(key), item) for key, item in value.items()]
    elif isinstance(value, list) and value and all(isinstance(item, Mapping) and "name" in item for item in value):
        items = [(item["name"], item) for item in value]
    else:
        return {path: value}
    return {key: leaf for name, item in items for key, leaf in flat(item, f"{path}.{name}" if path else name).items()}


class ComparisonFolder(RunFolder):
    """Paths of a comparison; its JSON files are read and written as a run's are."""

    @property
    def runs(self) -> Path:
        """Folder of the runs' folders."""
        return self.path / "runs"

    @property
    def logs(self) -> Path:
        """Folder of what each run said."""
        return self.path / "logs"

    @contextmanager
    def lock(self) -> Iterator[int]:
        """Keep a second command out of the folder; yields a file descriptor for children to inherit.

        The lock is held until every process that has the descriptor is gone, so that it also covers runs which
        outlive a killed comparison.

        Raises:
            ConfigError: somebody holds it, or the folder cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path / ".lock", os.O_CREAT | os.O_RDWR, 0o644)
        except OSError as error:
            raise ConfigError(f"cannot make the comparison's folder {self.path}: {error.strerror}") from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield descriptor
        except BlockingIOError as error:
            raise ConfigError(f"another comparison works in {self.path}, or runs that it has left behind do: wait "
                              "for them, or stop them") from error
        finally:
            os.close(descriptor)
