"""Schedules against the release's values, step by step."""

from itertools import pairwise

import pytest
import torch

from aclip.engine.schedule import momentum_cosine, warmup_cosine
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
