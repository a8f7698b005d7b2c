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
import multiprocessing
import os
import shlex
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
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from aclip import data, dist, evaluation, models
from aclip.bench import summary, time_in_turns
from aclip.config import CHANGEABLE, Recipe, RunConfig, from_dict, override, to_dict
from aclip.devices import choose_device, usable_cores
from aclip.errors import AclipError, BadSampleError, ConfigError, TrainingError
from aclip.logs import show_log
from aclip.plan import Plan, resolve, trains_only_masked
from aclip.recipes import configure, find_recipe
from aclip.report import summary_table, write_comparison
from aclip.report.journals import outcome, primary
from aclip.rng import generator
from aclip.run_folder import RunFolder
from aclip.trainer import Trainer, build_trainer, open_batches, resolve_defaults, train
from aclip.training.schedule import Timetable
from aclip.training.stop import Interrupted, StopRequest

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
        epochs: the budget: equal passes over the data.
        samples: the budget: equal numbers of pairs.
        minutes: the budget: equal time in training steps, by each recipe's measured step time on this machine.
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
    asked = {"recipes": list(recipes), "epochs": epochs, "samples": samples, "minutes": minutes, "seeds": list(seeds),
             "lr": list(lr) or None, "choose_on": choose_on, "evaluators": list(evaluators) or None, "probe": probe,
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
    """One run: its configuration, its length, and (set name, evaluator) pairs measured in and after training."""

    config: RunConfig
    total_steps: int
    in_training: frozenset[tuple[str, str]]
    afterwards: frozenset[tuple[str, str]]

    @property
    def folder(self) -> RunFolder:
        """The run's folder."""
        return RunFolder(Path(self.config.output))

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
        found, wanted = (_flat(to_dict(c)) for c in (self.folder.config(), self.config))
        other = [f"{key} is {found.get(key)} there and {wanted.get(key)} here" for key in {**wanted, **found}
                 if key.split(".")[0] not in IRRELEVANT and found.get(key) != wanted.get(key)]
        if other:
            raise ConfigError(f"{self.folder.path} holds a run with other settings ({'; '.join(other)}): give the same "
                              "options to continue the comparison, or choose another --output")


class Comparison:
    """What was asked for, resolved and checked before anything runs."""

    def __init__(
        self, asked: dict[str, Any], sources: list[str], validation: list[str], folder: Path, changes: dict[str, Any],
        settings: dict[str, Any],
    ) -> None:
        self.asked, self.sources, self.validation, self.folder = asked, sources, validation, RunFolder(folder)
        self.changes, self.settings = changes, settings
        self.console = Console(highlight=False)
        self._check_options()
        self.device = choose_device(settings.get("device") or "auto")
        self.source = data.open_training(sources)
        chooser = [asked["choose_on"]] if asked["choose_on"] else []
        self.sets = [held.name for held in evaluation.open_sets(validation)]
        self.chooser = [held.name for held in evaluation.open_sets(chooser)]
        self.later = asked["evaluate_on"] or validation
        self.later_sets = [held.name for held in evaluation.open_sets(self.later)]
        if asked["probe"]:
            evaluation.open_sets([asked["probe"]])
        self.contenders = {name: self._contender(name) for name in asked["recipes"]}
        self.baseline = self.contenders.get(BASELINE) or self._contender(BASELINE, plain=True)
        self.threads = max(1, int(os.environ.get("OMP_NUM_THREADS", "0") or usable_cores()) // asked["jobs"])
        self.errors: dict[str, str] = {}
        self.timing = self._saved_timing()
        self.budgets = self._saved_budgets()
        self._check_runs()

    def run(self) -> list[dict[str, Any]]:
        """Time, train, evaluate, write the tables; see `compare`."""
        with _locked(self.folder.path):
            self.write()
            if self.timing is None:
                self._time_steps()
            self._share_out_minutes()
            self._check_runs()
            first, *others = self.asked["seeds"]
            with _Progress(self.console) as progress:
                names = self.contenders
                self._train([self.planned(n, lr, first) for n in names for lr in self.lrs(n)], progress, len(others))
                self._train([self.planned(n, lr, seed) for seed in others for n in names
                             if (lr := self.chosen_lr(n)) is not None], progress)
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
        """Return one run of a recipe."""
        config = self.contenders[name].config
        recipe = replace(config.recipe, optimization=replace(config.recipe.optimization, lr=lr))
        samples = self.budgets[name]["samples"] if self.asked["minutes"] else self.asked["samples"]
        validation = [*self.validation, *([self.asked["choose_on"]] if self.asked["choose_on"] else [])]
        config = replace(config, recipe=recipe, seed=seed, samples=samples, validation=tuple(validation),
                         epochs=self.asked["epochs"] or config.epochs,
                         output=str(self.folder.path / "runs" / f"{name}-lr{lr!r}-s{seed}"))
        uses_text = self.contenders[name].plan.uses_text
        sets = [*self.sets, *self.chooser] if uses_text else []
        return PlannedRun(config, Timetable.of(config, len(self.source)).total_steps,
                          frozenset((held, "retrieval") for held in sets),
                          frozenset(itertools.product(self.later_sets, self._evaluators(name))))

    def lrs(self, name: str) -> list[float]:
        """Return the learning rates that a recipe tries."""
        return self.asked["lr"] or [self.contenders[name].config.recipe.optimization.lr]

    def chosen_lr(self, name: str) -> float | None:
        """Return a recipe's best learning rate with the first seed; None before all were tried, or if none worked."""
        found = self._choice(name)
        return None if found is None else float(found["lr"])

    def records(self) -> list[dict[str, Any]]:
        """Return a record of every run planned so far."""
        if self.asked["minutes"] and not self.budgets.keys() >= self.contenders.keys():
            return []
        first, *others = self.asked["seeds"]
        runs = [(name, lr, first) for name in self.contenders for lr in self.lrs(name)]
        runs += [(name, lr, seed) for seed in others for name in self.contenders
                 if (lr := self.chosen_lr(name)) is not None]
        found = []
        for name, lr, seed in runs:
            run = self.planned(name, lr, seed)
            record = {"name": run.folder.path.name, "recipe": name, "lr": lr, "seed": seed,
                      "counts": lr == self.chosen_lr(name), "error": self.errors.get(run.folder.path.name),
                      "total_steps": run.total_steps, "finished": run.trained, "complete": run.complete}
            if run.trained:
                results = outcome(run.folder.path)
                kept = {*run.in_training, *run.afterwards}  # what else was measured by hand is not part of it
                for part in ("metrics", "chance"):
                    by_set = {held: {e: values for e, values in by.items() if (held, e) in kept}
                              for held, by in results[part].items() if held not in self.chooser}
                    results[part] = {held: by for held, by in by_set.items() if by}
                record |= results
            found.append(record)
        return found

    def write(self) -> None:
        """Write everything known so far to `comparison.json`."""
        one = self.baseline.config
        self.folder.write_json("comparison.json", {
            "command": shlex.join(["aclip", *sys.argv[1:]]), "settings": self.asked, "baseline": BASELINE,
            "model": one.model, "data": self.sources, "num_pairs": len(self.source),
            "sets": list(dict.fromkeys([*self.sets, *self.later_sets])), "batch_size": one.batch_size,
            "precision": one.precision, "device": str(self.device), "threads": self.threads,
            "text_tokens": self.text_tokens, "recipes": {name: self._arithmetic(name) for name in self.contenders},
            "budgets": self.budgets, "timing": self.timing,
            "chosen_lr": {n: found for n in self.contenders if (found := self._choice(n)) is not None},
            "runs": self.records()})

    def table(self) -> Table:
        """Return the runs and the arithmetic, as a dry run shows them."""
        table = Table("recipe", "runs", "steps", "GMAC a pair", "of clip", "learning rates", box=None, pad_edge=False)
        for name in self.contenders:
            lrs, costs = self.lrs(name), self._arithmetic(name)
            known = not self.asked["minutes"] or name in self.budgets
            steps = f"{self.planned(name, lrs[0], 0).total_steps:,}" if known else "by time"
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

    def _check_options(self) -> None:
        asked = self.asked
        if dist.launched() or "RANK" in os.environ:
            raise ConfigError("aclip compare starts its own processes: run it without torchrun, with --jobs for more "
                              "runs at a time")
        if sum(asked[name] is not None for name in ("epochs", "samples", "minutes")) != 1:
            raise ConfigError("a comparison needs one budget for all recipes: --epochs, --samples or --minutes")
        for name in asked["evaluators"] or ():
            evaluation.find_evaluator(name)
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
        before = self._read("comparison.json").get("settings", {})
        for option in ("probe", "evaluate_on", "choose_on"):  # other images would be averaged into one column
            if before.get(option) is not None and before[option] != asked[option]:
                raise ConfigError(f"{self.folder.path} holds a comparison with another --{option.replace('_', '-')}: "
                                  "give the same to continue it, or choose another --output")

    def _contender(self, name: str, *, plain: bool = False) -> Contender:
        """Return a recipe with the settings of every run, as far as they concern it.

        Args:
            name: of the recipe.
            plain: without changes to the recipe, which are not meant for a baseline that was not asked for.
        """
        recipe: Recipe = find_recipe(name)
        settings = {k: v for k, v in self.settings.items() if v is not None}
        changes = {} if plain else self.changes
        if all(p.masking == "none" for p in recipe.passes.values()):
            settings.pop("mask_ratio", None)
        if trains_only_masked(recipe):
            settings.pop("unmasked_tuning", None)
            settings.pop("unmasked_lr", None)
        try:
            config = override(configure(**{**settings, "recipe": recipe, "data": tuple(self.sources),
                                           "output": str(self.folder.path)}), changes)
            config = resolve_defaults(config, len(self.source), self.device)
            plan = resolve(config.recipe, models.shape_of(models.model_config(
                config.model, image_size=config.image_size)))
            return Contender(config, plan, _stages(config, plan, len(self.source)))
        except ConfigError as error:
            raise ConfigError(f"{name}: {error}") from error

    def _evaluators(self, name: str) -> tuple[str, ...]:
        """Return those that follow training; a recipe without text has the probes alone."""
        default: tuple[str, ...] = ("linear_probe", "knn") if self.asked["probe"] else ()
        default = default or (("retrieval",) if self.asked["evaluate_on"] else ())
        has_text = self.contenders[name].plan.uses_text
        return tuple(e for e in self.asked["evaluators"] or default if has_text or evaluation.is_probe(e))

    def _check_runs(self) -> None:
        """Refuse other runs in the place of ours."""
        for name in self.contenders:
            if not self.asked["minutes"] or name in self.budgets:
                for lr, seed in itertools.product(self.lrs(name), self.asked["seeds"]):
                    self.planned(name, lr, seed).check_same()

    def _arithmetic(self, name: str) -> dict[str, Any]:
        one = self.contenders[name]
        macs = one.macs(self.text_tokens)
        return {"title": one.config.recipe.title, "paper": one.config.recipe.paper, "uses_text": one.plan.uses_text,
                "macs": macs, "relative_cost": macs / self.baseline.macs(self.text_tokens)}

    def _choice(self, name: str) -> dict[str, Any] | None:
        """Return the learning rate of a recipe with what chose it, once all were tried with the first seed."""
        lrs = self.lrs(name)
        if len(lrs) == 1:
            return {"lr": lrs[0]}
        if self.asked["minutes"] and name not in self.budgets:
            return None
        runs = {lr: self.planned(name, lr, self.asked["seeds"][0]) for lr in lrs}
        if not all(run.trained or run.folder.path.name in self.errors for run in runs.values()):
            return None
        results = {lr: found for lr, run in runs.items() if run.trained
                   and (found := primary(outcome(run.folder.path), [*self.chooser, *self.later_sets])) is not None}
        if not results:
            return None
        best = max(results, key=lambda lr: results[lr][1])
        (held, evaluator, metric), value = results[best]
        return {"lr": best, "set": held, "evaluator": evaluator, "metric": metric, "value": value}

    # timing and budgets

    def _timed(self) -> dict[str, RunConfig]:
        return {BASELINE: self.baseline.config} | {name: one.config for name, one in self.contenders.items()}

    def _time_steps(self) -> None:
        """Time the steps of all recipes in turns, in one process."""
        self.console.print("timing the steps of all recipes in turns ...")
        configs = {name: to_dict(config) for name, config in self._timed().items()}
        process = self._start("timing", _time, (str(self.folder.path), configs, self.asked["timing_rounds"],
                                                len(self.source)))
        process.join()
        if process.exitcode:
            error = _last_line(self.folder.path / "logs" / "timing.log")
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
        """Return what an earlier call found to fit into the same minutes: a resumed comparison keeps it."""
        found = self._read("comparison.json")
        if not self.asked["minutes"] or not found or found["settings"]["minutes"] != self.asked["minutes"]:
            return {}
        return dict(found.get("budgets", {}))

    def _share_out_minutes(self) -> None:
        """Give every recipe the pairs that fit into its minutes, unless an earlier call has.

        A recipe added later gets what it would have got then: its step time relative to the baseline's, which are timed
        in turns, at the baseline's step time of that day.
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

    def _train(self, runs: Sequence[PlannedRun], progress: "_Progress", more_seeds: int = 0) -> None:
        """Bring runs to their end, a few at a time; those that fail do not keep the others from theirs."""
        seconds = (self.timing or {}).get("step_seconds", {})
        progress.expect([(run, seconds.get(run.config.recipe.name, 1.0)) for run in runs], more_seeds)
        waiting = [run for run in runs if not run.complete]
        working: dict[int, tuple[PlannedRun, Any]] = {}  # by slot
        stopped = False
        with StopRequest() as stop:
            while working or (waiting and not stop.requested):
                while waiting and len(working) < self.asked["jobs"] and not stop.requested:
                    slot = next(i for i in range(self.asked["jobs"]) if i not in working)
                    run = waiting.pop(0)
                    work = (to_dict(run.config), self._measurements(run))
                    working[slot] = run, self._start(run.folder.path.name, _work, work, slot)
                progress.show([run for run, _ in working.values()])
                time.sleep(0.2)
                if stop.requested and not stopped:
                    stopped = True
                    for _, process in working.values():
                        process.terminate()
                    self.console.print("stopping: runs in progress save a checkpoint after the current step")
                for slot, (run, process) in list(working.items()):
                    if process.is_alive():
                        continue
                    del working[slot]
                    name = run.folder.path.name
                    if process.exitcode and not stopped:
                        line = _last_line(self.folder.path / "logs" / f"{name}.log").removeprefix("aclip: ")
                        self.errors[name] = f"{line or 'no output'} (exit code {process.exitcode})"
                    if not stopped:
                        self.write()
                        progress.ended(run, self.errors.get(name))
        if stopped:
            raise Interrupted("stopped, the runs have saved themselves; the same command continues the comparison")

    def _measurements(self, run: PlannedRun) -> list[dict[str, Any]]:
        """Return calls of `aclip.evaluate` that follow a run."""
        probe = self.asked["probe"]
        calls = []
        for wanted, specs in ((run.in_training, list(run.config.validation)), (run.afterwards, self.later)):
            names = tuple(dict.fromkeys(evaluator for _, evaluator in sorted(wanted)))
            if names:
                train_on = probe if any(map(evaluation.is_probe, names)) else None
                calls.append({"wanted": sorted(wanted), "total_steps": run.total_steps, "call": {
                    "data": tuple(specs), "evaluators": names, "train": train_on, "device": run.config.device,
                    "workers": run.config.workers}})
        return calls

    def _start(self, name: str, target: Callable[..., None], arguments: tuple[Any, ...], slot: int = 0) -> Any:
        """Start a process whose output goes to a log; it shares threads and GPUs with others."""
        gpus = _gpus(self.settings.get("device") or "auto")
        surroundings = {"OMP_NUM_THREADS": str(self.threads)}
        if gpus:
            surroundings["CUDA_VISIBLE_DEVICES"] = gpus[slot % len(gpus)]
        log = self.folder.path / "logs" / f"{name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        before = {key: os.environ.get(key) for key in surroundings}
        os.environ.update(surroundings)
        try:
            process = multiprocessing.get_context("spawn").Process(
                target=_in_process, args=(str(log), os.getpid(), target, arguments))
            process.start()
        finally:
            for key, value in before.items():
                os.environ.pop(key) if value is None else os.environ.update({key: value})
        return process

    def _read(self, name: str) -> dict[str, Any]:
        path = self.folder.path / name
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        return found


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


def _in_process(log: str, parent: int, target: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    """Run `target` with its output in a log, and stop when the parent is gone."""
    descriptor = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    show_log(debug=False)
    threading.Thread(target=_watch_parent, args=(parent,), daemon=True).start()
    try:
        target(*arguments)
    except AclipError as error:
        sys.stderr.write(f"aclip: {error}\n")
        sys.exit(1)
    except KeyboardInterrupt as interrupt:
        sys.stderr.write(f"aclip: {interrupt or 'interrupted'}\n")
        sys.exit(130)


def _watch_parent(parent: int) -> None:
    import signal

    while os.getppid() == parent:
        time.sleep(1.0)
    os.kill(os.getpid(), signal.SIGTERM)


def _work(config: dict[str, Any], measurements: Sequence[Mapping[str, Any]]) -> None:
    """Train a run to its end, and measure what is missing."""
    settled = from_dict(RunConfig, config)
    folder = RunFolder(Path(settled.output))
    if not folder.final.is_dir():
        train(settled, resume=True)
    for one in measurements:
        run = PlannedRun(settled, one["total_steps"], frozenset(), frozenset(map(tuple, one["wanted"])))
        if run.missing(run.afterwards):
            evaluation.evaluate(settled.output, **one["call"])


def _time(folder: str, configs: Mapping[str, dict[str, Any]], rounds: int, num_pairs: int) -> None:
    """Time optimizer steps of all configurations in turns, on batches that are read already; write `timing.json`."""
    settled = {name: from_dict(RunConfig, config) for name, config in configs.items()}
    source = data.open_training(next(iter(settled.values())).data)
    device = choose_device(next(iter(settled.values())).device)
    steps: dict[str, Callable[[], object]] = {}
    stages: dict[str, tuple[Stage, ...]] = {}
    for name, config in settled.items():
        config = replace(config, samples=NOMINAL_STEPS * (config.batch_size or 1))
        trainer = build_trainer(config, num_pairs, device)
        dataset = data.PairDataset(
            source, trainer.method.plan.pipeline, data.CaptionTokenizer(models.tokenizer_of(config.model)),
            sizes=trainer.method.plan.view_sizes, seed=config.seed)
        batches = [batch.to(device) for batch in itertools.islice(open_batches(trainer, dataset, 0), TIMED_BATCHES)]
        stages[name] = _stages(config, trainer.method.plan, num_pairs)
        steps |= {stage.label(name): _step(trainer, stage, itertools.cycle(batches)) for stage in stages[name]}
    times = time_in_turns(steps, warmup=WARMUP_ROUNDS, rounds=rounds, device=device)
    measured = {label: summary(seconds) for label, seconds in times.items()}
    parts = {name: [{"share": s.share, "seconds": measured[s.label(name)]["median"]} for s in of_run]
             for name, of_run in stages.items()}
    average = {name: sum(part["share"] * part["seconds"] for part in of_run) for name, of_run in parts.items()}
    RunFolder(Path(folder)).write_json("timing.json", {
        "configs": dict(configs), "threads": torch.get_num_threads(), "device": str(device),
        "batch_size": settled[BASELINE].batch_size, "warmup_rounds": WARMUP_ROUNDS, "rounds": rounds,
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


class _Progress:
    """Shows all runs of a comparison in one bar by expected seconds of steps; without a terminal, only their ends."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._bar = Progress(TextColumn("[bold]all runs"), BarColumn(bar_width=24), TextColumn("{task.fields[count]}"),
                             TimeRemainingColumn(), TextColumn("{task.fields[note]}", markup=False), console=console,
                             disable=not console.is_terminal, speed_estimate_period=600)
        self._task = self._bar.add_task("runs", count="", note="")
        self._runs: dict[str, tuple[PlannedRun, float]] = {}
        self._ended = 0
        self._begun, self._at_start, self._looked = time.monotonic(), 0.0, 0.0

    def __enter__(self) -> "_Progress":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def expect(self, runs: Sequence[tuple[PlannedRun, float]], more_seeds: int) -> None:
        """Add runs with the seconds that one step of each takes, and as many again for each further seed."""
        self._runs |= {run.folder.path.name: (run, seconds) for run, seconds in runs}
        self._ended += sum(run.complete for run, _ in runs)
        recipes = {run.config.recipe.name: run.total_steps * seconds for run, seconds in runs}
        total = sum(run.total_steps * seconds for run, seconds in self._runs.values())
        self._bar.update(self._task, total=total + more_seeds * sum(recipes.values()))
        self._at_start = self._done()

    def show(self, working: Sequence[PlannedRun]) -> None:
        """Look how far the runs in progress are, at most once a second."""
        if time.monotonic() - self._looked < 1.0:
            return
        self._looked = time.monotonic()
        note = ", ".join(f"{run.folder.path.name} {_steps(run):,}/{run.total_steps:,}" for run in working)
        self._bar.update(self._task, completed=self._done(), count=f"{self._ended}/{len(self._runs)}", note=note)

    def ended(self, run: PlannedRun, error: str | None) -> None:
        """Report the end of a run."""
        self._ended += 1
        rate = (self._done() - self._at_start) / max(time.monotonic() - self._begun, 1e-9)
        left = sum(r.total_steps * seconds for r, seconds in self._runs.values()) - self._done()
        note = f", {timedelta(seconds=round(left / rate))} left" if rate > 0 and left > 0 else ""
        self.console.print(f"{self._ended} of {len(self._runs)} runs: {run.folder.path.name} "
                           + (f"failed: {error}" if error else "is done") + note, markup=False, soft_wrap=True)

    def _done(self) -> float:
        return sum(_steps(run) * seconds for run, seconds in self._runs.values())


def _steps(run: PlannedRun) -> int:
    return int(run.folder.last("metrics").get("step", 0))


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    """Return nested objects as one, with dotted keys."""
    if not isinstance(value, dict):
        return {path: value}
    return {key: leaf for name, item in value.items()
            for key, leaf in _flat(item, f"{path}.{name}" if path else name).items()}


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n") if log.exists() else []
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


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
        with (folder / ".lock").open("w") as file:
            try:
                import fcntl

                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except ImportError:  # Windows
                pass
            except BlockingIOError as error:
                raise ConfigError(f"another comparison is running in {folder}: wait for it, or stop it") from error
            yield
    except PermissionError as error:
        raise ConfigError(f"cannot write the comparison's folder {folder}: {error.strerror}") from error
