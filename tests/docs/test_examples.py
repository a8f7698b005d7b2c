"""The scripts of docs/examples, run as a user runs them; and extensions in a thread, with loader workers."""

import json
import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import aclip
from aclip.errors import ConfigError
from aclip.masking import MaskingContext, MaskingStrategy
from aclip.objectives import Objective
from aclip.structs import StepContext
from made_pictures import picture

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "images"
    folder.mkdir()
    for number in range(24):
        picture(number, side=40).save(folder / f"{number:02}.png")
        (folder / f"{number:02}.txt").write_text(f"noise number {number}\n")
    return folder


def run(script: str | Path, *arguments: str | Path) -> str:
    """Run a script of docs/examples, or any other, and return what it printed."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.run([sys.executable, (EXAMPLES / script).with_suffix(".py"), *arguments], env=environment,
                             capture_output=True, text=True, timeout=300, check=False)
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


def last_metrics(run_folder: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((run_folder / "metrics.jsonl").read_text().splitlines()[-1])
    return record


@pytest.fixture(scope="module")
def centre(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "centre"
    run("own_masking", images, folder)
    return folder


@pytest.mark.slow
def test_own_masking_trains(centre: Path) -> None:
    assert "centre" in json.loads((centre / "config.json").read_text())["dataflow"]
    assert (centre / "final").is_dir()


@pytest.mark.slow
def test_own_evaluator_measures_and_journals(centre: Path, images: Path) -> None:
    set_name, metric, value = run("own_evaluator", centre, images).splitlines()[-1].rsplit(" ", 2)
    assert (set_name, metric) == ("images modality", "gap")
    record = json.loads((centre / "evaluations.jsonl").read_text().splitlines()[-1])
    assert record["evaluator"] == "modality_gap"
    assert record["metrics"]["modality gap"] == pytest.approx(float(value))
    assert 0.0 < float(value) < 2.0


@pytest.mark.slow
def test_own_objective_is_one_of_the_losses(images: Path, tmp_path: Path) -> None:
    run("own_objective", images, tmp_path / "run")
    record = last_metrics(tmp_path / "run")
    assert 0.0 < record["parts"]["variance"] < 0.5  # at most its target
    assert record["loss"] == pytest.approx(record["parts"]["contrastive"] + 0.1 * record["parts"]["variance"])


@pytest.mark.slow
def test_own_recipe_is_compared(images: Path, tmp_path: Path) -> None:
    """Its runs have processes of their own, which know it too."""
    printed = run("own_recipe", images, tmp_path / "words")
    found = json.loads((tmp_path / "words" / "comparison.json").read_text())
    assert [(run["recipe"], run["complete"]) for run in found["runs"]] == [("clip", True), ("words-half", True)]
    assert set(found["timing"]["step_seconds"]) == {"clip", "words-half"}
    assert "own_recipe.py " in found["command"]
    assert "words-half" in printed


@pytest.mark.slow
def test_own_source_is_read(tmp_path: Path) -> None:
    run("own_source", tmp_path / "run")
    assert last_metrics(tmp_path / "run")["samples_seen"] == 128
    assert json.loads((tmp_path / "run" / "config.json").read_text())["num_pairs"] == 64


THREAD = """
import sys, threading
from dataclasses import replace
import torch
import aclip
from aclip.masking import MaskingStrategy

class FirstMasking(MaskingStrategy):
    def scores(self, context):
        return -torch.arange(context.num_patches).float().expand(context.batch_size, -1)

flip = aclip.RECIPES["flip"]
aclip.MASKING["first"] = FirstMasking
aclip.RECIPES["first"] = replace(flip, passes={"masked": replace(flip.passes["masked"], masking="first")})

def compare():
    runs = aclip.compare(recipes=("first",), model="vit-micro", data=sys.argv[1], validation=sys.argv[1], epochs=1,
                         output=sys.argv[2], seeds=(0,), precision="fp32", workers=0, timing_rounds=1)
    print([(run["recipe"], run["complete"]) for run in runs])

if __name__ == "__main__":
    thread = threading.Thread(target=compare)
    thread.start()
    thread.join()
"""


@pytest.mark.slow
def test_a_script_compares_its_own_masking_in_a_thread(images: Path, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(THREAD)
    assert "[('first', True)]" in run(tmp_path / "script.py", images, tmp_path / "mine")


class CornerMasking(MaskingStrategy):
    """Keeps the patches nearest to a corner."""

    def scores(self, context: MaskingContext) -> torch.Tensor:
        rows, columns = (torch.arange(n, device=context.device) for n in context.grid_size)
        return -(rows[:, None] + columns).flatten().expand(context.batch_size, -1).float()


class SizeObjective(Objective):
    """Mean square of the class token, times an option."""

    def __init__(self, reads: dict[str, aclip.Pass], shape: Any, factor: float = 1.0) -> None:
        super().__init__(reads, shape)
        self.factor = factor

    def forward(self, context: StepContext) -> torch.Tensor:
        return self.factor * context.passes[self.reads[0]].cls.float().square().mean()


@pytest.mark.slow
def test_extensions_train_in_a_thread_with_loader_workers(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(aclip.MASKING, "corner", CornerMasking)
    monkeypatch.setitem(aclip.OBJECTIVES, "size", SizeObjective)
    flip = aclip.RECIPES["flip"]
    recipe = replace(
        flip, name="corner", passes={"masked": replace(flip.passes["masked"], masking="corner")},
        objectives={**flip.objectives, "size": aclip.ObjectiveConfig(reads=("masked",), options={"factor": "0.5"})})
    runs: list[aclip.Run] = []
    errors: list[Exception] = []

    def train() -> None:
        try:
            runs.append(aclip.train(recipe=recipe, model="vit-micro", data=str(images), output=str(tmp_path / "run"),
                                    epochs=2, batch_size=8, precision="fp32", device="cpu", workers=2,
                                    log_every=1))
        except Exception as error:  # a thread loses what it raises
            errors.append(error)

    thread = threading.Thread(target=train)
    thread.start()
    thread.join(timeout=300)
    assert not errors
    assert [record["step"] for record in runs[0].metrics] == [1, 2, 3, 4, 5, 6]
    assert all(record["parts"]["size"] > 0 for record in runs[0].metrics)
    assert runs[0].config.recipe.objectives["size"].options == {"factor": "0.5"}


def test_an_option_of_an_extension_is_checked_before_anything_is_trained(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(aclip.OBJECTIVES, "size", SizeObjective)
    clip = aclip.RECIPES["clip"]
    size = aclip.ObjectiveConfig(reads=("full",), options={"factor": "abc"})
    with pytest.raises(ConfigError, match=r"objective 'size': factor .* not 'abc'"):
        aclip.train(recipe=replace(clip, objectives={**clip.objectives, "size": size}), model="vit-micro",
                    data=str(images), output=str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
