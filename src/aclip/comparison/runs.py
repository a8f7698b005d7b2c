"""The runs of a comparison: which there are, how far they are, and what their steps cost."""

from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from aclip.config import CHANGEABLE, RunConfig, differences, to_dict
from aclip.errors import ConfigError
from aclip.plan import Plan, resolve
from aclip.run_folder import RunFolder
from aclip.training.schedule import Timetable

BASELINE = "clip"
"""What times and arithmetic are relative to, whether it is compared or not."""
NOMINAL_STEPS = 1000
IRRELEVANT = {"output", *CHANGEABLE} - {"data", "validation"}
"""Settings in which a run that is already there may differ: they change nothing in what is computed."""


@dataclass(frozen=True)
class Stage:
    """Steps of a run that cost the same: a fraction of all, masked or not, at one image size."""

    share: float
    masked: bool
    resolution: float
    plan: Plan

    def label(self, name: str) -> str:
        size = "" if self.resolution == 1.0 else f", at {self.resolution:g} of the size"
        return f"{name}{'' if self.masked else ', unmasked'}{size}"


@dataclass(frozen=True)
class Contender:
    """A recipe with the settings of every run; seed, length and folder are those of no run."""

    config: RunConfig
    plan: Plan
    stages: tuple[Stage, ...]

    def macs(self, text_tokens: float) -> float:
        """Return multiply-accumulates per pair and step, averaged over the stages."""
        return sum(stage.share * stage.plan.macs(text_tokens) for stage in self.stages)


@dataclass(frozen=True)
class PlannedRun:
    """One run: its configuration, (set name, evaluator) pairs measured in and after training, and the latter's sets."""

    config: RunConfig
    num_pairs: int
    in_training: frozenset[tuple[str, str]]
    afterwards: frozenset[tuple[str, str]]
    later: tuple[str, ...]

    @property
    def folder(self) -> RunFolder:
        return RunFolder(Path(self.config.output))

    @property
    def name(self) -> str:
        return self.folder.path.name

    @cached_property
    def total_steps(self) -> int:
        return Timetable.of(self.config, self.num_pairs).total_steps

    @property
    def steps(self) -> int:
        """Optimizer steps done, as far as they are journalled."""
        return int(self.folder.last("metrics").get("step", 0))

    def missing(self, wanted: frozenset[tuple[str, str]]) -> frozenset[tuple[str, str]]:
        """Return what the finished model was not measured with yet."""
        return wanted - {(r.get("set"), r.get("evaluator")) for r in self.folder.records("evaluations")
                         if r.get("step") == self.total_steps and r.get("weights") == "online"}

    @property
    def trained(self) -> bool:
        """Whether the model is finished and evaluated."""
        return self.folder.final.is_dir() and not self.missing(self.in_training)

    @property
    def complete(self) -> bool:
        return self.trained and not self.missing(self.afterwards)

    def check_same(self) -> None:
        """Refuse another run in the folder of this one."""
        if not self.folder.exists():
            return
        found = to_dict(self.folder.config()) | {"num_pairs": self.folder.read_json("config.json").get("num_pairs")}
        other = differences(found, to_dict(self.config) | {"num_pairs": self.num_pairs}, IRRELEVANT)
        if other:
            raise ConfigError(f"{self.folder.path} holds a run with other settings ({'; '.join(other)}): give the same "
                              "options to continue the comparison, or choose another --output")


def stages_of(config: RunConfig, plan: Plan, num_pairs: int) -> tuple[Stage, ...]:
    """Return the stages of a run; their shares do not depend on its length."""
    table = Timetable.of(replace(config, samples=NOMINAL_STEPS * (config.batch_size or 1)), num_pairs)
    masks = any(p.removes for p in plan.passes.values()) or any(t.reduction for t in plan.texts.values())
    counts = Counter((table.masked(step) or not masks, table.resolution(step)) for step in range(NOMINAL_STEPS))
    plans = {resolution: resolve(plan.recipe, plan.shape, resolution, frozen_shape=plan.frozen_shape)
             for _, resolution in counts}
    return tuple(
        Stage(number / NOMINAL_STEPS, masked, resolution, plans[resolution] if masked else plans[resolution].unmasked())
        for (masked, resolution), number in counts.items())
