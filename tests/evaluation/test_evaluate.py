"""`aclip evaluate` as a user runs it: what a model can do, what it learns from, what it leaves behind."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image

from aclip import exporters, models
from aclip.cli import compose_evaluation, main
from aclip.evaluation import MaskedEncoder, together

COLOURS = {"red": (220, 40, 40), "green": (40, 200, 60), "blue": (40, 60, 220), "grey": (128, 128, 128)}


def make_pictures(folder: Path, numbers: Sequence[int], *, captions: bool = True) -> Path:
    """Write noisy images of every colour into a folder each: the folder's name is the label."""
    for label, colour in COLOURS.items():
        (folder / label).mkdir(parents=True)
        for number in numbers:
            noise = np.random.default_rng([number, *colour]).integers(-30, 31, (40, 40, 3))
            Image.fromarray((np.array(colour) + noise).clip(0, 255).astype(np.uint8)).save(
                folder / label / f"{number}.png")
            if captions:
                (folder / label / f"{number}.txt").write_text(f"a {label} image\n")
    return folder


def make_run(folder: Path, *, with_text: bool) -> Path:
    """Write what `aclip evaluate` reads of a finished run."""
    torch.manual_seed(0)
    model = models.create_model("vit-tiny", with_text=with_text)
    folder.mkdir()
    exporters.open_clip.save(model, models.model_config("vit-tiny"), models.preprocess_config(model),
                          models.tokenizer_of("vit-tiny"), folder / "final")
    (folder / "config.json").write_text("{}")
    (folder / "metrics.jsonl").write_text('{"step": 7, "samples_seen": 70}\n')
    return folder


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pictures(tmp_path_factory.mktemp("images") / "held", range(100, 106))


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Training images without captions: labels are all that probes need."""
    return make_pictures(tmp_path_factory.mktemp("images") / "labelled", range(12), captions=False)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "run", with_text=True)


@pytest.fixture
def image_run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "image-run", with_text=False)


def evaluate(run: Path | str, held_out: Path, *more: str) -> int:
    return main(["evaluate", str(run), "--data", str(held_out), "--workers", "0", *more])


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]


def test_probes_learn_and_are_journalled_and_reported(
    run: Path, held_out: Path, labelled: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate(run, held_out, "--train", str(labelled), "--evaluators", "linear_probe", "knn") == 0
    found = records(run)
    assert [(r["evaluator"], r["set"], r["training_set"]) for r in found] == [
        ("linear_probe", "held", "labelled"), ("knn", "held", "labelled")]
    for record in found:
        assert record["step"] == 7
        assert record["counts"] == {"pictures": 24, "classes": 4, "training_pictures": 48, "skipped": 0,
                                    "outside_classes": 0}
        assert record["chance"] == {"top1": 0.25, "mean_per_class": 0.25}
        assert record["metrics"]["top1"] > 0.25  # colours can be told by any tower, trained or not
    assert 1e-6 <= found[0]["settings"]["l2"] <= 1e6
    assert found[1]["settings"] == {"k": 20, "temperature": 0.07}
    said = capsys.readouterr().out
    assert "held linear_probe (24 images, 4 classes, 48 training images; l2 " in said
    assert "added to" in said
    page = (run / "report.html").read_text()
    assert "Linear probe" in page
    assert "Nearest neighbours" in page


def test_an_image_tower_alone_does_what_it_can(image_run: Path, held_out: Path, labelled: Path) -> None:
    assert evaluate(image_run, held_out, "--train", f"few={labelled}") == 0
    assert [(r["evaluator"], r["training_set"]) for r in records(image_run)] == [
        ("linear_probe", "few"), ("knn", "few")]


def test_without_names_a_model_with_text_does_retrieval_and_with_training_pictures_all(
    run: Path, held_out: Path, labelled: Path
) -> None:
    assert evaluate(run, held_out) == 0
    assert [r["evaluator"] for r in records(run)] == ["retrieval"]
    assert "training_set" not in records(run)[0]
    assert evaluate(run, held_out, "--train", str(labelled)) == 0
    assert [r["evaluator"] for r in records(run)[1:]] == ["retrieval", "linear_probe", "knn"]


def test_parts_of_a_set_are_sets_of_their_own(run: Path, held_out: Path) -> None:
    assert main(["evaluate", str(run), "--data", str(held_out), f"{held_out}[:12]", f"{held_out}[12:]",
                 f"{held_out}[2:][3:9]", f"few={held_out}[:6]", "--workers", "0"]) == 0
    found = {r["set"]: r["counts"]["images"] for r in records(run)}
    assert found == {"held": 24, "held[0:12]": 12, "held[12:]": 12, "held[2:][3:9]": 6, "few": 6}
    assert sorted(path.stem for path in (run / "examples").iterdir()) == [
        "few", "held", "held_0_12_", "held_12_", "held_2_3_9_"]
    page = (run / "report.html").read_text()
    assert all(f"<summary>{name}</summary>" in page for name in found)


def test_one_fit_serves_several_sets(run: Path, held_out: Path, labelled: Path) -> None:
    assert main(["evaluate", str(run), "--data", f"a={held_out}", f"b={held_out}", "--workers", "0", "--train",
                 str(labelled), "--evaluators", "linear_probe", "retrieval"]) == 0
    found = records(run)
    assert [(r["set"], r["evaluator"]) for r in found] == [
        ("a", "linear_probe"), ("a", "retrieval"), ("b", "linear_probe"), ("b", "retrieval")]
    assert found[0]["metrics"] == found[2]["metrics"]


@pytest.mark.parametrize(("more", "ability"), [
    ([], "retrieval"),
    (["--evaluators", "retrieval"], "retrieval"),
    (["--train", "x.csv", "--evaluators", "linear_probe", "zero_shot"], "zero_shot"),
])
def test_an_image_tower_alone_refuses_text_in_one_sentence(
    more: list[str], ability: str, image_run: Path, held_out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate(image_run, held_out, *more) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"{image_run} has an image tower only, which {ability} cannot compare with text" in error
    assert "--evaluators linear_probe knn" in error
    assert not (image_run / "evaluations.jsonl").exists()


@pytest.mark.parametrize(("more", "sentence"), [
    (["--evaluators", "knn"], "knn learns from labelled images: name them with --train"),
    (["--train", "x.csv", "--evaluators", "retrieval"], "evaluators that learn, which retrieval does not"),
    (["--evaluators", "linear-probe"], "did you mean 'linear_probe'"),
])
def test_wrong_usage_is_met_before_anything_is_loaded(
    more: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", "vit-tiny", "--data", "x.csv", *more]) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.strip().count("\n") == 0


def test_training_pictures_without_labels_are_named(
    run: Path, held_out: Path, labelled: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The images of one colour, given as a folder of their own, lie in no folder that could name them."""
    assert evaluate(run, held_out, "--train", str(labelled / "red"), "--evaluators", "knn") == 1
    assert "all 12 are bad, the first is 0.png (missing label)" in capsys.readouterr().err


def test_classes_are_named_drawn_and_calibrated(run: Path, held_out: Path, tmp_path: Path) -> None:
    names = tmp_path / "names.txt"
    names.write_text("red\tcrimson red\ngreen\tleaf green\nblue\tsky blue\ngrey\tdull grey\n")
    assert evaluate(run, held_out, "--evaluators", "zero_shot", "calibration", "--classes", str(names), "--templates",
                    "simple", "my {}") == 0
    assert [r["evaluator"] for r in records(run)] == ["zero_shot", "calibration"]
    details = json.loads((run / "details" / "held-zero_shot.json").read_text())
    assert details["classes"] == ["crimson red", "leaf green", "sky blue", "dull grey"]
    assert sum(details["right"]) + sum(n for *_, n in details["confusions"]) == sum(details["images"]) == 24
    page = (run / "report.html").read_text()
    assert "Class by class" in page
    assert "as sure as right" in page


def test_texts_are_encoded_once_for_all_evaluators_sets_and_shares(
    run: Path, held_out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches, encode = [], models.LoadedModel.encode_text
    monkeypatch.setattr(models.LoadedModel, "encode_text", lambda self, tokens, normalize=True: (
        batches.append(len(tokens)), encode(self, tokens, normalize))[1])
    assert main(["evaluate", str(run), "--data", f"a={held_out}", f"b={held_out}", "--workers", "0", "--evaluators",
                 "zero_shot", "calibration", "retrieval", "--templates", "my {}", "a {}", "--keep", "1", "0.5"]) == 0
    assert batches == [8, 4]  # four classes, two templates; four captions


def test_masked_pictures_are_measured_apart(run: Path, held_out: Path) -> None:
    assert evaluate(run, held_out, "--keep", "1", "0.5", "--keep-by", "attentive", "uniform") == 0
    (whole,) = records(run)
    masked = [json.loads(line) for line in (run / "robustness.jsonl").read_text().splitlines()]
    assert [(r["keep"], r["kept_by"]) for r in masked] == [(1.0, "attentive"), (0.5, "attentive"), (0.5, "uniform")]
    assert masked[0]["metrics"] == whole["metrics"]  # everything kept is the ordinary evaluation
    assert [r["num_keep"] for r in masked] == [r["num_patches"] // (1 + (r["keep"] < 1)) for r in masked]
    assert "With fewer patches" in (run / "report.html").read_text()


def test_of_masked_pictures_all_processes_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    """One process may have had no image of a small set, and then knows neither its patches nor a speed."""
    monkeypatch.setattr(together, "collect", lambda own: [own, (32, 64, 100, 0.5), (32, 64, 50, 0.5)])
    idle = MaskedEncoder(Mock(models.LoadedModel), 0.5, "uniform")
    told = compose_evaluation._masking(idle)
    assert (told["num_keep"], told["num_patches"], told["pictures_per_second"]) == (32, 64, 300.0)


def test_protocols_stand_beside_each_other(run: Path, held_out: Path) -> None:
    assert evaluate(run, held_out) == 0
    assert evaluate(run, held_out, "--protocol", "karpathy") == 0
    assert [r["set"] for r in records(run)] == ["held", "held, karpathy"]
    assert [r["counts"]["captions"] for r in records(run)] == [4, 24]


def test_a_model_that_is_no_run_can_have_a_folder_for_its_numbers(
    run: Path, held_out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "measured"
    assert evaluate(run / "final", held_out, "--output", str(folder)) == 0
    assert [r["evaluator"] for r in records(folder)] == ["retrieval"]
    assert "Retrieval" in (folder / "report.html").read_text()
    before = (folder / "evaluations.jsonl").read_text()
    assert evaluate(run / "checkpoints" / "step-00000002", held_out, "--output", str(folder)) == 2
    assert f"--output {folder} has a config.json of something else" in capsys.readouterr().err
    assert (folder / "evaluations.jsonl").read_text() == before
    assert evaluate(run, held_out, "--output", str(folder)) == 2


@pytest.mark.parametrize(("more", "sentence"), [
    (["--keep", "0"], "0 < share <= 1, not 0"),
    (["--keep", "0.5", "--keep-by", "uniformly"], "did you mean 'uniform'"),
    (["--protocol", "karpathy-5k"], "did you mean 'karpathy-1k'"),
    (["--solver", "sgd"], "--solver is of the linear probe"),
    (["--classes", "names.txt", "--evaluators", "zero_shot"], "there is no file 'names.txt' with class names"),
    (["--templates", "a photo", "--evaluators", "zero_shot"], "'a photo' has no {} where the class name goes"),
    (["--templates", "my {}"], "add --evaluators zero_shot"),
    (["--evaluators", "zero_shot", "--first-label", "1"], "counts the classes of --classes: name them"),
])
def test_senseless_options_are_met_before_anything_is_loaded(
    more: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", "vit-tiny", "--data", "x.csv", *more]) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.strip().count("\n") == 0


def test_bad_pictures_of_a_folder_are_named_and_one_class_is_refused(
    run: Path, labelled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_pictures(tmp_path / "bad", range(2), captions=False)
    (folder / "red" / "0.png").write_bytes(b"no image")
    (folder / "green" / "1.png").write_bytes(b"")
    assert evaluate(run, folder, "--evaluators", "zero_shot") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "skipped 2 bad samples: green/1.png (" in said
    assert "6 images, 4 classes, 2 skipped" in said
    only = tmp_path / "only" / "red"
    only.parent.mkdir()
    (labelled / "red").rename(only)
    try:
        assert evaluate(run, only.parent, "--evaluators", "zero_shot") == 2
    finally:
        only.rename(labelled / "red")
    assert "all 12 images of the set are of class 'red'" in capsys.readouterr().err
    names = tmp_path / "names.txt"
    names.write_text("sun\nmoon\n")
    assert evaluate(run, folder, "--evaluators", "zero_shot", "--classes", str(names)) == 2
    assert "no image of the set is of one of the 2 given classes; the set has, for example: blue, green" in (
        capsys.readouterr().err)
