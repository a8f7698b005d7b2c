"""Several recipes on equal terms: a list of run configurations, a process each, one grouped table.

    comparisons/mine/
        runs/RECIPE-lrLR-sSEED/   every run is an ordinary one
        logs/                     what each run printed
        timing.json               step times of all recipes, taken in turns in one process
        comparison.json           what was asked for, and the results so far
        index.html, table.md, table.csv

The same call continues an interrupted comparison; finished runs are kept, and recipes or seeds can be added later.
"""

import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aclip.errors import ConfigError
from aclip.recipes import find_recipe


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

    Example:
        >>> runs = aclip.compare(recipes=("clip", "a-clip"), model="vit-micro", data="pairs.csv", epochs=1,
        ...                      validation="held-out.csv", output="comparisons/mine", dry_run=True)
    """
    asked = {"recipes": _several(recipes), "epochs": epochs, "samples": samples, "minutes": minutes,
             "seeds": list(seeds), "lr": list(lr) or None, "choose_on": choose_on,
             "evaluators": _several(evaluators) or None, "probe": probe,
             "evaluate_on": _several(evaluate_on) or None, "jobs": jobs, "timing_rounds": timing_rounds}
    _check(asked, settings)
    from aclip.comparison.plans import Comparison

    comparison = Comparison(asked, _several(data), _several(validation), Path(output), dict(changes or {}), settings)
    if dry_run:
        from rich.console import Console

        Console(highlight=False).print(comparison.table())
        return comparison.records()
    return comparison.run()


def _check(asked: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Raise what can be found without PyTorch, which takes seconds to load."""
    if {"RANK", "TORCHELASTIC_RUN_ID"} & os.environ.keys():
        raise ConfigError("aclip compare starts its own processes: run it without torchrun, with --jobs for more "
                          "runs at a time")
    for one, several in (("recipe", "recipes"), ("seed", "seeds")):
        if one in settings:
            raise ConfigError(f"a comparison takes {several}, not {one}")
    if sum(asked[name] is not None for name in ("epochs", "samples", "minutes")) != 1:
        raise ConfigError("a comparison needs one budget for all recipes: --epochs, --samples or --minutes")
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
    for name in asked["recipes"]:
        find_recipe(name)


def _several(value: tuple[str, ...] | str) -> list[str]:
    return [value] if isinstance(value, str) else list(value)
