"""The configuration of a run: what is refused, what is settled, and how long it takes."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from aclip.config import Optimization, to_dict
from aclip.engine.run_config import (
    Phase,
    ResolutionPhase,
    RunConfig,
    Timetable,
    choose_device,
    saved_config,
    settled,
)
from aclip.errors import ConfigError
from aclip.recipes import RECIPES
from aclip.run_folder import RunFolder

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def config(**changes: Any) -> RunConfig:
    fields = {"recipe": RECIPES["a-clip"], "model": "vit-tiny", "data": "pairs.csv", "output": "runs/first"}
    return RunConfig(**(fields | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"log_every": 0}, "log_every must be at least 1, not 0"),
        ({"keep_checkpoints": 0}, "keep_checkpoints must be at least 1"),
        ({"batch_size": 1}, "batch_size must be at least 2"),
        ({"workers": -1}, "workers must be 0 or more"),
        ({"save_every": -0.5}, "save_every must be 0 or more"),
        ({"seed": -1}, "seed must be 0 or more"),
        ({"epochs": 0.0}, "epochs must be positive"),
        ({"unmasked_tuning": 1.5}, "unmasked_tuning is a share of the steps"),
        ({"unmasked_lr": 0.0}, "unmasked_lr is a positive factor"),
        ({"unmasked_lr": 0.1}, "unmasked_lr has nothing to act on"),
        ({"resolution_schedule": (ResolutionPhase(0.6, 0.5),) * 2}, "add up to at most 1, not 1.2"),
    ],
)
def test_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(**changes)


def test_epochs_do_not_matter_where_samples_are_given() -> None:
    assert config(epochs=0.0, samples=100).samples == 100


@pytest.fixture(params=["avx2 amx_bf16 amx_tile", "avx512f avx512_bf16", "avx2", None],
                ids=["AMX", "AVX512-BF16", "AVX2", "not Linux"])
def cpu_flags(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str | None:
    """Stand in for what /proc/cpuinfo says."""
    monkeypatch.setattr(Path, "exists", lambda _: request.param is not None)
    monkeypatch.setattr(Path, "read_text", lambda _: f"flags : {request.param}")
    flags: str | None = request.param
    return flags


def test_bf16_is_chosen_where_it_is_fast(cpu_flags: str | None) -> None:
    expected = "bf16" if cpu_flags and "bf16" in cpu_flags else "fp32"
    assert settled(config(), 10_000, CPU).precision == expected
    assert settled(config(), 10_000, torch.device("mps")).precision == "fp32"


@pytest.mark.parametrize(("capability", "hip", "expected"), [
    ((7, 5), None, "fp16"), ((8, 0), None, "bf16"), ((12, 0), None, "bf16"), ((6, 0), "6.2", "bf16"),
], ids=["T4", "A100", "RTX 50", "ROCm"])
def test_gpus_that_only_emulate_bf16_take_fp16(
    capability: tuple[int, int], hip: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    assert settled(config(), 10_000, CUDA).precision == expected


@pytest.mark.parametrize(("pairs", "batch_size"), [(10_000, 256), (100, 100), (1, 2)])
def test_batch_size_is_256_or_all_the_data(pairs: int, batch_size: int) -> None:
    assert settled(config(), pairs, CPU).batch_size == batch_size


def test_nothing_that_was_chosen_is_changed() -> None:
    chosen = config(batch_size=32, precision="fp16")
    assert settled(chosen, 10_000, CUDA) == chosen


def test_a_run_folder_gives_its_configuration_back(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    original = config(validation=("val=a.csv", "b.csv"), batch_size=32, precision="bf16", evaluate_every=0.5)
    folder.write_json("config.json", {**to_dict(original), "plan": {"passes": []}, "versions": "x"})
    assert saved_config(folder) == original
    folder.write_json("config.json", {**to_dict(original), "batch_size": "many"})
    with pytest.raises(ConfigError, match=r"config\.json\.batch_size takes int"):
        saved_config(folder)


def test_devices() -> None:
    assert choose_device("cpu") == CPU
    assert choose_device("auto") == torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for name in ("gpu", "cuda:99"):
        with pytest.raises(ConfigError, match=f"there is no device '{name}' here: .*use auto, cpu"):
            choose_device(name)


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


@pytest.mark.parametrize("values", [(0.0, 0.5), (1.5, 0.5), (0.5, 0.0), (0.5, float("inf"))])
def test_a_resolution_phase_refuses(values: tuple[float, float]) -> None:
    with pytest.raises(ConfigError, match="a phase of a resolution schedule"):
        ResolutionPhase(*values)


def test_every_step_knows_its_phase() -> None:
    schedule = (ResolutionPhase(0.5, 0.5), ResolutionPhase(0.25, 0.75))
    table = Timetable.of(
        config(batch_size=10, samples=200, resolution_schedule=schedule, unmasked_tuning=0.1, unmasked_lr=0.01), 100)
    phases = [table.phase(step) for step in range(20)]
    assert phases == (
        [Phase(True, 0.5, 1.0)] * 10 + [Phase(True, 0.75, 1.0)] * 5 + [Phase(True, 1.0, 1.0)] * 3
        + [Phase(False, 1.0, 0.01)] * 2)


def test_a_plain_run_has_one_phase() -> None:
    table = Timetable.of(config(batch_size=10, samples=200), 100)
    assert {table.phase(step) for step in range(20)} == {Phase(True, 1.0, 1.0)}
