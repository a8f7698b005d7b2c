"""A comparison: what was asked for, resolved and checked before anything runs; timed, trained, written down."""

import itertools
import os
import time
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.table import Table

from aclip import data, models
from aclip.comparison.processes import ended, gpus_of, locked, start, time_steps, train_run
from aclip.comparison.runs import BASELINE, Contender, PlannedRun, stages_of
from aclip.config import Recipe, RunConfig, to_dict
from aclip.devices import choose_device, usable_cores
from aclip.errors import BadSampleError, ConfigError, TrainingError
from aclip.evaluation.sets import check_sets, is_probe, open_sets
from aclip.logs import warnings_only
from aclip.plan import resolve_run, trains_only_masked
from aclip.recipes import configure, find_recipe
from aclip.report.comparison import summary_table, write_comparison
from aclip.report.journals import outcome, primary, read_json
from aclip.rng import generator
from aclip.run_folder import RunFolder, command_line
from aclip.trainer import resolve_defaults
from aclip.training.guard import Interrupted, StopRequest

TEXT_SAMPLES = 512


class Comparison:
    """What was asked for, resolved and checked before anything runs; see `compare` for the arguments."""

    def __init__(
        self, asked: dict[str, Any], sources: list[str], validation: list[str], folder: Path, changes: dict[str, Any],
        settings: dict[str, Any],
    ) -> None:
        self.asked, self.sources, self.validation, self.folder = asked, sources, validation, RunFolder(folder)
        self.changes, self.settings = changes, {k: v for k, v in settings.items() if v is not None}
        self.console = Console(highlight=False)
        self.errors: dict[str, str] = {}  # names of runs -> why they failed
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
        with locked(self.folder.path):
            self.write()
            if self.timing is None:
                self._time_steps()
            self._set_budgets()
            self._check_runs()
            self._train()  # the first seed, at every learning rate
            self._train()  # the others, at the chosen one
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

    def runs(self) -> list[PlannedRun]:
        """Return the runs of the first seed, at every learning rate, and of the others, of recipes that chose one."""
        first, *others = self.asked["seeds"]
        return [*(self.planned(name, lr, first) for name in self.contenders for lr in self.lrs(name)),
                *(self.planned(name, choice["lr"], seed) for seed in others for name in self.contenders
                  if (choice := self.choice(name)) is not None)]

    def lrs(self, name: str) -> list[float]:
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
        if not self._budgeted():
            return []
        choices = {name: self.choice(name) for name in self.contenders}
        found = []
        for run in self.runs():
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
        probes = {name for name in asked["evaluators"] or () if is_probe(name)}
        if probes and not asked["probe"]:
            raise ConfigError(f"{' and '.join(sorted(probes))} need --probe, labelled images to learn from")
        before = self._read("comparison.json").get("settings", {}) if (self.folder.path / "runs").exists() else {}
        for option in ("minutes", "probe", "evaluate_on", "choose_on"):  # what no run's own configuration holds
            if before.get(option) is not None and before[option] != asked[option]:
                raise ConfigError(f"{self.folder.path} holds a comparison with another --{option.replace('_', '-')}: "
                                  "give the same to continue it, or choose another --output")

    def _open_sets(self) -> None:
        """Find the names of all sets; one name is one set."""
        specs: dict[str, str] = {}

        def names(of: list[str]) -> list[str]:
            found = [held.name for held in open_sets(of)]
            for name, spec in zip(found, of, strict=True):
                if specs.setdefault(name, spec) != spec:
                    raise ConfigError(f"two sets are called '{name}', {specs[name]} and {spec}: name them apart, as in "
                                      "NAME=SOURCE")
            return found

        self.sets, self.chooser, self.later_sets = names(self.validation), names(self.choose_on), names(self.later)
        with warnings_only():
            check_sets(open_sets([*self.validation, *self.choose_on]))
        if self.asked["probe"]:
            open_sets([self.asked["probe"]])

    def _contender(self, name: str, *, plain: bool = False) -> Contender:
        """Return a recipe with the settings of every run, as far as they concern it.

        `plain` leaves out changes to the recipe, which are not meant for a baseline that was not asked for.
        """
        recipe: Recipe = replace(find_recipe(name), name=name)
        settings = dict(self.settings)
        if not _masks(recipe) and (plain or any(map(_masks, map(find_recipe, self.asked["recipes"])))):
            settings.pop("mask_ratio", None)
        if not recipe.uses_frozen:
            settings.pop("teacher", None)
        if trains_only_masked(recipe):
            settings.pop("unmasked_tuning", None)
            settings.pop("unmasked_lr", None)
        try:
            config = configure(**{**settings, "recipe": recipe, "data": tuple(self.sources), "output": str(
                self.folder.path)}, changes={} if plain else self.changes)
            config = resolve_defaults(config, len(self.source), self.device)
            plan = resolve_run(config)
            if not (plan.uses_text or plain or len(self.asked["lr"] or "1") == 1 or self._evaluators(False)):
                raise ConfigError("it has no text, so choosing among learning rates needs --probe, labelled images")
            return Contender(config, plan, stages_of(config, plan, len(self.source)))
        except ConfigError as error:
            raise ConfigError(f"{name}: {error}") from error

    def _evaluators(self, uses_text: bool) -> list[str]:
        default = ["linear_probe", "knn"] if self.asked["probe"] else ["retrieval"] if self.asked["evaluate_on"] else []
        return [e for e in self.asked["evaluators"] or default if uses_text or is_probe(e)]

    def _check_runs(self) -> None:
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
        self.console.print("timing the steps of all recipes in turns ...")
        process = start(self._log("timing"), self.threads, self._gpu(0), time_steps, self.folder, self._timed(),
                        self.asked["timing_rounds"], len(self.source))
        with StopRequest() as stop, ended([process]):
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

    def _train(self) -> None:
        """Finish the runs planned so far, a few at a time; a failed run does not stop the others."""
        waiting = [run for run in self.runs() if not run.complete and run.name not in self.errors]
        working: dict[int, tuple[PlannedRun, Any]] = {}  # by slot
        processes: list[Any] = []
        with StopRequest() as stop, self.console.status("starting") as status, ended(processes):
            while (waiting or working) and not stop.requested:
                for slot in range(self.asked["jobs"]):
                    if waiting and slot not in working:
                        run = waiting.pop(0)
                        processes.append(start(self._log(run.name), self.threads, self._gpu(slot), train_run, run,
                                               self.asked["probe"]))
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

    def _left(self) -> str:
        """Return how many runs are over, and how long the remaining steps take at their measured time."""
        seconds = (self.timing or {}).get("step_seconds", {})
        others = len(self.asked["seeds"]) - 1
        number, over, left = 0, 0, 0.0
        for name in self.contenders:
            count = len(self.lrs(name)) + others
            number += count
            left += count * seconds.get(name, 0.0) * self.planned(name, self.lrs(name)[0], 0).total_steps
        for run in self.runs():
            ended = run.complete or run.name in self.errors
            over += ended
            left -= seconds.get(run.config.recipe.name, 0.0) * (run.total_steps if ended else run.steps)
        time_left = f", {timedelta(seconds=round(left / self.asked['jobs']))} of steps left" if left > 0 else ""
        return f"{over} of {number} runs are over{time_left}"

    def _gpu(self, slot: int) -> str | None:
        gpus = gpus_of(self.settings.get("device", "auto"))
        return gpus[slot % len(gpus)] if gpus else None

    def _log(self, name: str) -> Path:
        return self.folder.path / "logs" / f"{name}.log"

    def _last_line(self, name: str) -> str:
        path = self._log(name)
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n") if path.exists() else []
        last = next((line.strip() for line in reversed(lines) if line.strip()), "no output")
        return last.removeprefix("aclip: ")

    def _read(self, name: str) -> dict[str, Any]:
        return read_json(self.folder.path / name, []) or {}


def _masks(recipe: Recipe) -> bool:
    return any(p.masking != "none" for p in recipe.passes.values())
