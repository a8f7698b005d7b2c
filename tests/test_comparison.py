"""`aclip compare` as users run it: to the end with a run that fails, through interruptions, added to, refused."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from aclip.cli import main
from aclip.comparison import processes
from aclip.comparison.plans import Comparison
from aclip.config import to_dict
from aclip.errors import ConfigError
from made_pictures import picture

SMALL = ("--model", "vit-micro", "--precision", "fp32", "--batch-size", "8", "--workers", "0", "--log-every", "1",
         "--timing-rounds", "2", "--device", "cpu")


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


@pytest.fixture(scope="module")
def compared(images: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str], str]:
    """Two seeds of a recipe, at a learning rate that works and one that does not."""
    folder = tmp_path_factory.mktemp("comparisons") / "mine"
    words = command(images, folder, "--recipes", "flip", "--samples", "24", "--seeds", "0", "1", "--lr", "5e-4", "1e30",
                    "--choose-on", f"choice={images}[16:]", "--probe", str(images), "--evaluate-on",
                    f"labelled={images}", "--jobs", "2", "--max-skipped", "0",
                    "--recipe.optimization.weight-decay", "0.1")
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
    assert "the loss became NaN or inf" in runs["flip-lr1e+30-s0"]["error"]
    assert "1 of the runs failed, the first is flip-lr1e+30-s0: the loss became NaN" in " ".join(said.split())
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
    kept = [folder / "timing.json", *(folder / "runs").glob("flip-lr0.0005-*/**/*")]
    assert len([path for path in kept if path.name == "open_clip_model.safetensors"]) == 2
    before = {path: path.stat().st_mtime_ns for path in kept}
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
    words = command(images, folder, "--recipes", "simclr", "flip", "--samples", "640", "--seeds", "0", "--jobs", "2",
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
    assert max(second) < 80

    process = start(words)
    out, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert [steps(run) for run in runs] == [list(range(1, 81))] * 2
    simclr = next(line for line in (folder / "table.md").read_text().splitlines() if line.startswith("| simclr |"))
    assert simclr.split(" | ")[1] == "\N{EN DASH}"  # no text, no retrieval


def planned(images: Path, output: Path, *, recipes: tuple[str, ...] = ("clip",), **changes: Any) -> Comparison:
    """Return a comparison that nothing was done for yet."""
    asked: dict[str, Any] = {
        "recipes": list(recipes), "epochs": None, "samples": None, "minutes": None, "seeds": [0], "lr": None,
        "choose_on": None, "evaluators": None, "probe": None, "evaluate_on": None, "jobs": 1, "timing_rounds": 2}
    given = {name: changes.pop(name) for name in list(changes) if name in asked}
    if not {"samples", "minutes"} & given.keys():
        given = {"epochs": 2.0, **given}
    settings = {"model": "vit-micro", "precision": "fp32", "batch_size": 8, "workers": 0, "device": "cpu", **changes}
    return Comparison(asked | given, [str(images)], [f"held={images}[:16]"], output, {}, settings)


def timed(comparison: Comparison, **step_seconds: float) -> Comparison:
    comparison.folder.path.mkdir(exist_ok=True)
    comparison.timing = {"step_seconds": step_seconds}
    comparison._set_budgets()
    comparison.write()
    return comparison


def test_minutes_become_pairs_by_the_measured_step_and_stay_so(images: Path, tmp_path: Path) -> None:
    first = timed(planned(images, tmp_path, recipes=("clip", "flip"), minutes=0.5), clip=0.25, flip=0.16)
    assert {name: budget["samples"] for name, budget in first.budgets.items()} == {"clip": 8 * 120, "flip": 8 * 187}
    assert first.planned("flip", 5e-4, 1).total_steps == 187  # whole steps: 30 s / 0.16 s = 187.5
    again = timed(planned(images, tmp_path, recipes=("clip", "flip"), minutes=0.5), clip=9.0, flip=9.0)
    assert again.budgets == first.budgets
    assert planned(images, tmp_path, minutes=0.25).budgets == {}


def test_a_recipe_added_later_has_the_minutes_of_the_first_clock(images: Path, tmp_path: Path) -> None:
    """A machine that is half as fast on the second day changes nothing."""
    timed(planned(images, tmp_path, recipes=("clip",), minutes=0.5), clip=0.25)
    both = timed(planned(images, tmp_path, recipes=("clip", "flip"), minutes=0.5), clip=0.5, flip=0.32)
    assert {name: budget["samples"] for name, budget in both.budgets.items()} == {"clip": 8 * 120, "flip": 8 * 187}


def test_a_run_is_complete_when_its_model_and_all_evaluations_are_there(images: Path, tmp_path: Path) -> None:
    run = planned(images, tmp_path / "mine", probe=str(images), evaluate_on=[f"labelled={images}"],
                  evaluators=["knn"]).planned("clip", 5e-4, 0)
    assert (run.in_training, run.afterwards) == ({("held", "retrieval")}, {("labelled", "knn")})
    assert run.total_steps == 6
    run.folder.final.mkdir(parents=True)
    for step, weights in ((3, "online"), (6, "ema")):
        run.folder.append("evaluations", {"evaluator": "retrieval", "set": "held", "step": step, "weights": weights})
    assert not run.trained
    run.folder.append("evaluations", {"evaluator": "retrieval", "set": "held", "step": 6, "weights": "online"})
    assert (run.trained, run.complete) == (True, False)
    run.folder.append("evaluations", {"evaluator": "knn", "set": "labelled", "step": 6, "weights": "online"})
    assert run.complete
    run.folder.final.rmdir()
    assert not run.trained


def test_another_run_in_its_place_is_refused(images: Path, tmp_path: Path) -> None:
    run = planned(images, tmp_path / "mine").planned("clip", 5e-4, 0)
    run.folder.path.mkdir(parents=True)
    config = to_dict(run.config)
    run.folder.write_json("config.json", config | {"num_pairs": 24, "workers": 3, "log_every": 5})  # change nothing
    run.check_same()
    run.folder.write_json("config.json", config | {"num_pairs": 23, "epochs": 7.0})
    with pytest.raises(ConfigError, match=r"\(epochs is 7\.0 there and 2\.0 here; num_pairs is 23 there and 24 here\)"):
        run.check_same()


def test_a_recipe_without_text_is_measured_by_probes(images: Path, tmp_path: Path) -> None:
    run = planned(images, tmp_path / "mine", recipes=("simclr",), probe=str(images), lr=[1e-3, 5e-4],
                  choose_on=f"choice={images}").planned("simclr", 1e-3, 0)
    assert run.in_training == set()
    assert run.afterwards == {(held, probe) for held in ("held", "choice") for probe in ("knn", "linear_probe")}


def test_steps_that_cost_differently_are_averaged(images: Path, tmp_path: Path) -> None:
    made = planned(images, tmp_path / "mine", recipes=("clip", "flip"), unmasked_tuning=0.2,
                   resolution_schedule=("0.5:0.5",))
    clip, flip = made.contenders["clip"], made.contenders["flip"]
    assert [(stage.share, stage.masked, stage.resolution) for stage in clip.stages] == [
        (0.5, True, 0.5), (0.5, True, 1.0)]
    assert [stage.label("flip") for stage in flip.stages] == ["flip, at 0.5 of the size", "flip", "flip, unmasked"]
    assert [stage.share for stage in flip.stages] == [0.5, 0.3, 0.2]
    small, masked, whole = (stage.plan.macs(9.0) for stage in flip.stages)
    assert small < masked < whole == clip.stages[1].plan.macs(9.0)
    assert flip.macs(9.0) == pytest.approx(0.5 * small + 0.3 * masked + 0.2 * whole)


def test_settings_reach_the_recipes_that_they_concern(images: Path, tmp_path: Path) -> None:
    made = planned(images, tmp_path / "mine", recipes=("clip", "flip", "mae"), mask_ratio=0.6, unmasked_tuning=0.2)
    assert made.contenders["flip"].config.recipe.passes["masked"].mask_ratio == 0.6
    assert [one.config.unmasked_tuning for one in made.contenders.values()] == [0.2, 0.2, 0.0]
    assert made.text_tokens == 6.0  # two digits are two tokens: noise number 1 7, start and end


@pytest.mark.parametrize(("listed", "count", "device", "expected"), [
    (None, 2, "auto", ["0", "1"]),
    ("3,5", 2, "auto", ["3", "5"]),
    ("GPU-8d1f, GPU-77a0,-1,GPU-0", 2, "cuda", ["GPU-8d1f", "GPU-77a0"]),
    (None, 1, "auto", []),
    (None, 2, "cpu", []),
])
def test_jobs_take_the_visible_gpus_in_turns(
    listed: str | None, count: int, device: str, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if listed is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", listed)
    assert processes.gpus_of(device) == expected


def test_a_second_comparison_in_the_folder_is_kept_out(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with processes.locked(tmp_path / "mine"):
        assert main(command(images, tmp_path / "mine", "--recipes", "clip", "--epochs", "1")) == 2
    assert "another comparison is running in" in capsys.readouterr().err


def test_a_dry_run_prints_runs_and_arithmetic_and_does_nothing(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    assert main(command(images, tmp_path / "mine", "--recipes", "clip", "flip", "--epochs", "2", "--lr", "5e-4", "1e-3",
                        "--choose-on", f"choice={images}[16:]", "--dry-run")) == 0
    rows = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines()}
    assert rows["clip"][1:3] == rows["flip"][1:3] == ["4", "6"]  # two rates and two more seeds, 2 epochs of 3 steps
    assert rows["clip"][4] == "1.00"
    assert 0.4 < float(rows["flip"][4]) < 1.0
    assert not (tmp_path / "mine").exists()


@pytest.mark.parametrize(("changes", "sentence"), [
    (["--recipes", "clip", "flipp"], "did you mean 'flip'"),
    (["--recipes", "clip", "clip"], "--recipes names clip twice"),
    (["--recipes", "clip", "--seeds", "1", "1"], "--seeds names 1 twice"),
    (["--recipes", "clip", "--model", "vit-micor"], "clip: "),
    (["--recipes", "clip", "--mask-ratio", "0.5"], "clip: mask_ratio has no effect"),
    (["--recipes", "clip", "flip", "--recipe.passes.masked.mask-ratio", "0.75"], "clip: cannot set"),
    (["--recipes", "clip", "--evaluators", "retrival"], "did you mean 'retrieval'"),
    (["--recipes", "clip", "--evaluators", "knn"], "knn need --probe"),
    (["--recipes", "clip", "--lr", "1e-3", "5e-4"], "several learning rates need --choose-on"),
    (["--recipes", "simclr", "--lr", "1e-3", "5e-4", "--choose-on", "c={}"], "simclr: it has no text"),
    (["--recipes", "clip", "--choose-on", "held={}"], "two sets are called 'held'"),
    (["--recipes", "clip", "--evaluate-on", "held={}"], "two sets are called 'held'"),
    (["--recipes", "clip", "--validation", "/nowhere.csv"], "/nowhere.csv"),
    (["--recipes", "clip", "--probe", "/nowhere.csv"], "/nowhere.csv"),
    (["--recipes", "clip", "--jobs", "0"], "--jobs must be above 0"),
    (["--recipes", "clip", "--minutes", "1"], "one budget for all recipes"),
    (["--recipes", "clip", "--batch-size", "25"], "fewer than one batch of 25"),
    (["--recipes", "clip", "--device", "cuda:99"], "cuda:99"),
])
def test_wrong_usage_is_one_sentence_before_anything_runs(
    changes: list[str], sentence: str, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [word.format(images) for word in changes]
    assert main(command(images, tmp_path / "mine", "--epochs", "1", *words)) in (1, 2)
    error = capsys.readouterr().err
    assert sentence in error
    assert "Traceback" not in error
    assert not (tmp_path / "mine").exists()


def test_a_comparison_is_one_process(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert main(command(images, tmp_path / "mine", "--recipes", "clip", "--epochs", "1")) == 2
    assert "run it without torchrun" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--recipes", "clip", "flipp", "--epochs", "1"], ["--recipes", "clip", "flip"]])
def test_what_costs_nothing_to_find_is_found_before_torch_is_loaded(words: list[str], tmp_path: Path) -> None:
    program = ("import sys; from aclip.cli import main\n"
               f"print(main(['compare', '--data', 'x.csv', '--validation', 'y.csv', '--output', 'mine', *{words}]),"
               " 'torch' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["2", "False"], done.stderr
