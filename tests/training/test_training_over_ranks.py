"""Trainings over two ranks end where one process ends."""

from pathlib import Path

import pytest
from training_runs import Case, largest_errors, train_alone

from over_ranks import run_ranks

CASES: list[Case] = [
    *((recipe, way, "sgd") for recipe in ("a-clip", "slip", "mae") for way in ("ddp", "fsdp")),
    ("a-clip", "fsdp in 2", "sgd"),
    *(("a-clip lora=4", way, "sgd") for way in ("ddp", "fsdp in 2")),
    *((recipe, way, "adamw") for recipe in ("a-clip", "a-clip optimization.optimizer=muon") for way in ("ddp", "fsdp")),
]
# `benchmarks/equality.py` does this for every recipe


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Case, tuple[float, float]]]:
    folder: Path = tmp_path_factory.mktemp("trainings")
    train_alone(folder, CASES)
    return run_ranks(2, folder, largest_errors, CASES)


@pytest.mark.parametrize("case", [case for case in CASES if case[2] == "sgd"])
def test_weights_after_ten_steps_of_sgd(two: list[dict[Case, tuple[float, float]]], case: Case) -> None:
    for rank in two:
        assert rank[case][1] < 1e-12, rank[case]


@pytest.mark.parametrize("case", [case for case in CASES if case[2] == "adamw"])
def test_losses_of_fifty_steps_of_adamw(two: list[dict[Case, tuple[float, float]]], case: Case) -> None:
    """Adam divides by gradients that may vanish, so that rounding grows."""
    for rank in two:
        assert rank[case][0] < 1e-3
