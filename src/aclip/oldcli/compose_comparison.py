"""Putting a comparison together: from the options to runs, their order, and the tables of what came out."""

import argparse
import itertools
import os
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from aclip.cli.compose import open_by_spec, open_held_out, open_training
from aclip.cli.contenders import BASELINE, Contender, baseline, contender, mean_text_length
from aclip.cli.train import config_from
from aclip.data.workers import usable_cores
from aclip.engine.children import Children, Job
from aclip.engine.comparison import ComparisonFolder, Measured, PlannedRun, run_name
from aclip.engine.console import RunsProgress
from aclip.engine.launch import find_place
from aclip.engine.run_config import Timetable, choose_device, settled
from aclip.engine.stop import Interrupted
from aclip.errors import ConfigError, TrainingError, unknown_name
from aclip.evaluation import EVALUATORS, Probe, Retrieval
from aclip.recipes import RECIPES
from aclip.report.comparison import write_comparison
from aclip.report.comparison_files import read_comparison
from aclip.report.comparison_table import to_rich
from aclip.report.formats import compact, count
from aclip.report.outcomes import outcome, primary

PROBES = tuple(name for name, evaluator in EVALUATORS.items() if issubclass(evaluator, Probe))
DECIDED = {"seed": "--seeds", "output": "--output", "epochs": "--epochs", "samples": "--samples", "data": "--data",
           "validation": "--validation", "device": "--device", "recipe.name": "--recipes",
           "recipe.optimization.lr": "--lr"}
"""Fields of a run that options of the comparison decide."""


class Comparison:
    """What was asked for, resolved and checked before anything runs.

    Args:
        args: of `aclip compare`.
        common: of `aclip train`, for every run: option -> the words that set it.

    Raises:
        ConfigError, DataError: what would fail later, in one sentence.
    """

    def __init__(self, args: argparse.Namespace, common: Mapping[str, list[str]]) -> None:
        check_options(args)
        self.args = args
        self.console = Console(highlight=False)
        self.folder = ComparisonFolder(args.output)
        self.device = choose_device(args.device or "auto")
        self.source = open_training(args.data)
        sets, later_sets = named(args.validation), named(args.evaluate_on or args.validation)
        check_names(sets, later_sets)
        self.sets, self.later_sets = tuple(sets), tuple(later_sets)
        if args.probe:
            open_by_spec(args.probe)
        self._check_sources()
        of_all = (common, len(self.source), self.device)
        self.contenders = {name: contender(name, *of_all) for name in args.recipes}
        self.baseline = self.contenders.get(BASELINE) or baseline(*of_all)
        self.evaluators = {name: self._evaluators(name) for name in args.recipes}
        shape = self.baseline.plan.shape
        self.text_tokens = mean_text_length(self.source, self.baseline.config, shape.text_cut)
        self.threads = max(1, usable_threads() // args.jobs)
        self.errors: dict[str, str] = {}
        self.chosen: dict[str, dict[str, Any]] = {}
        self.timing = self._saved_timing()
        self.budgets = self._saved_budgets()
        self._check_runs()
        self._choose_lr()

    @property
    def samples(self) -> dict[str, int]:
        """The pairs that fit into every recipe's minutes, of the recipes of which that is known."""
        return {name: budget["samples"] for name, budget in self.budgets.items()}

    def run(self) -> None:
        """Measure, train, evaluate, write the tables, and say where they are.

        Raises:
            TrainingError: some runs have failed; the others are finished, and in the tables.
            Interrupted: on SIGINT or SIGTERM, after the runs at work have saved themselves.
        """
        with self.folder.lock() as descriptor:
            self.children = self._children(descriptor)
            self.write()
            first, *others = self.args.seeds
            with RunsProgress(self.console) as self.progress:
                if self.timing is None:
                    self._measure_steps()
                self.share_out_minutes()
                self._check_runs()
                self._expect()
                self._choose_lr()
                self._train([(name, lr, first) for name in self.contenders for lr in self.lrs(name)])
                self._train([(name, self.chosen[name]["lr"], s) for s in others for name in self.chosen])
            self.write()
            report(self.folder.path)
        if self.errors:
            name, error = next(iter(self.errors.items()))
            raise TrainingError(f"{len(self.errors)} of the runs failed, the first is {name}: {error}; what they said "
                                f"is in {self.folder.logs}, and the same command tries them again")

    def _children(self, descriptor: int) -> Children:
        """Return what runs the jobs, which share threads and GPUs and hold the folder's lock."""
        surroundings = os.environ | {"OMP_NUM_THREADS": str(self.threads), "PYTHONUNBUFFERED": "1"}
        slots = [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in gpus_to_share(self.args.device or "auto")]
        return Children(self.args.jobs, surroundings, (descriptor,), slots)

    def lrs(self, name: str) -> list[float]:
        """Return the learning rates that a recipe tries."""
        return self.args.lr or [self.contenders[name].recipe.optimization.lr]

    def planned(self, name: str, lr: float, seed: int) -> PlannedRun:
        """Return one run of a recipe.

        Raises:
            ConfigError: it is shorter than one step.
        """
        output = str(self.folder.runs / run_name(name, lr, seed))
        samples = self.samples[name] if self.args.minutes is not None else self.args.samples
        length = ("--samples", str(samples)) if samples is not None else ("--epochs", str(self.args.epochs))
        own = (*length, "--lr", str(lr), "--seed", str(seed), "--output", output)
        arguments = (*self.contenders[name].arguments, *own)
        config = settled(config_from(arguments), len(self.source), self.device)
        if (config.recipe.name, config.recipe.optimization.lr) != (name, lr):
            raise ConfigError(f"--set changes what --recipes and --lr decide: '{name}' at {lr:g} has become "
                              f"'{config.recipe.name}' at {config.recipe.optimization.lr:g}")
        steps = Timetable.of(config, len(self.source)).total_steps
        in_training = (Retrieval.name,) if self.contenders[name].plan.uses_text else ()
        return PlannedRun(arguments, config, steps, len(self.source), trained=Measured(in_training, self.sets),
                          added=Measured(self.evaluators[name], self.later_sets))

    def write(self) -> None:
        """Write everything that is known to `comparison.json`."""
        one = self.baseline.config
        options = ("recipes", "epochs", "samples", "minutes", "seeds", "lr", "evaluators", "probe", "evaluate_on",
                   "jobs", "timing_rounds")
        self.folder.write_json("comparison.json", {
            "command": " ".join(["aclip", *map(shlex.quote, sys.argv[1:])]),
            "settings": {option: getattr(self.args, option) for option in options},
            "baseline": BASELINE, "model": one.model, "data": one.data, "num_pairs": len(self.source),
            "sets": list(dict.fromkeys([*self.sets, *self.later_sets])),
            "batch_size": one.batch_size, "precision": one.precision, "device": str(self.device),
            "threads": self.threads, "text_tokens": self.text_tokens,
            "recipes": {name: self._arithmetic(name) for name in self.contenders},
            "arguments": self.to_arguments(), "budgets": self.budgets, "timing": self.timing,
            "chosen_lr": self.chosen, "runs": [self._record(*run) for run in self._all_runs()],
        })

    def table(self) -> Table:
        """Return the runs and the arithmetic, as a dry run shows them."""
        table = Table("recipe", "runs", "steps", "GMAC a pair", "of clip", "learning rates", box=None, pad_edge=False)
        for name in self.contenders:
            lrs = self.lrs(name)
            costs = self._arithmetic(name)
            steps = count(self.planned(name, lrs[0], 0).total_steps) if self._length_is_known(name) else "by time"
            table.add_row(f"[bold]{name}", str(len(lrs) + len(self.args.seeds) - 1), steps,
                          compact(costs["macs"] / 1e9), f"{costs['relative_cost']:.2f}", ", ".join(map(str, lrs)))
        return table

    def _check_runs(self) -> None:
        """Refuse runs that are shorter than a step, and others in the place of ours; see `PlannedRun.check_same`."""
        for name in filter(self._length_is_known, self.contenders):
            for lr, seed in itertools.product(self.lrs(name), self.args.seeds):
                self.planned(name, lr, seed).check_same()

    def _check_sources(self) -> None:
        """Refuse other pictures to learn or to measure on than an earlier call had: both would stand in one column."""
        before = self._read("comparison.json").get("settings", {})
        for option in ("probe", "evaluate_on"):
            old, new = before.get(option), getattr(self.args, option)
            if old is not None and old != (list(new) if isinstance(new, tuple) else new):
                words = " ".join(old) if isinstance(old, list) else old
                raise ConfigError(f"{self.folder.path} holds a comparison with --{option.replace('_', '-')} {words}: "
                                  "give the same to continue it, or choose another --output")

    def _length_is_known(self, name: str) -> bool:
        return self.args.minutes is None or name in self.samples

    def _evaluators(self, name: str) -> tuple[str, ...]:
        """Return those that follow training; a recipe without text has the probes alone."""
        after_training = (Retrieval.name,) if self.args.evaluate_on else ()
        wanted = self.args.evaluators or (PROBES if self.args.probe else after_training)
        has_text = self.contenders[name].plan.uses_text
        kept = tuple(e for e in wanted if (e != Retrieval.name or self.args.evaluate_on)
                     and (has_text or EVALUATORS[e].space != "joint"))
        if self.args.lr and len(self.args.lr) > 1 and not kept and not has_text:
            raise ConfigError(f"recipe '{name}' has no text, so that nothing tells which learning rate is best: add "
                              "--probe with labelled pictures, or give one --lr")
        return kept

    def to_arguments(self) -> dict[str, list[str]]:
        """Return what `aclip train` is told for all runs of every recipe, the baseline's included."""
        every = {BASELINE: self.baseline} | self.contenders
        return {name: list(one.arguments) for name, one in every.items()}

    def _arithmetic(self, name: str) -> dict[str, Any]:
        one = self.contenders[name]
        macs = one.macs(self.text_tokens)
        return {"title": one.recipe.title, "paper": one.recipe.paper, "uses_text": one.plan.uses_text, "macs": macs,
                "relative_cost": macs / self.baseline.macs(self.text_tokens)}

    def _saved_timing(self) -> dict[str, Any] | None:
        """Return the step times of an earlier call, if of these contenders, on as many threads, of rounds enough."""
        found = self._read("timing.json")
        if not found or (found["threads"], found["device"]) != (self.threads, str(self.device)):
            return None
        if found.get("rounds", 0) < self.args.timing_rounds:
            return None
        every = {BASELINE: self.baseline} | self.contenders
        same = all(self._same(one, found["arguments"].get(name)) for name, one in every.items())
        return found if same else None

    def _saved_budgets(self) -> dict[str, dict[str, Any]]:
        """Return what an earlier call has found to fit into the same minutes: a resume keeps it, of all recipes."""
        found = self._read("comparison.json")
        if self.args.minutes is None or not found or found["settings"]["minutes"] != self.args.minutes:
            return {}
        return {name: budget for name, budget in found.get("budgets", {}).items() if name not in self.contenders
                or self._same(self.contenders[name], budget["arguments"])}

    def _read(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = self.folder.read_json(name) if (self.folder.path / name).exists() else {}
        return found

    def _same(self, one: Contender, arguments: list[str] | None) -> bool:
        """Return whether these arguments mean the same contender, however they are written."""
        try:
            return arguments is not None and (
                settled(config_from(arguments), len(self.source), self.device) == one.config)
        except ConfigError:  # of a recipe or setting that is no more
            return False

    def _measure_steps(self) -> None:
        """Time the steps of all recipes in turns, in one child process, before anything is trained."""
        words = ("compare", "--time-steps", str(self.folder.path), "--timing-rounds", str(self.args.timing_rounds))
        job = Job("timing", (words,), self.folder.logs / "timing.log")
        self.console.print("timing the steps of all recipes in turns ...")
        self._work([job])
        if "timing" in self.errors:
            sentence = f"the steps could not be timed: {self.errors.pop('timing')}; see {job.log}"
            if self.args.minutes is not None:
                raise TrainingError(sentence)
            self.console.print(f"{sentence}. The runs go on without, the table will have no times.", markup=False,
                               soft_wrap=True)
            return
        self.timing = self.folder.read_json("timing.json")
        self.write()

    def share_out_minutes(self) -> None:
        """Give every recipe the pairs that fit into its minutes, unless an earlier call has done so.

        A recipe that comes later is given what it would have been given then: by the baseline's step time of that day,
        and its own step time relative to it, which were measured in turns. So a machine that is faster or busier now
        changes nothing.
        """
        if self.args.minutes is None:
            return
        batch_size = self.baseline.config.batch_size or 1
        now = self._step_seconds(BASELINE)
        clock = next((budget["baseline_seconds"] for budget in self.budgets.values()), now)
        for name, one in self.contenders.items():
            if name not in self.budgets:
                steps = int(60.0 * self.args.minutes / (clock * (self._step_seconds(name) / now)))
                self.budgets[name] = {"samples": max(1, steps) * batch_size, "baseline_seconds": clock,
                                      "arguments": list(one.arguments)}

    def _expect(self) -> None:
        """Tell the progress bar how much there is to do."""
        counts = {name: len(self.lrs(name)) + len(self.args.seeds) - 1 for name in self.contenders}
        steps = {name: self.planned(name, self.lrs(name)[0], self.args.seeds[0]).total_steps for name in counts}
        self.progress.expect(sum(counts.values()), sum(
            counts[name] * steps[name] * self._step_seconds(name) for name in counts))

    def _step_seconds(self, name: str) -> float:
        """Return the measured time of a step; where none could be, its arithmetic, in which runs weigh alike."""
        if self.timing is None:
            return self.contenders[name].macs(self.text_tokens)
        return float(self.timing["step_seconds"][name])

    def _train(self, runs: Sequence[tuple[str, float, int]]) -> None:
        """Train and evaluate those runs that are not finished."""
        self.write()
        planned = [self.planned(*run) for run in runs]
        for run in planned:
            self.progress.add(run, self._step_seconds(run.config.recipe.name), finished=run.is_finished())
        jobs = [Job(run.name, tuple(self._commands(run)), self.folder.logs / f"{run.name}.log")
                for run in planned if not run.is_finished()]
        self._work(jobs)
        for run in planned:
            if not run.is_finished():
                self.errors.setdefault(run.name, f"it ended, and {run.folder.path} does not hold the results of its "
                                                 f"step {run.total_steps:,}")

    def _commands(self, run: PlannedRun) -> Iterator[tuple[str, ...]]:
        """Yield what is left to do for a run, as arguments of `aclip`."""
        if not run.folder.final.is_dir():
            # what is there has been found to be this run; it keeps its own settings, its folder's name among them
            there = (run.folder.path / "config.json").exists()
            yield ("train", "--resume", run.config.output) if there else ("train", *run.arguments)
        elif not run.is_trained():  # a finished run is not evaluated anew by a resume
            yield self._evaluation(run, self.args.validation, run.missing(run.trained))
        missing = run.missing(run.added)
        if missing:
            yield self._evaluation(run, self.args.evaluate_on or self.args.validation, missing)

    def _evaluation(self, run: PlannedRun, held_out: Sequence[str], evaluators: Sequence[str]) -> tuple[str, ...]:
        workers = () if run.config.workers is None else ("--workers", str(run.config.workers))
        probe = ("--train", self.args.probe) if set(evaluators) & set(PROBES) else ()
        return ("evaluate", run.config.output, "--data", *held_out, "--evaluators", *evaluators, *probe,
                "--device", run.config.device, *workers)

    def _work(self, jobs: Sequence[Job]) -> None:
        """Run `aclip` jobs to their end.

        Raises:
            Interrupted: on SIGINT or SIGTERM.
        """
        program = (sys.executable, "-m", "aclip")
        self.children.work([replace(job, commands=tuple((*program, *c) for c in job.commands)) for job in jobs],
                           self._ended, self.progress.watch, self.progress.stopping)
        if self.children.stopped:
            raise Interrupted("stopped, the runs have saved themselves; the same command continues the comparison")

    def _ended(self, job: Job, error: str | None) -> None:
        if error is not None:
            self.errors[job.name] = error = error.removeprefix("aclip: ")
        self._choose_lr()
        self.write()
        self.progress.ended(job.name, error)

    def _choose_lr(self) -> None:
        """Choose the learning rate of every recipe that has tried all of them, by the first seed's results.

        The best is the one with the highest primary metric of the first held-out set where one was measured.
        """
        for name in filter(self._length_is_known, self.contenders):
            runs = {lr: self.planned(name, lr, self.args.seeds[0]) for lr in self.lrs(name)}
            if len(runs) == 1:
                self.chosen[name] = {"lr": next(iter(runs))}
            elif all(run.is_finished() or run.name in self.errors for run in runs.values()):
                results = {lr: primary(outcome(run.folder.path), [*self.sets, *self.later_sets])
                           for lr, run in runs.items() if run.is_trained()}
                measured = {lr: found for lr, found in results.items() if found is not None}
                if measured:
                    best = max(measured, key=lambda lr: measured[lr][1])
                    (held, evaluator, metric), value = measured[best]
                    self.chosen[name] = {"lr": best, "set": held, "evaluator": evaluator, "metric": metric,
                                         "value": value}

    def _all_runs(self) -> list[tuple[str, float, int]]:
        """Return all runs that are planned so far, as recipe, learning rate and seed."""
        first, *others = self.args.seeds
        return [(name, lr, first) for name in self.contenders for lr in self.lrs(name)] + [
            (name, self.chosen[name]["lr"], seed) for seed in others for name in self.chosen]

    def _record(self, name: str, lr: float, seed: int) -> dict[str, Any]:
        """Return what is known of a run; `counts` where it is one of its recipe's results, not of the search alone."""
        record = {"name": run_name(name, lr, seed), "recipe": name, "lr": lr, "seed": seed,
                  "counts": name in self.chosen and self.chosen[name]["lr"] == lr}
        if not self._length_is_known(name):
            return record | {"finished": False}
        run = self.planned(name, lr, seed)
        state = {"error": self.errors.get(run.name), "total_steps": run.total_steps}
        if not run.is_trained():
            return record | state | {"finished": False, "complete": False}
        found = outcome(run.folder.path)
        # what else was measured by hand has no place beside the others
        found |= {part: run.only_planned(found[part]) for part in ("metrics", "chance")}
        return record | found | state | {"finished": True, "complete": not run.missing(run.added)}


def report(folder: Path) -> None:
    """Write the tables and the page of a comparison, print the table, and say where the page is."""
    console = Console(highlight=False)
    comparison = read_comparison(folder)
    page = write_comparison(comparison)
    console.print(to_rich(comparison))
    console.print(f"comparison: {page}", markup=False, soft_wrap=True)


def named(specs: Sequence[str]) -> dict[str, str]:
    """Open held-out sets and return their sources by their names."""
    return {held.name: spec.removeprefix(f"{held.name}=")
            for held, spec in zip(open_held_out(specs), specs, strict=True)}


def check_names(sets: Mapping[str, str], others: Mapping[str, str]) -> None:
    """Refuse two sources of one name, which could not be told apart."""
    for name in sets.keys() & others.keys():
        if sets[name] != others[name]:
            raise ConfigError(f"'{name}' is {sets[name]} in --validation and {others[name]} in --evaluate-on: name "
                              "them apart, as in NAME=SOURCE")


def check_options(args: argparse.Namespace) -> None:
    """Refuse options that make no sense, before anything is opened.

    Raises:
        ConfigError: the first that does not.
    """
    if find_place(os.environ).world_size > 1:
        raise ConfigError("aclip compare is one process that starts the others: run it without torchrun or srun, with "
                          "--jobs for more runs at a time")
    for name in args.recipes:
        if name not in RECIPES:
            raise ConfigError(unknown_name("recipe", name, RECIPES))
    for name in args.evaluators or ():
        if name not in EVALUATORS:
            raise ConfigError(unknown_name("evaluator", name, EVALUATORS))
    if not args.probe and set(args.evaluators or ()) & set(PROBES):
        raise ConfigError(f"--evaluators {' and '.join(PROBES)} need --probe, labelled pictures to learn from")
    if args.probe and args.evaluators and not set(args.evaluators) & set(PROBES):
        raise ConfigError(f"--probe is what {' and '.join(PROBES)} learn from, and --evaluators names neither")
    for option in ("recipes", "seeds", "lr"):
        values = getattr(args, option) or ()
        twice = next((value for value in values if values.count(value) > 1), None)
        if twice is not None:
            raise ConfigError(f"--{option} names {twice} twice")
    for option in ("jobs", "timing_rounds", "minutes"):
        value = getattr(args, option)
        if value is not None and not value > 0:
            raise ConfigError(f"--{option.replace('_', '-')} must be above 0, not {value}")
    for assignment in args.assignments:
        field = assignment.partition("=")[0]
        if field in DECIDED:
            raise ConfigError(f"--set {field} is not possible in a comparison: {DECIDED[field]} decides it")
    if args.mask_ratio is not None and all(p.masking == "none" for n in args.recipes for p in RECIPES[n].passes):
        raise ConfigError("--mask-ratio has nothing to act on: none of the recipes masks anything")


def usable_threads() -> int:
    """Return the threads that OMP_NUM_THREADS allows, else the cores that this process may use."""
    allowed = os.environ.get("OMP_NUM_THREADS", "")
    if allowed.isdigit() and int(allowed) > 0:
        return int(allowed)
    return usable_cores()


def gpus_to_share(device: str) -> list[str]:
    """Return what CUDA_VISIBLE_DEVICES calls the GPUs here, if there are several and `device` names none of them."""
    number = torch.cuda.device_count() if device in ("auto", "cuda") else 0
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = listed.split(",") if listed else list(map(str, range(number)))
    return [name.strip() for name in names[:number]] if number > 1 else []
