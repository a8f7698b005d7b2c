"""Schedules against the release's values, step by step."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch

from aclip.config import Optimization, RunConfig
from aclip.errors import ConfigError
from aclip.recipes import RECIPES
from aclip.training.schedule import Timetable, momentum_cosine, warmup_cosine
from golden_numbers import Golden

STEPS = 1000


def test_golden_learning_rates(golden: Golden) -> None:
    ours = [warmup_cosine(step, STEPS, 5e-4, 40, 1e-6, 1e-5) for step in range(STEPS)]
    golden.check("schedule/lr_5e-4_to_1e-5_25ep_40it_warm1_from1e-6", torch.tensor(ours, dtype=torch.float64), 1e-12)


def test_golden_momenta(golden: Golden) -> None:
    ours = [momentum_cosine(step, STEPS, 0.996, 1.0) for step in range(STEPS)]
    golden.check("schedule/momentum_0.996_to_1_25ep_40it", torch.tensor(ours, dtype=torch.float64), 1e-12)


def test_ends_of_the_warm_up() -> None:
    values = [warmup_cosine(step, 100, 1.0, 10, 0.1, 0.0) for step in range(100)]
    assert values[0] == 0.1
    assert values[9] == values[10] == 1.0
    assert values[4] == pytest.approx(0.1 + 0.9 * 4 / 9)
    assert all(b <= a for a, b in pairwise(values[9:]))
    assert 0 < values[-1] < 1e-3


@pytest.mark.parametrize(("warmup", "expected"), [(0, 1.0), (1, 1.0), (2, 0.1)])
def test_short_warm_ups_start_right(warmup: int, expected: float) -> None:
    assert warmup_cosine(0, 10, 1.0, warmup, 0.1, 0.0) == pytest.approx(expected)


def test_past_the_end_and_runs_of_nothing_but_warm_up() -> None:
    assert warmup_cosine(100, 100, 1.0, 10, 0.1, 0.2) == warmup_cosine(150, 100, 1.0, 10, 0.1, 0.2) == 0.2
    assert warmup_cosine(0, 1, 1.0, 1, 0.1, 0.0) == 1.0
    assert momentum_cosine(200, 100, 0.99, 1.0) == 1.0


def test_equal_ends_are_a_constant() -> None:
    assert {momentum_cosine(step, 50, 0.996, 0.996) for step in range(50)} == {0.996}


def test_the_average_warms_up_until_the_momentum_is_that_of_the_cosine() -> None:
    total = 10_000
    plain = [momentum_cosine(step, total, 0.996, 1.0) for step in range(total)]
    warmed = [momentum_cosine(step, total, 0.996, 1.0, warmup=10.0) for step in range(total)]
    assert warmed[:3] == [1 / 10, 2 / 11, 3 / 12]
    assert warmed[1_000] == 1_001 / 1_010 < plain[1_000]
    assert warmed[2_239] < 0.996
    assert warmed[2_240:] == plain[2_240:]


def config(**changes: Any) -> RunConfig:
    settings = {"recipe": RECIPES["a-clip"], "model": "vit-tiny", "data": "pairs.csv", "output": "runs/first"}
    return RunConfig(**(settings | changes))


def optimization(**changes: Any) -> dict[str, Any]:
    return {"recipe": replace(RECIPES["clip"], optimization=Optimization(**changes))}


@pytest.mark.parametrize(
    ("changes", "pairs", "expected"),
    [
        # steps per epoch, in all, of warm-up, between evaluations, between checkpoints
        (
            {"batch_size": 10, "epochs": 25.0},
            1009,
            (100, 2500, 100, 100, 100),
        ),  # the last 9 pairs are no batch
        ({"batch_size": 10, "epochs": 0.5}, 1000, (100, 50, 5, 100, 100)),  # warm-up: at most a tenth
        ({"batch_size": 10, "samples": 255}, 1000, (100, 25, 3, 100, 100)),
        (
            {"batch_size": 10, "epochs": 1.0, "evaluate_every": 0.0, "save_every": 0.25},
            1000,
            (100, 100, 10, 0, 25),
        ),
        ({"batch_size": 10, "epochs": 1.0, "evaluate_every": 0.0001}, 1000, (100, 100, 10, 1, 100)),
        # so little data that an epoch is one step, or three
        ({"batch_size": 10, "epochs": 100.0}, 19, (1, 100, 1, 10, 10)),
        ({"batch_size": 10, "epochs": 100.0, "evaluate_every": 0.3, "save_every": 4.0}, 30, (3, 300, 3, 3, 40)),
        (
            {"batch_size": 10, "epochs": 25.0, **optimization(warmup_epochs=0.0)},
            1000,
            (100, 2500, 0, 100, 100),
        ),
        (
            {"batch_size": 10, "epochs": 100.0, **optimization(warmup_epochs=2.5)},
            1000,
            (100, 10000, 250, 100, 100),
        ),
        ({"batch_size": 4096, "epochs": 25.0}, 15_000_000, (3662, 91550, 3662, 3662, 3662)),
    ],
)
def test_timetable(changes: dict[str, Any], pairs: int, expected: tuple[int, ...]) -> None:
    table = Timetable.of(config(**changes), pairs)
    assert (
        table.steps_per_epoch,
        table.total_steps,
        table.warmup_steps,
        table.evaluate_every,
        table.save_every,
    ) == expected


@pytest.mark.parametrize(
    ("changes", "pairs", "message"),
    [
        ({"batch_size": 100}, 99, "99 pairs, fewer than one batch of 100: use --batch-size 99 or less"),
        ({"batch_size": 100, "samples": 99}, 1000, "shorter than one optimizer step"),
        ({"batch_size": 100, "epochs": 0.01}, 1000, "shorter than one optimizer step"),
    ],
)
def test_timetable_refuses(changes: dict[str, Any], pairs: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Timetable.of(config(**changes), pairs)


def test_masks_learning_rate_and_resolution_change_with_the_step() -> None:
    table = Timetable.of(config(batch_size=10, samples=200, resolution_schedule=("0.5:0.5", "0.25:0.75"),
                                unmasked_tuning=0.1, unmasked_lr=0.01), 100)
    assert [table.resolution(step) for step in range(20)] == [0.5] * 10 + [0.75] * 5 + [1.0] * 5
    assert [table.masked(step) for step in range(20)] == [True] * 18 + [False] * 2
    assert table.unmasked_lr == 0.01
    plain = Timetable.of(config(batch_size=10, samples=200), 100)
    assert {(plain.masked(step), plain.resolution(step)) for step in range(20)} == {(True, 1.0)}


def test_evaluations_and_checkpoints_also_come_at_the_end() -> None:
    table = Timetable.of(config(batch_size=10, samples=250, evaluate_every=0.0, save_every=1.0), 100)
    assert [step for step in range(1, 26) if table.evaluates(step)] == [25]
    assert [step for step in range(1, 26) if table.saves(step)] == [10, 20, 25]
