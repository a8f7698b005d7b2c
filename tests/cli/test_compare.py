"""`aclip compare` as a user runs it: to the end with a run that fails, through an interruption, and refused."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from aclip.cli import compose_comparison, main
from aclip.cli.compare import common_arguments
from aclip.cli.compose_comparison import Comparison
from aclip.engine.comparison import ComparisonFolder, Measured
from aclip.errors import ConfigError, TrainingError
from aclip.recipes import RECIPES
from made_pictures import picture

SIMCLR_LR = f"{RECIPES['simclr'].optimization.lr:g}"
SMALL = ("--model", "vit-tiny", "--image-size", "32", "--precision", "fp32", "--batch-size", "8", "--workers", "0",
         "--log-every", "1", "--timing-rounds", "2")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 noisy pictures with captions and labels."""
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(24):
        kind = folder / f"kind-{number % 2}"
        kind.mkdir(exist_ok=True)
        picture(number, side=40).save(kind / f"{number:02}.png")
        (kind / f"{number:02}.txt").write_text(f"noise number {number}\n")
    return folder


def options(pictures: Path, output: Path, *more: str) -> list[str]:
    return ["compare", "--data", str(pictures), "--validation", f"held={pictures}", "--output", str(output), *SMALL,
            *more]


def read(folder: Path, name: str = "comparison.json") -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / name).read_text())
    return found


def steps(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def compared(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str], str]:
    """Two seeds of a recipe, at a learning rate that works and one that does not."""
    folder = tmp_path_factory.mktemp("comparisons") / "made"
    command = options(pictures, folder, "--recipes", "flip", "--samples", "24", "--seeds", "0", "1", "--lr",
                      "5e-4", "1e30", "--probe", str(pictures), "--jobs", "2",
                      "--set", "recipe.optimization.weight_decay=0.1")
    environment = os.environ | {"OMP_NUM_THREADS": "2", "COLUMNS": "160"}
    done = subprocess.run([sys.executable, "-m", "aclip", *command], env=environment, capture_output=True, text=True,
                          timeout=600, check=False)
    assert done.returncode == 1, done.stderr  # some runs have failed
    return folder, command, done.stdout + done.stderr


@pytest.mark.slow
def test_a_failed_run_is_told_and_the_others_go_on(compared: tuple[Path, list[str], str]) -> None:
    folder, _, said = compared
    runs = {run["name"]: run for run in read(folder)["runs"]}
    assert list(runs) == ["flip-lr0.0005-s0", "flip-lr1e+30-s0", "flip-lr0.0005-s1"]
    assert [name for name, run in runs.items() if not run["finished"]] == ["flip-lr1e+30-s0"]
    assert "the loss is no longer finite" in runs["flip-lr1e+30-s0"]["error"]
    assert "1 of the runs failed, the first is flip-lr1e+30-s0: the loss is no longer finite" in " ".join(said.split())
    assert f"comparison: {folder / 'index.html'}" in said
    assert "3 of 3 runs" in said


@pytest.mark.slow
def test_every_run_is_an_ordinary_one(compared: tuple[Path, list[str], str]) -> None:
    folder, _, _ = compared
    for name, seed in (("flip-lr0.0005-s0", 0), ("flip-lr0.0005-s1", 1)):
        config = read(folder / "runs" / name, "config.json")
        assert (config["recipe"]["name"], config["recipe"]["optimization"]["lr"], config["seed"], config["samples"],
                config["recipe"]["optimization"]["weight_decay"]) == ("flip", 5e-4, seed, 24, 0.1)
        assert steps(folder / "runs" / name) == [1, 2, 3]
        assert "1 thread" in config["versions"]["device"]  # two jobs share two
        assert (folder / "logs" / f"{name}.log").stat().st_size > 0


@pytest.mark.slow
def test_results_are_those_of_the_runs(compared: tuple[Path, list[str], str]) -> None:
    folder, _, _ = compared
    found = read(folder)
    chosen = found["chosen_lr"]["flip"]
    assert (chosen["lr"], chosen["set"], chosen["metric"]) == (5e-4, "held", "image_to_text_r1")
    for run in found["runs"]:
        if run["finished"]:
            records = [json.loads(line) for line in (
                folder / "runs" / run["name"] / "evaluations.jsonl").read_text().splitlines()]
            last = {record["evaluator"]: record["metrics"] for record in records if record["step"] == 3}
            assert run["metrics"]["held"] == last
            assert last.keys() == {"retrieval", "linear_probe", "knn"}
            assert run["peak_memory"] > 1e8
            assert run["samples_seen"] == 24
    values = [run["metrics"]["held"]["knn"]["top1"] for run in found["runs"] if run["finished"]]
    assert f"{50 * sum(values):.1f} ±" in (folder / "table.md").read_text()
    assert "</html>" in (folder / "index.html").read_text()


@pytest.mark.slow
def test_steps_were_timed_in_turns_with_the_baseline(compared: tuple[Path, list[str], str]) -> None:
    found = read(compared[0], "timing.json")
    assert set(found["step_seconds"]) == {"clip", "flip"}
    assert found["relative"]["clip"] == 1.0
    assert found["relative"]["flip"] == found["step_seconds"]["flip"] / found["step_seconds"]["clip"]
    assert {step["rounds"] for step in found["steps"].values()} == {2}
    assert all(step["first_quartile"] <= step["median"] <= step["third_quartile"] for step in found["steps"].values())


@pytest.mark.slow
def test_what_is_there_is_not_done_again(compared: tuple[Path, list[str], str]) -> None:
    folder, command, _ = compared
    done = [folder / "timing.json", *(folder / "runs").glob("*/metrics.jsonl"), *(folder / "runs").glob("*/final/*")]
    done = [path for path in done if "1e+30" not in str(path)]
    assert len(done) == 1 + 2 + 2 * 2
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in done}
    at = command.index("--lr")
    assert main([*command[: at + 2], *command[at + 3:]]) == 0  # without the one that fails
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in done} == before
    assert [run["finished"] for run in read(folder)["runs"]] == [True] * 2


@pytest.mark.slow
def test_the_report_alone_rewrites_table_and_page(compared: tuple[Path, list[str], str]) -> None:
    folder, _, _ = compared
    for name in ("index.html", "table.md", "table.csv"):
        (folder / name).unlink()
    assert main(["compare", "--report", str(folder)]) == 0
    assert all((folder / name).exists() for name in ("index.html", "table.md", "table.csv"))


@pytest.mark.slow
def test_other_settings_in_the_same_folder_are_refused(
    compared: tuple[Path, list[str], str], capsys: pytest.CaptureFixture[str]
) -> None:
    _, command, _ = compared
    changed = [word if word != "24" else "32" for word in command]
    assert main(changed) == 2
    assert "runs/flip-lr0.0005-s0 holds a run with other settings (samples is 24 there and 32 here)" in (
        capsys.readouterr().err)


@pytest.mark.slow
def test_an_interrupted_comparison_goes_on_where_it_was(pictures: Path, tmp_path: Path) -> None:
    folder = tmp_path / "made"
    command = options(pictures, folder, "--recipes", "simclr", "flip", "--samples", "240", "--seeds", "0",
                      "--evaluate-every", "0", "--save-every", "0")
    first, second = (folder / "runs" / f"{name}-lr{lr}-s0" for name, lr in (("simclr", SIMCLR_LR), ("flip", "0.0005")))
    process = subprocess.Popen([sys.executable, "-m", "aclip", *command], env=os.environ | {"OMP_NUM_THREADS": "1"},
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 300
    while not (second / "metrics.jsonl").exists() and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, errors = process.communicate(timeout=300)
    assert process.returncode == 130
    assert b"the same command continues the comparison" in errors
    assert b"stopping: flip-lr0.0005-s0" in out
    done = steps(second)[-1]
    assert done < 30
    assert [path.name for path in (second / "checkpoints").iterdir()] == [f"step-{done:08}"]
    assert not (second / "final").exists()
    before = (first / "metrics.jsonl").stat().st_mtime_ns
    assert main(command) == 0
    assert (first / "metrics.jsonl").stat().st_mtime_ns == before
    assert steps(second) == list(range(1, 31))
    assert "stopped after step" in (folder / "logs" / "flip-lr0.0005-s0.log").read_text()
    assert (second / "final").exists()
    simclr = next(line for line in (folder / "table.md").read_text().splitlines() if line.startswith("| simclr |"))
    assert simclr.split(" | ")[1] == "–"  # noqa: RUF001 - no text, no retrieval


def test_a_second_comparison_in_the_folder_is_kept_out(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with ComparisonFolder(tmp_path / "made").lock():
        assert main(options(pictures, tmp_path / "made", "--recipes", "clip", "--epochs", "1")) == 2
    assert "another comparison works in" in capsys.readouterr().err


def comparison(arguments: list[str]) -> Comparison:
    from aclip.cli import build_parser

    args = build_parser().parse_args(arguments)
    return Comparison(args, common_arguments(args))


@pytest.mark.parametrize(("listed", "gpus", "more", "expected"), [
    (None, 2, [], ["0", "1"]),
    ("3,5", 2, [], ["3", "5"]),
    ("GPU-8d1f, GPU-77a0,-1,GPU-0", 2, ["--device", "cuda"], ["GPU-8d1f", "GPU-77a0"]),
    (None, 1, [], []),
    (None, 0, [], []),
    (None, 2, ["--device", "cpu"], []),
])
def test_jobs_take_the_visible_gpus_in_turns(
    listed: str | None, gpus: int, more: list[str], expected: list[str], pictures: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compose_comparison, "choose_device", lambda name: torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if listed is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", listed)
    made = comparison(options(pictures, tmp_path / "made", "--recipes", "clip", "--epochs", "1", "--jobs", "3", *more))
    children = made._children(0)
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in children.slots] == expected
    assert children.environment.get("CUDA_VISIBLE_DEVICES") == listed


def test_an_option_for_several_processes_is_none_of_a_comparison(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(options(pictures, tmp_path / "made", "--recipes", "clip", "--epochs", "1", "--parallel", "fsdp"))
    assert "unrecognized arguments: --parallel fsdp" in capsys.readouterr().err


def test_minutes_become_pairs_by_the_measured_step_and_stay_so(pictures: Path, tmp_path: Path) -> None:
    arguments = options(pictures, tmp_path / "made", "--recipes", "clip", "flip", "--minutes", "0.5")
    made = comparison(arguments)
    (tmp_path / "made").mkdir()
    every = {"clip": 0.25, "flip": 0.16}
    made.timing = {"step_seconds": every, "arguments": made.to_arguments()}
    made.share_out_minutes()
    assert made.samples == {"clip": 8 * 120, "flip": 8 * 187}  # whole steps: 30 s / 0.16 s = 187.5
    assert made.planned("flip", 5e-4, 1).total_steps == 187
    made.write()
    again = comparison(arguments)
    assert again.samples == made.samples
    again.timing = {"step_seconds": {"clip": 9.0, "flip": 9.0}}
    again.share_out_minutes()
    assert again.samples == made.samples
    assert comparison([*arguments[:-1], "0.25"]).samples == {}


def test_a_recipe_that_comes_later_has_the_minutes_of_the_first_clock(pictures: Path, tmp_path: Path) -> None:
    """A machine that is half as fast on the second day changes nothing, nor does leaving a recipe out."""
    options_of_all = options(pictures, tmp_path / "made", "--minutes", "0.5", "--recipes")
    (tmp_path / "made").mkdir()
    for recipes, seconds in ((["clip"], {"clip": 0.25}), (["flip"], {"clip": 0.5, "flip": 0.32}),
                             (["clip", "flip"], {"clip": 9.0, "flip": 9.0})):
        made = comparison([*options_of_all, *recipes])
        made.timing = {"step_seconds": seconds}
        made.share_out_minutes()
        made.write()
    assert made.samples == {"clip": 8 * 120, "flip": 8 * 187}


@pytest.mark.parametrize(("first", "then", "sentence"), [
    (["--probe", "{}[:12]"], ["--probe", "{}"], "holds a comparison with --probe {}[:12]: give the same"),
    (["--probe", "{}"], [], "holds a comparison with --probe {}: give the same"),
    (["--evaluate-on", "test={}"], ["--evaluate-on", "test={}[:12]"], "with --evaluate-on test={}: give the same"),
])
def test_other_pictures_to_measure_on_are_refused(
    first: list[str], then: list[str], sentence: str, pictures: Path, tmp_path: Path
) -> None:
    every = options(pictures, tmp_path / "made", "--recipes", "clip", "--epochs", "1")
    (tmp_path / "made").mkdir()
    comparison([*every, *(word.format(pictures) for word in first)]).write()
    comparison([*every, *(word.format(pictures) for word in first)])
    with pytest.raises(ConfigError, match=re.escape(sentence.format(pictures))):
        comparison([*every, *(word.format(pictures) for word in then)])


def test_sets_to_evaluate_on_without_evaluators_are_those_of_retrieval(pictures: Path, tmp_path: Path) -> None:
    made = comparison(options(pictures, tmp_path / "made", "--recipes", "clip", "simclr", "--epochs", "1",
                              "--evaluate-on", f"test={pictures}[:12]"))
    assert made.planned("clip", 5e-4, 0).added == Measured(("retrieval",), ("test",))
    assert made.planned("simclr", 5e-4, 0).added == Measured((), ("test",))


def test_steps_that_cannot_be_timed_stop_only_what_needs_their_times(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Comparison, "_work", lambda self, jobs: self.errors.update(timing="no memory is left"))
    comparison(options(pictures, tmp_path / "a", "--recipes", "clip", "--epochs", "1"))._measure_steps()
    assert "no memory is left" in capsys.readouterr().out
    with pytest.raises(TrainingError, match="no memory is left"):
        comparison(options(pictures, tmp_path / "b", "--recipes", "clip", "--minutes", "1"))._measure_steps()


def test_a_run_that_ends_without_its_results_has_failed(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Comparison, "_work", lambda self, jobs: None)
    made = comparison(options(pictures, tmp_path / "made", "--recipes", "clip", "--epochs", "1"))
    made.progress = Mock()
    (tmp_path / "made").mkdir()
    made._train([("clip", 5e-4, 0)])
    assert "does not hold the results of its step 3" in made.errors["clip-lr0.0005-s0"]


def test_a_finished_run_that_lacks_an_evaluation_is_evaluated_and_not_trained(pictures: Path, tmp_path: Path) -> None:
    part = f"{pictures}[:12]"
    made = comparison([*options(pictures, tmp_path / "made", "--recipes", "clip", "--epochs", "1"),
                       "--validation", part])
    run = made.planned("clip", 5e-4, 0)
    run.folder.final.mkdir(parents=True)
    record = {"step": run.total_steps, "weights": "online", "evaluator": "retrieval"}
    run.folder.append("evaluations", {**record, "set": pictures.stem})  # of the whole set
    assert not run.is_trained()
    assert list(made._commands(run)) == [("evaluate", run.config.output, "--data", part, "--evaluators", "retrieval",
                                          "--device", run.config.device, "--workers", "0")]
    run.folder.append("evaluations", {**record, "set": f"{pictures.stem}[0:12]"})
    assert run.is_finished()
    assert list(made._commands(run)) == []


def test_a_dry_run_prints_runs_and_arithmetic_and_does_nothing(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    arguments = options(pictures, tmp_path / "made", "--recipes", "clip", "flip", "--epochs", "2",
                        "--lr", "5e-4", "1e-3")
    assert main([*arguments, "--dry-run"]) == 0
    lines = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines()}
    assert lines["clip"][1:3] == lines["flip"][1:3] == ["4", "6"]  # two rates and two more seeds, 2 epochs of 3 steps
    assert lines["clip"][4] == "1.00"
    assert 0.5 < float(lines["flip"][4]) < 1.0
    assert not (tmp_path / "made").exists()


def test_steps_that_cost_differently_are_averaged(pictures: Path, tmp_path: Path) -> None:
    made = comparison(options(pictures, tmp_path / "made", "--recipes", "clip", "flip", "--epochs", "2",
                              "--unmasked-tuning", "0.2", "--resolution-schedule", "0.5:0.5"))
    clip, flip = made.contenders["clip"], made.contenders["flip"]
    assert [(stage.share, stage.masked, stage.resolution) for stage in clip.stages] == [(0.5, True, 0.5),
                                                                                       (0.5, True, 1.0)]
    assert [stage.label("flip") for stage in flip.stages] == ["flip, at 0.5 of the size", "flip", "flip, unmasked"]
    assert [stage.share for stage in flip.stages] == [0.5, 0.3, 0.2]
    small, masked, whole = (stage.plan.macs(9.0) for stage in flip.stages)
    assert small < masked < whole == clip.stages[1].plan.macs(9.0)
    assert flip.macs(9.0) == pytest.approx(0.5 * small + 0.3 * masked + 0.2 * whole)


def test_steps_that_know_their_scores_are_averaged_with_those_that_do_not(pictures: Path, tmp_path: Path) -> None:
    made = comparison(options(pictures, tmp_path / "made", "--recipes", "attentive-1x50", "--epochs", "2", "--set",
                              "recipe.passes.context.refresh=4", "--unmasked-tuning", "0.2"))
    masked, unmasked = made.contenders["attentive-1x50"].stages
    assert masked.kinds("it") == [("it, scoring", 0.25, False), ("it, scores known", 0.75, True)]
    assert unmasked.kinds("it") == [("it, unmasked", 1.0, False)]
    assert unmasked.plan.macs(9.0) == pytest.approx(made.baseline.stages[0].plan.macs(9.0))


def test_the_text_length_is_that_of_the_captions(pictures: Path, tmp_path: Path) -> None:
    made = comparison(options(pictures, tmp_path / "made", "--recipes", "clip", "--epochs", "1"))
    assert made.text_tokens == 6.0  # two digits are two tokens: noise number 1 7, start and end


@pytest.mark.parametrize(("changes", "sentence"), [
    (["--recipes", "clip", "flipp"], "unknown recipe 'flipp': did you mean 'flip'"),
    (["--recipes", "clip", "clip"], "--recipes names clip twice"),
    (["--recipes", "clip", "--seeds", "1", "1"], "--seeds names 1 twice"),
    (["--recipes", "clip", "--model", "vit-tinny"], "clip: "),
    (["--recipes", "clip", "--mask-ratio", "0.5"], "none of the recipes masks anything"),
    (["--recipes", "clip", "--set", "seed=3"], "--seeds decides it"),
    (["--recipes", "clip", "--set", "recipe.optimization.lr=1"], "--lr decides it"),
    (["--recipes", "clip", "flip", "--set", "recipe.passes.masked.mask_ratio=0.75"], "clip: cannot set"),
    (["--recipes", "clip", "--evaluators", "retrival"], "did you mean 'retrieval'"),
    (["--recipes", "clip", "--evaluators", "knn"], "need --probe"),
    (["--recipes", "clip", "simclr", "--lr", "1e-3", "5e-4"], "recipe 'simclr' has no text"),
    (["--recipes", "clip", "--validation", "/nowhere.csv"], "/nowhere.csv"),
    (["--recipes", "clip", "--probe", "/nowhere.csv"], "/nowhere.csv"),
    (["--recipes", "clip", "--lr", "1e-3", "--set", 'recipe.optimization={"lr": 1.0}'],
     "'clip' at 0.001 has become 'clip' at 1"),
    (["--recipes", "clip", "--probe", "/tmp", "--evaluators", "zero_shot"], "--evaluators names neither"),
    (["--recipes", "clip", "--jobs", "0"], "--jobs must be above 0"),
    (["--recipes", "clip", "--batch-size", "25"], "fewer than one batch of 25"),
    (["--recipes", "clip", "--device", "cuda:99"], "there is no device 'cuda:99'"),
])
def test_wrong_usage_is_one_sentence_before_anything_runs(
    changes: list[str], sentence: str, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(options(pictures, tmp_path / "made", "--epochs", "1", *changes)) in (1, 2)
    error = capsys.readouterr().err
    assert sentence in error
    assert error.strip().count("\n") == 0
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(("arguments", "sentence"), [
    ([], "--recipes is missing"),
    (["--recipes", "clip", "--data", "x", "--validation", "y", "--output", "z"], "the budget is missing"),
    (["--report", "/nowhere"], "there is no comparison in /nowhere"),
    (["--time-steps", "/nowhere"], "/nowhere"),
])
def test_what_is_missing_is_named(arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", *arguments]) == 2
    assert sentence in capsys.readouterr().err


def test_one_name_is_one_set(pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'held' is .* in --validation and .*\[:12\] in --evaluate-on"):
        comparison(options(pictures, tmp_path / "made", "--recipes", "clip", "--epochs", "1",
                           "--evaluate-on", f"held={pictures}[:12]"))


def test_a_comparison_is_one_process(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(options(pictures, tmp_path / "made", "--recipes", "clip", "--epochs", "1")) == 2
    assert "run it without torchrun" in capsys.readouterr().err


def test_mask_ratio_is_for_those_that_mask(pictures: Path, tmp_path: Path) -> None:
    made = comparison(options(pictures, tmp_path / "made", "--recipes", "clip", "flip", "--epochs", "1",
                              "--mask-ratio", "0.75"))
    assert made.contenders["flip"].recipe.passes[0].mask_ratio == 0.75
    assert "--mask-ratio" not in made.contenders["clip"].arguments


def test_unmasked_tuning_is_for_those_that_learn_from_it(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = comparison(options(pictures, tmp_path / "made", "--recipes", "flip", "mae", "--epochs", "1",
                              "--unmasked-tuning", "0.2"))
    assert made.contenders["flip"].config.unmasked_tuning == 0.2
    assert made.contenders["mae"].config.unmasked_tuning == 0.0
    arguments = ["train", "--recipe", "mae", "--data", str(pictures), "--unmasked-tuning", "0.2"]
    assert main([*arguments, "--output", str(tmp_path / "run")]) == 2
    assert "recipe 'mae' asks for nothing but what the mask hides" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
