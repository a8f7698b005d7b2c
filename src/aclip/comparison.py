"""Several recipes on equal terms: a list of run configurations, a process each, one grouped table.

    comparisons/mine/
        runs/RECIPE-lrLR-sSEED/   every run is an ordinary one
        logs/                     what each run printed
        timing.json               step times of all recipes, taken in turns in one process
        comparison.json           what was asked for, and the results so far
        index.html, table.md, table.csv

The same call continues an interrupted comparison; finished runs are kept, and recipes or seeds can be added later.
"""

import itertools
import json
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from aclip import data, dist, evaluation, models
from aclip.bench import summary, time_in_turns
from aclip.config import CHANGEABLE, Recipe, RunConfig, override, to_dict
from aclip.devices import choose_device, usable_cores
from aclip.errors import AclipError, BadSampleError, ConfigError, TrainingError
from aclip.logs import warnings_only
from aclip.plan import Plan, resolve, trains_only_masked
from aclip.recipes import configure, find_recipe
from aclip.report import summary_table, write_comparison
from aclip.report.journals import outcome, primary
from aclip.rng import generator
from aclip.run_folder import RunFolder, command_line
from aclip.trainer import Trainer, build_trainer, open_batches, resolve_defaults, train
from aclip.training.guard import Interrupted, StopRequest
from aclip.training.schedule import Timetable

BASELINE = "clip"
"""What times and arithmetic are relative to, whether it is compared or not."""
NOMINAL_STEPS = 1000
WARMUP_ROUNDS, TIMED_BATCHES = 3, 4
TEXT_SAMPLES = 512
IRRELEVANT = {"output", *CHANGEABLE} - {"data", "validation"}
"""Settings in which a run that is already there may differ: they change nothing in what is computed."""


def compare(
    *,
    recipes: tuple[str, ...],
    data: tuple[str, ...] | str,
    validation: tuple[str, ...] | str,
    output: str,
    epochs: float | None = None,
    samples: int | None = None,
    minutes: float | None = None,
    seeds: tuple[int, ...] = (0, 1, 2),
    lr: tuple[float, ...] = (),
    choose_on: str | None = None,
    evaluators: tuple[str, ...] = (),
    probe: str | None = None,
    evaluate_on: tuple[str, ...] | str = (),
    jobs: int = 1,
    timing_rounds: int = 10,
    dry_run: bool = False,
    changes: Mapping[str, Any] | None = None,
    **settings: Any,
) -> list[dict[str, Any]]:
    """Train several recipes on the same data with the same budget and seeds, and write one table and one page.

    The steps of all recipes are timed in turns in one process before anything is trained, so that the ratio of their
    times does not depend on what else the machine does. Needs no torchrun: it starts a process for each run.

    Args:
        recipes: names from `aclip recipes`.
        data: training sources, as of `aclip train`.
        validation: sources to evaluate on, [NAME=]SOURCE.
        output: the comparison's folder.
        epochs: the budget: equal passes over the data. Give one of epochs, samples and minutes.
        samples: or: equal numbers of pairs.
        minutes: or: equal time in training steps, by each recipe's measured step time on this machine.
        seeds: a run of each recipe for each.
        lr: peak learning rates that every recipe tries with the first seed; its best is used for the others
            (default: the recipe's own).
        choose_on: the set that chooses among several lr, apart from those whose results are reported.
        evaluators: further evaluators of the finished models (default: with probe linear_probe and knn).
        probe: labelled images on which linear_probe and knn are trained.
        evaluate_on: sets of evaluators, e.g. labelled ones for the probes (default: those of validation).
        jobs: runs at a time; they share the cores, and take the GPUs in turns.
        timing_rounds: timed steps of every recipe.
        dry_run: only show the runs and the arithmetic.
        changes: path -> value, fields of every run to change, as `--recipe.passes.masked.mask-ratio 0.6`.
        settings: further arguments of `aclip.configure`, for every run.

    Returns:
        A record of every run: recipe, lr, seed, whether it is finished, metrics by set and evaluator.

    Raises:
        ConfigError, DataError: what would fail later, in one sentence.
        TrainingError: some runs failed; the others are finished, and in the tables.
        Interrupted: on SIGINT or SIGTERM, after the runs in progress have saved themselves.
    """
    asked = {"recipes": _several(recipes), "epochs": epochs, "samples": samples, "minutes": minutes,
             "seeds": list(seeds), "lr": list(lr) or None, "choose_on": choose_on,
             "evaluators": _several(evaluators) or None, "probe": probe,
             "evaluate_on": _several(evaluate_on) or None, "jobs": jobs, "timing_rounds": timing_rounds}
    comparison = Comparison(asked, _several(data), _several(validation), Path(output), dict(changes or {}), settings)
    if dry_run:
        Console(highlight=False).print(comparison.table())
        return comparison.records()
    return comparison.run()


def _several(value: tuple[str, ...] | str) -> list[str]:
    return [value] if isinstance(value, str) else list(value)


@dataclass(frozen=True)
class Stage:
    """Steps of a run that cost the same: a fraction of all, masked or not, at one image size."""

    share: float
    masked: bool
    resolution: float
    plan: Plan

    def label(self, name: str) -> str:
        """Return the recipe's name with what is special about these steps."""
        return ", ".join([name, *([] if self.masked else ["unmasked"]),
                          *([f"at {self.resolution:g} of the size"] if self.resolution != 1.0 else [])])


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
        """The run's folder."""
        return RunFolder(Path(self.config.output))

    @property
    def name(self) -> str:
        """The name of its folder."""
        return self.folder.path.name

    @cached_property
    def total_steps(self) -> int:
        """Its length."""
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
        """Whether nothing is left to do."""
        return self.trained and not self.missing(self.afterwards)

    def check_same(self) -> None:
        """Refuse another run in the folder of this one."""
        if not self.folder.exists():
            return
        wanted = _flat(to_dict(self.config) | {"num_pairs": self.num_pairs})
        found = _flat(to_dict(self.folder.config()) | {
            "num_pairs": self.folder.read_json("config.json").get("num_pairs")})
        other = [f"{key} is {found.get(key)} there and {wanted.get(key)} here" for key in {**wanted, **found}
                 if key.split(".")[0] not in IRRELEVANT and found.get(key) != wanted.get(key)]
        if other:
            raise ConfigError(f"{self.folder.path} holds a run with other settings ({'; '.join(other)}): give the same "
                              "options to continue the comparison, or choose another --output")


class Comparison:
    """What was asked for, resolved and checked before anything runs.

    Attributes:
        asked: arguments of `compare`, as they are written to `comparison.json`.
        budgets: recipe -> pairs that fit into its minutes. timing: `timing.json`, once there is one.
        errors: names of runs -> why they failed.
    """

    def __init__(
        self, asked: dict[str, Any], sources: list[str], validation: list[str], folder: Path, changes: dict[str, Any],
        settings: dict[str, Any],
    ) -> None:
        self.asked, self.sources, self.validation, self.folder = asked, sources, validation, RunFolder(folder)
        self.changes, self.settings = changes, {k: v for k, v in settings.items() if v is not None}
        self.console = Console(highlight=False)
        self.errors: dict[str, str] = {}
        self._check_options()
        self.device = choose_device(self.settings.get("device", "auto"))
        self.threads = max(1, int(os.environ.get("OMP_NUM_THREADS", "0") or usable_cores()) // asked["jobs"])
        self.source = data.open_training(sources)
        self.choose_on = [asked["choose_on"]] if asked["choose_on"] else []
        self.later = asked["evaluate_on"] or validation
        self._open_sets()
        self.contenders = {name: self._contender(name) for name in asked["recipes"]}
        self.baseline = self.contenders.get(BASELINE) or self._contender(BASELINE, plain=True)
        self.timing = self._saved_timing()
        self.budgets = self._saved_budgets()
        self._check_runs()

    def run(self) -> list[dict[str, Any]]:
        """Time, train, evaluate, write the tables; see `compare`."""
        with _locked(self.folder.path):
            self.write()
            if self.timing is None:
                self._time_steps()
            self._set_budgets()
            self._check_runs()
            self._train(self.first_runs())
            self._train(self.other_runs())
            self.write()
            page = write_comparison(self.folder.path)
            self.console.print(summary_table(self.folder.path))
            self.console.print(f"comparison: {page}", markup=False, soft_wrap=True)
        if self.errors:
            name, error = next(iter(self.errors.items()))
            raise TrainingError(f"{len(self.errors)} of the runs failed, the first is {name}: {error}; their output is "
                                f"in {self.folder.path}/logs, and the same command tries them again")
        return self.records()

    def planned(self, name: str, lr: float, seed: int) -> PlannedRun:
        """Return the run of a recipe, learning rate and seed."""
        one = self.contenders[name]
        recipe = replace(one.config.recipe, optimization=replace(one.config.recipe.optimization, lr=lr))
        samples = self.budgets[name]["samples"] if self.asked["minutes"] else self.asked["samples"]
        config = replace(one.config, recipe=recipe, seed=seed, samples=samples,
                         validation=(*self.validation, *self.choose_on),
                         epochs=self.asked["epochs"] or one.config.epochs,
                         output=str(self.folder.path / "runs" / f"{name}-lr{lr!r}-s{seed}"))
        in_training, later, specs = [*self.sets, *self.chooser], self.later_sets, self.later
        if not one.plan.uses_text:  # probes choose among its learning rates
            in_training, later, specs = [], [*later, *self.chooser], [*specs, *self.choose_on]
        return PlannedRun(config, len(self.source), frozenset((held, "retrieval") for held in in_training),
                          frozenset(itertools.product(later, self._evaluators(one.plan.uses_text))),
                          tuple(dict.fromkeys(specs)))

    def first_runs(self) -> list[PlannedRun]:
        """Return the runs of the first seed, at every learning rate."""
        return [self.planned(name, lr, self.asked["seeds"][0]) for name in self.contenders for lr in self.lrs(name)]

    def other_runs(self) -> list[PlannedRun]:
        """Return the runs of the other seeds, of recipes whose learning rate is chosen."""
        return [self.planned(name, choice["lr"], seed) for seed in self.asked["seeds"][1:] for name in self.contenders
                if (choice := self.choice(name)) is not None]

    def lrs(self, name: str) -> list[float]:
        """Return the learning rates that a recipe tries."""
        return self.asked["lr"] or [self.contenders[name].config.recipe.optimization.lr]

    def choice(self, name: str) -> dict[str, Any] | None:
        """Return the learning rate of a recipe, and what chose it; None before all were tried, or if none worked."""
        lrs = self.lrs(name)
        if len(lrs) == 1:
            return {"lr": lrs[0]}
        runs = {lr: self.planned(name, lr, self.asked["seeds"][0]) for lr in lrs}
        if not all(run.complete or run.name in self.errors for run in runs.values()):
            return None
        results = {lr: found for lr, run in runs.items() if run.trained
                   and (found := primary(outcome(run.folder.path), self.chooser)) is not None}
        if not results:
            return None
        best = max(results, key=lambda lr: results[lr][1])
        (held, evaluator, metric), value = results[best]
        return {"lr": best, "set": held, "evaluator": evaluator, "metric": metric, "value": value}

    def records(self) -> list[dict[str, Any]]:
        """Return a record of every run planned so far."""
        if not self._budgeted():
            return []
        choices = {name: self.choice(name) for name in self.contenders}
        found = []
        for run in [*self.first_runs(), *self.other_runs()]:
            name, lr = run.config.recipe.name, run.config.recipe.optimization.lr
            chosen = choices[name]
            record = {"name": run.name, "recipe": name, "lr": lr, "seed": run.config.seed,
                      "counts": chosen is not None and lr == chosen["lr"], "error": self.errors.get(run.name),
                      "total_steps": run.total_steps, "finished": run.trained, "complete": run.complete}
            if run.trained:
                results = outcome(run.folder.path)
                planned = {*run.in_training, *run.afterwards}  # what else was measured by hand is not part of it
                record |= results | {part: {held: {e: values for e, values in by.items() if (held, e) in planned}
                                            for held, by in results[part].items()} for part in ("metrics", "chance")}
            found.append(record)
        return found

    def write(self) -> None:
        """Write everything known so far to `comparison.json`."""
        one = self.baseline.config
        choices = {name: self.choice(name) for name in self.contenders} if self._budgeted() else {}
        self.folder.write_json("comparison.json", {
            "command": command_line(),
            "settings": self.asked, "baseline": BASELINE, "model": one.model, "data": self.sources,
            "num_pairs": len(self.source), "sets": list(dict.fromkeys([*self.sets, *self.later_sets])),
            "batch_size": one.batch_size, "precision": one.precision, "device": str(self.device),
            "threads": self.threads, "text_tokens": self.text_tokens,
            "recipes": {name: self._arithmetic(name) for name in self.contenders}, "budgets": self.budgets,
            "timing": self.timing, "chosen_lr": {name: found for name, found in choices.items() if found is not None},
            "runs": self.records()})

    def table(self) -> Table:
        """Return the runs and the arithmetic, as a dry run shows them."""
        table = Table("recipe", "runs", "steps", "GMAC a pair", f"of {BASELINE}", "learning rates", box=None,
                      pad_edge=False)
        for name in self.contenders:
            lrs, costs = self.lrs(name), self._arithmetic(name)
            steps = f"{self.planned(name, lrs[0], 0).total_steps:,}" if self._budgeted(name) else "by time"
            table.add_row(f"[bold]{name}", str(len(lrs) + len(self.asked["seeds"]) - 1), steps,
                          f"{costs['macs'] / 1e9:.3g}", f"{costs['relative_cost']:.2f}", ", ".join(map(str, lrs)))
        return table

    @cached_property
    def text_tokens(self) -> float:
        """Mean length in tokens to which the text of a batch is cut, from some captions."""
        config = self.baseline.config
        tokenizer = data.CaptionTokenizer(models.tokenizer_of(config.model))
        if not self.baseline.plan.shape.text_cut:
            return float(tokenizer.context_length)
        captions = []
        some = max(TEXT_SAMPLES, config.batch_size or 0)  # a batch at least: its longest caption sets the length
        for index in generator(0, "text length").permutation(len(self.source))[:some].tolist():
            with suppress(BadSampleError):
                captions.append(data.clean_captions(self.source.captions(index))[0])
        tokens = tokenizer(captions or [""])
        return fmean(models.cut_after_eot(batch).shape[1] for batch in tokens.split(config.batch_size or len(tokens)))

    # checks

    def _check_options(self) -> None:
        asked = self.asked
        if dist.launched() or "RANK" in os.environ:
            raise ConfigError("aclip compare starts its own processes: run it without torchrun, with --jobs for more "
                              "runs at a time")
        for one, several in (("recipe", "recipes"), ("seed", "seeds")):
            if one in self.settings:
                raise ConfigError(f"a comparison takes {several}, not {one}")
        if sum(asked[name] is not None for name in ("epochs", "samples", "minutes")) != 1:
            raise ConfigError("a comparison needs one budget for all recipes: --epochs, --samples or --minutes")
        probes = {name for name in asked["evaluators"] or () if evaluation.is_probe(name)}
        if probes and not asked["probe"]:
            raise ConfigError(f"{' and '.join(sorted(probes))} need --probe, labelled images to learn from")
        if asked["lr"] and len(asked["lr"]) > 1 and not asked["choose_on"]:
            raise ConfigError("several learning rates need --choose-on, a set that chooses among them apart from those "
                              "whose results are reported, e.g. --data pairs.csv[1000:] --choose-on pairs.csv[:1000]")
        for option in ("recipes", "seeds", "lr"):
            twice = [value for value, n in Counter(asked[option] or ()).items() if n > 1]
            if twice or asked[option] == []:
                raise ConfigError(f"--{option} names {twice[0]} twice" if twice else f"--{option} is missing")
        for option in ("jobs", "timing_rounds", "minutes"):
            if asked[option] is not None and not asked[option] > 0:
                raise ConfigError(f"--{option.replace('_', '-')} must be above 0, not {asked[option]}")
        before = self._read("comparison.json").get("settings", {}) if (self.folder.path / "runs").exists() else {}
        for option in ("minutes", "probe", "evaluate_on", "choose_on"):  # what no run's own configuration holds
            if before.get(option) is not None and before[option] != asked[option]:
                raise ConfigError(f"{self.folder.path} holds a comparison with another --{option.replace('_', '-')}: "
                                  "give the same to continue it, or choose another --output")

    def _open_sets(self) -> None:
        """Find the names of all sets; one name is one set."""
        specs: dict[str, str] = {}

        def names(of: list[str]) -> list[str]:
            found = [held.name for held in evaluation.open_sets(of)]
            for name, spec in zip(found, of, strict=True):
                if specs.setdefault(name, spec) != spec:
                    raise ConfigError(f"two sets are called '{name}', {specs[name]} and {spec}: name them apart, as in "
                                      "NAME=SOURCE")
            return found

        self.sets, self.chooser, self.later_sets = names(self.validation), names(self.choose_on), names(self.later)
        with warnings_only():
            evaluation.check_sets(evaluation.open_sets([*self.validation, *self.choose_on]))
        if self.asked["probe"]:
            evaluation.open_sets([self.asked["probe"]])

    def _contender(self, name: str, *, plain: bool = False) -> Contender:
        """Return a recipe with the settings of every run, as far as they concern it.

        Args:
            name: of the recipe.
            plain: without changes to the recipe, which are not meant for a baseline that was not asked for.
        """
        recipe: Recipe = replace(find_recipe(name), name=name)
        settings = dict(self.settings)
        if not _masks(recipe) and (plain or any(map(_masks, map(find_recipe, self.asked["recipes"])))):
            settings.pop("mask_ratio", None)
        if trains_only_masked(recipe):
            settings.pop("unmasked_tuning", None)
            settings.pop("unmasked_lr", None)
        try:
            config = override(configure(**{**settings, "recipe": recipe, "data": tuple(self.sources),
                                           "output": str(self.folder.path)}), {} if plain else self.changes)
            config = resolve_defaults(config, len(self.source), self.device)
            plan = resolve(config.recipe, models.shape_of(models.model_config(
                config.model, image_size=config.image_size)))
            if not (plan.uses_text or plain or len(self.asked["lr"] or "1") == 1 or self._evaluators(False)):
                raise ConfigError("it has no text, so choosing among learning rates needs --probe, labelled images")
            return Contender(config, plan, _stages(config, plan, len(self.source)))
        except ConfigError as error:
            raise ConfigError(f"{name}: {error}") from error

    def _evaluators(self, uses_text: bool) -> list[str]:
        """Return the evaluators of finished models; without text only probes."""
        default = ["linear_probe", "knn"] if self.asked["probe"] else ["retrieval"] if self.asked["evaluate_on"] else []
        return [e for e in self.asked["evaluators"] or default if uses_text or evaluation.is_probe(e)]

    def _check_runs(self) -> None:
        """Refuse folders that hold runs with other settings."""
        for name in filter(self._budgeted, self.contenders):
            for lr, seed in itertools.product(self.lrs(name), self.asked["seeds"]):
                self.planned(name, lr, seed).check_same()

    def _budgeted(self, name: str | None = None) -> bool:
        """Return whether the length of a recipe's runs, or of all, is known."""
        return not self.asked["minutes"] or ({name} if name else self.contenders.keys()) <= self.budgets.keys()

    def _arithmetic(self, name: str) -> dict[str, Any]:
        one = self.contenders[name]
        macs = one.macs(self.text_tokens)
        return {"title": one.config.recipe.title, "paper": one.config.recipe.paper, "uses_text": one.plan.uses_text,
                "macs": macs, "relative_cost": macs / self.baseline.macs(self.text_tokens)}

    # timing and budgets

    def _timed(self) -> dict[str, RunConfig]:
        return {BASELINE: self.baseline.config} | {name: one.config for name, one in self.contenders.items()}

    def _time_steps(self) -> None:
        """Time the steps of all recipes in turns, in one process."""
        self.console.print("timing the steps of all recipes in turns ...")
        process = self._start(
            "timing", _time, self.folder, self._timed(), self.asked["timing_rounds"], len(self.source))
        with StopRequest() as stop, _ended([process]):
            while process.is_alive() and not stop.requested:
                process.join(0.2)
        if stop.requested:
            raise Interrupted("stopped before any run; the same command starts the comparison again")
        if process.exitcode:
            error = self._last_line("timing")
            if self.asked["minutes"]:
                raise TrainingError(f"the steps could not be timed: {error}")
            self.console.print(f"the steps could not be timed ({error}): the table will have no times", markup=False)
            return
        self.timing = self._read("timing.json")

    def _saved_timing(self) -> dict[str, Any] | None:
        """Return the step times of an earlier call, if they are of these configurations on this device."""
        found = self._read("timing.json")
        same = found and (found["threads"], found["device"]) == (self.threads, str(self.device)) and (
            found["rounds"] >= self.asked["timing_rounds"]) and all(
            found["configs"].get(name) == to_dict(config) for name, config in self._timed().items())
        return found if same else None

    def _saved_budgets(self) -> dict[str, dict[str, Any]]:
        """Return the budgets of an earlier call with the same minutes."""
        found = self._read("comparison.json")
        if not self.asked["minutes"] or not found or found["settings"]["minutes"] != self.asked["minutes"]:
            return {}
        return dict(found.get("budgets", {}))

    def _set_budgets(self) -> None:
        """Compute the pairs that fit into the minutes, for recipes without a budget from an earlier call.

        A recipe added later gets what it would have got then: its step time relative to the baseline's, at the
        baseline's first measured step time.
        """
        if not self.asked["minutes"]:
            return
        assert self.timing is not None
        seconds = self.timing["step_seconds"]
        clock = next((budget["baseline_seconds"] for budget in self.budgets.values()), seconds[BASELINE])
        for name, one in self.contenders.items():
            if name not in self.budgets:
                steps = int(60.0 * self.asked["minutes"] / (clock * seconds[name] / seconds[BASELINE]))
                self.budgets[name] = {"samples": max(1, steps) * (one.config.batch_size or 1),
                                      "baseline_seconds": clock}

    # processes

    def _train(self, runs: Sequence[PlannedRun]) -> None:
        """Finish runs, a few at a time; a failed run does not stop the others."""
        waiting = [run for run in runs if not run.complete]
        working: dict[int, tuple[PlannedRun, Any]] = {}  # by slot
        processes: list[Any] = []
        with StopRequest() as stop, self.console.status("starting") as status, _ended(processes):
            while (waiting or working) and not stop.requested:
                for slot in range(self.asked["jobs"]):
                    if waiting and slot not in working:
                        run = waiting.pop(0)
                        processes.append(self._start(run.name, _work, run, self.asked["probe"], slot=slot))
                        working[slot] = run, processes[-1]
                time.sleep(0.2)
                status.update(", ".join(f"{run.name} {run.steps:,}/{run.total_steps:,}" for run, _ in working.values()))
                for slot, (run, process) in list(working.items()):
                    if not process.is_alive() and not stop.requested:
                        del working[slot]
                        if not run.complete:
                            self.errors[run.name] = f"{self._last_line(run.name)} (exit code {process.exitcode})"
                        error = self.errors.get(run.name)
                        self.write()
                        self.console.print(f"{run.name} " + (f"failed: {error}" if error else "is done")
                                           + f"; {self._left()}", markup=False, soft_wrap=True)
            if stop.requested:
                self.console.print("stopping: runs in progress save a checkpoint after the current step")
        if stop.requested:
            self.write()
            raise Interrupted("stopped, the runs have saved themselves; the same command continues the comparison")

    def _start(self, name: str, target: Callable[..., None], *arguments: Any, slot: int = 0) -> Any:
        """Start a process whose output goes to a log; it shares threads and GPUs with others.

        It ignores Ctrl-C, which reaches all processes of a terminal: this one stops it.
        """
        gpus = _gpus(self.settings.get("device", "auto"))
        environment = {"OMP_NUM_THREADS": str(self.threads)}
        if gpus:
            environment["CUDA_VISIBLE_DEVICES"] = gpus[slot % len(gpus)]
        log = self._log(name)
        log.parent.mkdir(parents=True, exist_ok=True)
        before = {key: os.environ.get(key) for key in environment}
        in_main = threading.current_thread() is threading.main_thread()
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN) if in_main else None
        os.environ.update(environment)
        try:
            process = multiprocessing.get_context("spawn").Process(target=_in_process, args=(log, target, arguments))
            process.start()
        finally:
            for key, value in before.items():
                os.environ.pop(key) if value is None else os.environ.update({key: value})
            if in_main:
                signal.signal(signal.SIGINT, handler)
        return process

    def _left(self) -> str:
        """Return how many runs are over, and how long the remaining steps take at their measured time."""
        seconds = (self.timing or {}).get("step_seconds", {})
        others = len(self.asked["seeds"]) - 1
        number, over, left = 0, 0, 0.0
        for name in self.contenders:
            count = len(self.lrs(name)) + others
            number += count
            left += count * seconds.get(name, 0.0) * self.planned(name, self.lrs(name)[0], 0).total_steps
        for run in [*self.first_runs(), *self.other_runs()]:
            ended = run.complete or run.name in self.errors
            over += ended
            left -= seconds.get(run.config.recipe.name, 0.0) * (run.total_steps if ended else run.steps)
        time_left = f", {timedelta(seconds=round(left / self.asked['jobs']))} of steps left" if left > 0 else ""
        return f"{over} of {number} runs are over{time_left}"

    def _log(self, name: str) -> Path:
        return self.folder.path / "logs" / f"{name}.log"

    def _last_line(self, name: str) -> str:
        path = self._log(name)
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n") if path.exists() else []
        last = next((line.strip() for line in reversed(lines) if line.strip()), "no output")
        return last.removeprefix("aclip: ")

    def _read(self, name: str) -> dict[str, Any]:
        path = self.folder.path / name
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        return found


def _masks(recipe: Recipe) -> bool:
    return any(p.masking != "none" for p in recipe.passes.values())


def _stages(config: RunConfig, plan: Plan, num_pairs: int) -> tuple[Stage, ...]:
    """Return the stages of a run; their shares do not depend on its length."""
    table = Timetable.of(replace(config, samples=NOMINAL_STEPS * (config.batch_size or 1)), num_pairs)
    masks = any(p.removes for p in plan.passes.values()) or any(t.reduction for t in plan.texts.values())
    counts = Counter((table.masked(step) or not masks, table.resolution(step)) for step in range(NOMINAL_STEPS))
    plans = {resolution: resolve(plan.recipe, plan.shape, resolution) for _, resolution in counts}
    return tuple(
        Stage(number / NOMINAL_STEPS, masked, resolution, plans[resolution] if masked else plans[resolution].unmasked())
        for (masked, resolution), number in counts.items())


# what runs in processes of their own


def _in_process(log: Path, target: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    """Run `target` with its output in a log, and stop when the parent is gone."""
    descriptor = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    _lock(descriptor)  # a process that a killed comparison left behind may still be saving the same run
    os.ftruncate(descriptor, 0)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    logging.basicConfig(format="aclip: %(message)s")
    logging.getLogger("aclip").setLevel(logging.INFO)
    threading.Thread(target=_stop_without_parent, daemon=True).start()
    try:
        target(*arguments)
    except AclipError as error:
        sys.stderr.write(f"aclip: {error}\n")
        sys.exit(1)
    except KeyboardInterrupt as interrupt:
        sys.stderr.write(f"aclip: {interrupt or 'interrupted'}\n")
        sys.exit(130)


def _stop_without_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)


def _work(run: PlannedRun, probe: str | None) -> None:
    """Train a run to its end, and measure what is missing."""
    if not run.folder.final.is_dir():
        train(run.config, resume=True)
    for wanted, specs in ((run.in_training, run.config.validation), (run.afterwards, run.later)):
        names = tuple(sorted({evaluator for _, evaluator in run.missing(wanted)}))
        if names:
            evaluation.evaluate(run.config.output, data=specs, evaluators=names, device=run.config.device,
                                train=probe if any(map(evaluation.is_probe, names)) else None,
                                workers=run.config.workers)


def _time(folder: RunFolder, configs: Mapping[str, RunConfig], rounds: int, num_pairs: int) -> None:
    """Time optimizer steps of all configurations in turns, on batches that are read already; write `timing.json`."""
    baseline = configs[BASELINE]
    source, device = data.open_training(baseline.data), choose_device(baseline.device)
    steps: dict[str, Callable[[], object]] = {}
    stages: dict[str, tuple[Stage, ...]] = {}
    for name, config in configs.items():
        trainer = build_trainer(replace(config, samples=NOMINAL_STEPS * (config.batch_size or 1)), num_pairs, device)
        batches = [batch.to(device) for batch in itertools.islice(open_batches(trainer, source, 0), TIMED_BATCHES)]
        stages[name] = _stages(config, trainer.method.plan, num_pairs)
        steps |= {stage.label(name): _step(trainer, stage, itertools.cycle(batches)) for stage in stages[name]}
    times = time_in_turns(steps, warmup=WARMUP_ROUNDS, rounds=rounds, device=device)
    measured = {label: summary(seconds) for label, seconds in times.items()}
    parts = {name: [{"share": s.share, "seconds": measured[s.label(name)]["median"]} for s in of_run]
             for name, of_run in stages.items()}
    average = {name: sum(part["share"] * part["seconds"] for part in of_run) for name, of_run in parts.items()}
    folder.write_json("timing.json", {
        "configs": {name: to_dict(config) for name, config in configs.items()}, "threads": torch.get_num_threads(),
        "device": str(device), "batch_size": baseline.batch_size, "warmup_rounds": WARMUP_ROUNDS, "rounds": rounds,
        "steps": measured, "stages": parts, "step_seconds": average,
        "relative": {name: value / average[BASELINE] for name, value in average.items()}})


def _step(trainer: Trainer, stage: Stage, batches: Iterator[Any]) -> Callable[[], object]:
    """Return what takes one optimizer step, always the run's first, as in a stage of the run."""
    timetable = replace(trainer.timetable, masked_steps=NOMINAL_STEPS if stage.masked else 0,
                        resolutions=((NOMINAL_STEPS, stage.resolution),))

    def step() -> None:
        trainer.timetable, trainer.step = timetable, 0
        trainer.train_step(next(batches))

    return step


@contextmanager
def _ended(processes: Sequence[Any]) -> Iterator[None]:
    """At the end of this context, stop the processes that still run, and wait for them."""
    try:
        yield
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.join()


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    """Return nested objects flattened, with dotted keys."""
    if not isinstance(value, dict):
        return {path: value}
    return {key: leaf for name, item in value.items()
            for key, leaf in _flat(item, f"{path}.{name}" if path else name).items()}


def _gpus(device: str) -> list[str]:
    """Return what CUDA_VISIBLE_DEVICES calls the GPUs here, if there are several and `device` names none of them."""
    number = torch.cuda.device_count() if device in ("auto", "cuda") else 0
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = listed.split(",") if listed else list(map(str, range(number)))
    return [name.strip() for name in names[:number]] if number > 1 else []


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep a second comparison out of the folder."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("w")
    except OSError as error:
        raise ConfigError(f"cannot write the comparison's folder {folder}: {error.strerror}") from error
    with file:
        try:
            _lock(file.fileno(), wait=False)
        except BlockingIOError as error:
            raise ConfigError(f"another comparison is running in {folder}: wait for it, or stop it") from error
        yield


def _lock(descriptor: int, *, wait: bool = True) -> None:
    """Lock a file until it is closed, where the system can."""
    with suppress(ImportError):  # Windows
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
