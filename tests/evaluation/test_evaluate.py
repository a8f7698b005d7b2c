"""`aclip.evaluate` from end to end: what it measures, prints, journals and refuses."""

import json
import runpy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from aclip import data, models
from aclip.errors import AclipError, CheckpointError, ConfigError, DataError, UnsupportedModelError
from aclip.evaluation import EVALUATORS, Evaluator, evaluate, sharding
from aclip.evaluation.features import MaskedEncoder
from aclip.evaluation.retrieval import Retrieval
from aclip.evaluation.sets import HeldOut, check_sets, evaluate_sets, open_sets, set_name
from aclip.exporters import open_clip as exported
from aclip.run_folder import RunFolder

COLOURS = {"red": (220, 40, 40), "green": (40, 200, 60), "blue": (40, 60, 220), "grey": (128, 128, 128)}


def make_images(folder: Path, numbers: Sequence[int], *, captions: bool = True) -> Path:
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
    """Write what `evaluate` reads of a finished run."""
    torch.manual_seed(0)
    model = models.create_model("vit-tiny", with_text=with_text)
    folder.mkdir()
    exported.save(model, models.model_config("vit-tiny"), models.preprocess_config(model),
                  models.tokenizer_of("vit-tiny"), folder / "final")
    (folder / "config.json").write_text("{}")
    (folder / "metrics.jsonl").write_text('{"step": 12, "samples_seen": 120}\n')
    return folder


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("images") / "held", range(100, 106))


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Training images without captions: labels are all that probes need."""
    return make_images(tmp_path_factory.mktemp("images") / "labelled", range(12), captions=False)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "run", with_text=True)


@pytest.fixture
def image_run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "image-run", with_text=False)


@pytest.fixture(autouse=True)
def _read_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "suitable_workers", lambda device, asked=None: 0)


def records(run: Path, journal: str = "evaluations") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / f"{journal}.jsonl").read_text().splitlines()]


def test_probes_are_fitted_journalled_and_reported(
    run: Path, held_out: Path, labelled: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = evaluate(str(run), data=str(held_out), train=str(labelled), evaluators=("linear_probe", "knn"))
    found = records(run)
    assert [(r["evaluator"], r["set"], r["training_set"]) for r in found] == [
        ("linear_probe", "held", "labelled"), ("knn", "held", "labelled")]
    for record in found:
        assert record["counts"] == {"pictures": 24, "classes": 4, "training_pictures": 48, "skipped": 0,
                                    "outside_classes": 0}
        assert record["chance"] == {"top1": 0.25, "mean_per_class": 0.25}
        assert record["metrics"]["top1"] > 0.25  # any tower distinguishes colours, trained or not
    assert [(r.set, r.evaluator, r.metric, r.value) for r in results] == [
        ("held", record["evaluator"], metric, value) for record in found for metric, value in record["metrics"].items()]
    assert 1e-6 <= found[0]["settings"]["l2"] <= 1e6
    assert found[1]["settings"] == {"k": 20, "temperature": 0.07}
    said = capsys.readouterr().out
    assert "held linear_probe (24 images, 4 classes, 48 training images; l2 " in said
    assert "added to" in said
    page = (run / "report.html").read_text()
    assert "Linear probe" in page
    assert "Nearest neighbours" in page


def test_the_step_is_that_of_the_weights_loaded(
    run: Path, held_out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A killed run has logged steps after its newest checkpoint."""
    model = models.load(run)
    model.step, model.samples_seen = 8, 80
    monkeypatch.setattr(models, "load", lambda name, weights: model)
    evaluate(str(run), data=str(held_out))
    assert [(r["step"], r["samples_seen"]) for r in records(run)] == [(8, 80)]


def test_an_image_tower_alone_does_what_it_can(image_run: Path, held_out: Path, labelled: Path) -> None:
    evaluate(str(image_run), data=str(held_out), train=f"few={labelled}")
    assert [(r["evaluator"], r["training_set"]) for r in records(image_run)] == [
        ("linear_probe", "few"), ("knn", "few")]


def test_by_default_retrieval_and_with_training_images_probes(run: Path, held_out: Path, labelled: Path) -> None:
    evaluate(str(run), data=str(held_out))
    assert [r["evaluator"] for r in records(run)] == ["retrieval"]
    assert "training_set" not in records(run)[0]
    evaluate(str(run), data=str(held_out), train=str(labelled))
    assert [r["evaluator"] for r in records(run)[1:]] == ["retrieval", "linear_probe", "knn"]


def test_a_loaded_model_is_measured_and_left_as_it_was(run: Path, held_out: Path, tmp_path: Path) -> None:
    model = models.load(run)
    tokenizer = model.tokenizer
    results = evaluate(model, data=(str(held_out),), output=str(tmp_path / "numbers"))
    assert model.tokenizer is tokenizer
    assert results == evaluate(run, data=str(held_out))
    assert records(tmp_path / "numbers")[0]["metrics"] == records(run)[0]["metrics"]


def mean_cosine(images: Any, texts: Any) -> dict[str, float]:
    cosines = images.features @ images.features.T
    return {"mean_cosine": cosines.mean(), "texts": len(texts(["a", "b"]))}


class Spread(Evaluator):
    space = "trunk"

    def measure(self, images: Any, texts: Any) -> dict[str, float]:
        return {"deviation": images.features.std(dim=0).mean()}


def test_users_own_evaluators_are_functions_or_classes(
    run: Path, image_run: Path, held_out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(EVALUATORS, "mean_cosine", mean_cosine)
    monkeypatch.setitem(EVALUATORS, "spread", Spread)
    results = {r.metric: r.value for r in evaluate(str(run), data=str(held_out), evaluators=("mean_cosine", "spread"))}
    assert set(results) == {"mean_cosine", "texts", "deviation"}
    assert results["texts"] == 2.0
    (first, second) = records(run)
    assert first["metrics"]["mean_cosine"] == results["mean_cosine"]
    assert second["counts"] == {"pictures": 24, "skipped": 0}
    assert f"held mean_cosine (24 images): mean_cosine {results['mean_cosine']:.4g}" in capsys.readouterr().out
    assert "mean_cosine" in (run / "report.html").read_text()
    evaluate(str(image_run), data=str(held_out), evaluators="spread")


def test_the_documented_evaluator_works(run: Path, held_out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(EVALUATORS, "modality_gap", mean_cosine)  # which the script replaces, until the test ends
    runpy.run_path(str(Path(__file__).parents[2] / "docs" / "examples" / "own_evaluator.py"))
    (result,) = evaluate(str(run), data=str(held_out), evaluators="modality_gap")
    assert 0.0 < result.value < 2.0


def test_parts_of_a_set_are_sets_of_their_own(run: Path, held_out: Path) -> None:
    evaluate(str(run), data=(str(held_out), f"{held_out}[:12]", f"{held_out}[12:]", f"{held_out}[2:][3:9]",
                             f"few={held_out}[:6]"))
    found = {r["set"]: r["counts"]["pictures"] for r in records(run)}
    assert found == {"held": 24, "held[0:12]": 12, "held[12:]": 12, "held[2:][3:9]": 6, "few": 6}
    assert sorted(path.stem for path in (run / "examples").iterdir()) == [
        "few", "held", "held_0_12_", "held_12_", "held_2_3_9_"]
    page = (run / "report.html").read_text()
    assert all(f"<summary>{name}</summary>" in page for name in found)


@pytest.mark.parametrize(("spec", "name"), [
    ("emoji:val", "val"), ("emoji:val[:60]", "val[0:60]"), ("lists/val.csv?images=d/images", "val"),
    ("lists/val.csv[2:][3:9]", "val[2:][3:9]"),
])
def test_sets_are_called_by_the_last_word_of_their_source(spec: str, name: str) -> None:
    assert set_name(spec) == name


def test_an_equals_sign_in_a_path_is_no_name(held_out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in Hive's layout, year=2020/part.parquet."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "year=2020").symlink_to(held_out.parent)
    (tmp_path / "only=here").symlink_to(held_out)
    assert [held.name for held in open_sets(["year=2020/held", "only=here[:3]", "a=year=2020/held"])] == [
        "held", "only=here[0:3]", "a"]
    with pytest.raises(ConfigError, match="two held-out sets are called 'held'"):
        open_sets([str(held_out), "year=2020/held"])


def test_sets_without_captions_are_refused_before_training(held_out: Path, labelled: Path, tmp_path: Path) -> None:
    check_sets(open_sets([str(held_out)]))
    for label in COLOURS:
        for image in (labelled / label).iterdir():
            (tmp_path / "empty" / label).mkdir(parents=True, exist_ok=True)
            (tmp_path / "empty" / label / image.name).symlink_to(image)
            (tmp_path / "empty" / label / f"{image.stem}.txt").write_text(" \n")
    with pytest.raises(DataError, match=r"held-out set 'empty' has no usable caption among the 24 samples .*empty cap"):
        check_sets(open_sets([str(held_out), str(tmp_path / "empty")]))


def test_one_fit_serves_several_sets(run: Path, held_out: Path, labelled: Path) -> None:
    evaluate(str(run), data=(f"a={held_out}", f"b={held_out}"), train=str(labelled),
             evaluators=("linear_probe", "retrieval"))
    found = records(run)
    assert [(r["set"], r["evaluator"]) for r in found] == [
        ("a", "linear_probe"), ("a", "retrieval"), ("b", "linear_probe"), ("b", "retrieval")]
    assert found[0]["metrics"] == found[2]["metrics"]


def test_a_set_that_fails_does_not_keep_others_from_being_evaluated(run: Path, held_out: Path) -> None:
    class Broken(data.Source):
        spec = "broken"

        def __len__(self) -> int:
            return 3

        def name(self, index: int) -> str:
            return str(index)

        def read(self, index: int) -> data.RawSample:
            raise OSError("disk gone")

    model = models.load(run)
    folder = RunFolder(run)
    with pytest.raises(AclipError, match="set 'broken': cannot evaluate: disk gone"):
        evaluate_sets(model, [HeldOut("broken", Broken()), *open_sets([str(held_out)])], [Retrieval()], folder,
                      Console(), step=3, samples_seen=30, device=torch.device("cpu"), workers=0)
    assert [(r["set"], r["step"]) for r in records(run)] == [("held", 3)]


@pytest.mark.parametrize(("options", "ability"), [
    ({}, "retrieval"),
    ({"evaluators": ("retrieval",)}, "retrieval"),
    ({"train": "x.csv", "evaluators": ("linear_probe", "zero_shot")}, "zero_shot"),
])
def test_an_image_tower_alone_refuses_text(
    options: dict[str, Any], ability: str, image_run: Path, held_out: Path
) -> None:
    with pytest.raises(UnsupportedModelError, match=f"image tower only, which {ability} cannot compare with text"):
        evaluate(str(image_run), data=str(held_out), **options)
    assert not (image_run / "evaluations.jsonl").exists()


@pytest.mark.parametrize(("options", "sentence"), [
    ({"evaluators": ("knn",)}, "knn learns from labelled images: name them with --train"),
    ({"train": "x.csv", "evaluators": ("retrieval",)}, "--train is for probes: add linear_probe or knn"),
    ({"evaluators": ("linear-probe",)}, "did you mean 'linear_probe'"),
    ({"keep": (0.0,)}, r"in \(0, 1\], not 0"),
    ({"keep": (0.5,), "keep_by": ("uniformly",)}, "did you mean 'uniform'"),
    ({"keep": (0.5,), "block_size": 0}, "--block-size is in patches and at least 1, not 0"),
    ({"protocol": "karpathy-5k"}, "did you mean 'karpathy-1k'"),
    ({"protocol": "all", "evaluators": ("zero_shot",)}, "--protocol is for retrieval"),
    ({"classes": "names.txt", "evaluators": ("zero_shot",)}, "there is no file 'names.txt'"),
    ({"templates": ("a photo",), "evaluators": ("zero_shot",)}, "'a photo' has no {} where the class name goes"),
    ({"templates": "my {}"}, "add zero_shot to --evaluators"),
    ({"data": ()}, "--data names no set"),
])
def test_senseless_options_are_refused_before_anything_is_loaded(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        evaluate("no-such-model", **{"data": "x.csv"} | options)


def test_training_images_without_labels_are_named(run: Path, held_out: Path, labelled: Path) -> None:
    """A folder of one colour lies in no folder that could name it."""
    with pytest.raises(DataError, match=r"all 12 are bad, the first is 0.png \(missing label\)"):
        evaluate(str(run), data=str(held_out), train=str(labelled / "red"), evaluators=("knn",))


def test_classes_are_named_drawn_and_calibrated(run: Path, held_out: Path, tmp_path: Path) -> None:
    names = tmp_path / "names.txt"
    names.write_text("red\tcrimson red\ngreen\tleaf green\nblue\tsky blue\ngrey\tdull grey\n")
    evaluate(str(run), data=str(held_out), evaluators=("zero_shot", "calibration"), classes=str(names),
             templates=("simple", "my {}"))
    assert [r["evaluator"] for r in records(run)] == ["zero_shot", "calibration"]
    assert set(records(run)[0]["metrics"]) == {"top1", "mean_per_class"}  # top-5 of four classes says nothing
    details = json.loads((run / "details" / "held-zero_shot.json").read_text())
    assert details["classes"] == ["crimson red", "leaf green", "sky blue", "dull grey"]
    assert sum(details["right"]) + sum(n for *_, n in details["confusions"]) == sum(details["pictures"]) == 24
    page = (run / "report.html").read_text()
    assert "Class by class" in page
    assert "perfectly calibrated" in page


def test_texts_are_encoded_once_for_all_evaluators_sets_and_fractions(
    run: Path, held_out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches, encode = [], models.LoadedModel.encode_text
    monkeypatch.setattr(models.LoadedModel, "encode_text", lambda self, tokens, normalize=True: (
        batches.append(len(tokens)), encode(self, tokens, normalize))[1])
    evaluate(str(run), data=(f"a={held_out}", f"b={held_out}"), keep=(1.0, 0.5), templates=("my {}", "a {}"),
             evaluators=("zero_shot", "calibration", "retrieval"))
    assert batches == [8, 4]  # four classes, two templates; four captions


def test_masked_images_are_measured_apart(run: Path, held_out: Path) -> None:
    results = evaluate(str(run), data=str(held_out), keep=(1.0, 0.5), keep_by=("attentive", "uniform"))
    (whole,) = records(run)
    masked = records(run, "robustness")
    parts = [(1.0, "attentive"), (0.5, "attentive"), (0.5, "uniform")]
    assert [(r["keep"], r["kept_by"]) for r in masked] == parts
    assert list(dict.fromkeys((r.keep, r.kept_by) for r in results)) == [(None, None), *parts]
    assert masked[0]["metrics"] == whole["metrics"]  # everything kept is the ordinary evaluation
    assert [r["num_keep"] for r in masked] == [r["num_patches"] // (1 + (r["keep"] < 1)) for r in masked]
    assert "With fewer patches" in (run / "report.html").read_text()


def test_throughput_is_that_of_all_ranks(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank may have no image of a small set, and then knows neither its patches nor a speed."""
    monkeypatch.setattr(sharding, "collect", lambda own: [own, (32, 64, 100, 0.5), (32, 64, 50, 0.5)])
    record = MaskedEncoder(models.load(run), 0.5, "uniform").to_record()
    assert (record["num_keep"], record["num_patches"], record["pictures_per_second"]) == (32, 64, 300.0)


def test_protocols_stand_beside_each_other(run: Path, held_out: Path) -> None:
    evaluate(str(run), data=str(held_out))
    evaluate(str(run), data=str(held_out), protocol="karpathy")
    assert [r["set"] for r in records(run)] == ["held", "held, karpathy"]
    assert [r["counts"]["captions"] for r in records(run)] == [4, 24]


def test_a_model_that_is_no_run_can_have_a_folder_for_its_numbers(
    run: Path, held_out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "measured"
    monkeypatch.setattr("sys.argv", ["/usr/bin/aclip", "evaluate", "a b", "--templates", "my {}"])
    evaluate(str(run / "final"), data=str(held_out), output=str(folder))
    assert [r["evaluator"] for r in records(folder)] == ["retrieval"]
    assert json.loads((folder / "config.json").read_text())["command"] == "aclip evaluate 'a b' --templates 'my {}'"
    assert "Retrieval" in (folder / "report.html").read_text()
    before = (folder / "evaluations.jsonl").read_text()
    with pytest.raises(ConfigError, match=r"has the config\.json of something else than an evaluation of vit-tiny"):
        evaluate("vit-tiny", data=str(held_out), output=str(folder))
    assert (folder / "evaluations.jsonl").read_text() == before
    with pytest.raises(ConfigError, match="is a run, and its numbers go into its own folder"):
        evaluate(str(run), data=str(held_out), output=str(folder))


def test_bad_images_of_a_folder_are_named_and_one_class_is_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_images(tmp_path / "bad", range(2), captions=False)
    (folder / "red" / "0.png").write_bytes(b"no picture")
    (folder / "green" / "1.png").write_bytes(b"")
    evaluate(str(run), data=str(folder), evaluators="zero_shot")
    said = " ".join(capsys.readouterr().out.split())
    assert "skipped 2 bad samples: green/1.png (" in said
    assert "6 images, 4 classes, 2 skipped" in said
    names = tmp_path / "names.txt"
    names.write_text("sun\nmoon\n")
    with pytest.raises(ConfigError, match="no image of the set is of one of the 2 given classes; the set has, for "
                       "example: blue, green"):
        evaluate(str(run), data=str(folder), evaluators="zero_shot", classes=str(names))
    for label in ("green", "blue", "grey"):
        (folder / label).rename(tmp_path / label)
    with pytest.raises(ConfigError, match="all 1 images of the set are of class 'red'"):
        evaluate(str(run), data=str(folder), evaluators="zero_shot")


def test_nothing_is_measured_with_damaged_weights(run: Path, held_out: Path) -> None:
    model = models.load(run)
    next(models.visual_of(model.model).parameters()).data.fill_(torch.nan)
    with pytest.raises(CheckpointError, match="features of 24 of 24 images are NaN or inf"):
        evaluate(model, data=str(held_out))
