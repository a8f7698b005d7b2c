"""`aclip compare` as users run it: to the end with a run that fails, through interruptions, added to, refused."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import aclip.comparison
from aclip.cli import main
from aclip.comparison import Comparison
from aclip.errors import ConfigError
from made_pictures import picture

SMALL = ("--model", "vit-micro", "--precision", "fp32", "--batch-size", "8", "--workers", "0", "--log-every", "1",
         "--timing-rounds", "2")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 noisy images with captions and labels."""
    folder = tmp_path_factory.mktemp("data") / "images"
    for number in range(24):
        kind = folder / f"kind-{number % 2}"
        kind.mkdir(exist_ok=True, parents=True)
        picture(number, side=40).save(kind / f"{number:02}.png")
        (kind / f"{number:02}.txt").write_text(f"noise number {number}\n")
    return folder


def command(images: Path, output: Path, *more: str) -> list[str]:
    return ["compare", "--data", str(images), "--validation", f"held={images}[:16]", "--output", str(output), *SMALL,
            *more]


def start(words: list[str]) -> subprocess.Popen[str]:
    """Start the command line in a process group of its own, as a terminal does."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "160"}
    return subprocess.Popen([sys.executable, "-m", "aclip", *words], env=environment, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, start_new_session=True)


def read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def steps(run: Path) -> list[int]:
    return [record["step"] for record in lines(run / "metrics.jsonl")]


def wait_for(condition: Any, seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def state(folder: Path) -> dict[Path, int]:
    """Return when each file of finished runs was written."""
    return {path: path.stat().st_mtime_ns for run in (folder / "runs").iterdir() if (run / "final").is_dir()
            for path in run.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def compared(images: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str], str]:
    """Two seeds of a recipe, at a learning rate that works and one that does not."""
    folder = tmp_path_factory.mktemp("comparisons") / "mine"
    words = command(images, folder, "--recipes", "flip", "--samples", "24", "--seeds", "0", "1", "--lr", "5e-4", "1e30",
                    "--choose-on", f"choice={images}[16:]", "--probe", str(images), "--evaluate-on",
                    f"labelled={images}", "--jobs", "2", "--recipe.optimization.weight-decay", "0.1")
    process = start(words)
    out, errors = process.communicate(timeout=300)
    assert process.returncode == 1, errors  # some runs have failed
    return folder, words, out + errors


@pytest.mark.slow
def test_a_failed_run_is_reported_and_the_others_go_on(compared: tuple[Path, list[str], str]) -> None:
    folder, _, said = compared
    runs = {run["name"]: run for run in read(folder / "comparison.json")["runs"]}
    assert list(runs) == ["flip-lr0.0005-s0", "flip-lr1e+30-s0", "flip-lr0.0005-s1"]
    assert [name for name, run in runs.items() if not run["finished"]] == ["flip-lr1e+30-s0"]
    assert "NaN or inf" in runs["flip-lr1e+30-s0"]["error"]
    assert "1 of the runs failed, the first is flip-lr1e+30-s0: " in " ".join(said.split())
    assert f"comparison: {folder / 'index.html'}" in said
    assert "3 of 3 runs are over" in said


@pytest.mark.slow
def test_every_run_is_an_ordinary_one(compared: tuple[Path, list[str], str]) -> None:
    folder, _, _ = compared
    for seed in (0, 1):
        run = folder / "runs" / f"flip-lr0.0005-s{seed}"
        config = read(run / "config.json")
        optimization = config["recipe"]["optimization"]
        assert (config["recipe"]["name"], optimization["lr"], optimization["weight_decay"]) == ("flip", 5e-4, 0.1)
        assert (config["seed"], config["samples"]) == (seed, 24)
        assert steps(run) == [1, 2, 3]
        assert (folder / "logs" / f"{run.name}.log").stat().st_size > 0


@pytest.mark.slow
def test_results_are_those_of_the_runs(compared: tuple[Path, list[str], str]) -> None:
    folder, _, _ = compared
    found = read(folder / "comparison.json")
    chosen = found["chosen_lr"]["flip"]
    assert (chosen["lr"], chosen["set"], chosen["metric"]) == (5e-4, "choice", "image_to_text_r1")
    assert found["sets"] == ["held", "labelled"]  # what chose is not reported
    runs = [run for run in found["runs"] if run["finished"]]
    for run in runs:
        last = {(r["set"], r["evaluator"]): r["metrics"]
                for r in lines(folder / "runs" / run["name"] / "evaluations.jsonl") if r["step"] == 3}
        assert {(held, e): m for held, by in run["metrics"].items() for e, m in by.items()} == last
        assert last.keys() == {("held", "retrieval"), ("choice", "retrieval"), ("labelled", "linear_probe"),
                               ("labelled", "knn")}
        assert run["samples_seen"] == 24
        assert run["peak_memory"] > 1e8
        assert run["counts"]
    values = [run["metrics"]["labelled"]["knn"]["top1"] for run in runs]
    assert f"{50 * sum(values):.1f} ±" in (folder / "table.md").read_text()
    assert "</html>" in (folder / "index.html").read_text()


@pytest.mark.slow
def test_steps_are_timed_in_turns_with_the_baseline(compared: tuple[Path, list[str], str]) -> None:
    found = read(compared[0] / "timing.json")
    assert set(found["step_seconds"]) == {"clip", "flip"}
    assert found["relative"]["clip"] == 1.0
    assert found["relative"]["flip"] == found["step_seconds"]["flip"] / found["step_seconds"]["clip"]
    assert {step["rounds"] for step in found["steps"].values()} == {2}
    assert all(step["first_quartile"] <= step["median"] <= step["third_quartile"] for step in found["steps"].values())


@pytest.mark.slow
def test_a_comparison_that_is_added_to_repeats_nothing(compared: tuple[Path, list[str], str]) -> None:
    """Without the rate that fails and with another seed; the timing stays as it is."""
    folder, words, _ = compared
    before = state(folder) | {folder / "timing.json": (folder / "timing.json").stat().st_mtime_ns}
    assert len([path for path in before if path.name == "metrics.jsonl"]) == 2
    more = [word for word in words if word != "1e30"]
    more[more.index("--seeds") + 3: more.index("--seeds") + 3] = ["2"]
    process = start(more)
    assert process.communicate(timeout=300)[1] is not None
    assert process.returncode == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert [(run["seed"], run["complete"]) for run in read(folder / "comparison.json")["runs"]] == [
        (0, True), (1, True), (2, True)]


@pytest.mark.slow
@pytest.mark.parametrize(("old", "new", "sentence"), [
    ("24", "32", "runs/flip-lr0.0005-s0 holds a run with other settings (samples is 24 there and 32 here)"),
    ("0.1", "0.2", "(recipe.optimization.weight_decay is 0.1 there and 0.2 here)"),
    ("labelled={}", "labelled={}[:8]", "holds a comparison with another --evaluate-on: give the same"),
])
def test_other_settings_in_the_same_folder_are_refused(
    old: str, new: str, sentence: str, compared: tuple[Path, list[str], str], images: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    old, new = old.format(images), new.format(images)
    assert main([new if word == old else word for word in compared[1]]) == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.slow
def test_interrupted_and_killed_comparisons_go_on_where_they_were(images: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    words = command(images, folder, "--recipes", "simclr", "flip", "--samples", "1600", "--seeds", "0", "--jobs", "2",
                    "--lr", "5e-4", "--evaluate-every", "0", "--save-every", "0")
    runs = [folder / "runs" / f"{name}-lr0.0005-s0" for name in ("simclr", "flip")]

    def past(step: int) -> bool:
        return all((steps(run) or [0])[-1] > step for run in runs)

    process = start(words)
    wait_for(lambda: past(0))
    os.killpg(process.pid, signal.SIGINT)  # Ctrl-C: all processes of the terminal
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert "the same command continues the comparison" in errors
    assert "stopping: runs in progress save a checkpoint" in out
    assert "Traceback" not in errors
    first = [steps(run)[-1] for run in runs]
    for run, done in zip(runs, first, strict=True):
        assert [path.name for path in (run / "checkpoints").iterdir()] == [f"step-{done:08}"]

    process = start(words)
    wait_for(lambda: past(max(first)))
    process.kill()  # the runs notice, and save themselves
    process.communicate(timeout=120)
    for run, done in zip(runs, first, strict=True):
        wait_for(lambda run=run, done=done: [p for p in (run / "checkpoints").iterdir() if p.name > f"step-{done:08}"])
    second = [steps(run)[-1] for run in runs]
    assert max(second) < 200

    process = start(words)
    out, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert [steps(run) for run in runs] == [list(range(1, 201))] * 2
    simclr = next(line for line in (folder / "table.md").read_text().splitlines() if line.startswith("| simclr |"))
    assert simclr.split(" | ")[1] == "\N{EN DASH}"  # no text, no retrieval
