"""A teacher's stored features: what a step would compute, for runs that repeat the same crops."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import aclip
from aclip import encoding, models
from aclip.cli import main
from aclip.data import PairDataset, Request, StoredFeatures, open_training
from aclip.data.views import VIEWS
from aclip.encoding import encode
from aclip.errors import ConfigError, DataError
from aclip.exporters import open_clip as exported
from aclip.training.guard import Interrupted
from made_pictures import WordTokenizer, captioned_noise
from tests_support import stop_after

WIDTH = 128


def save(folder: Path, name: str) -> Path:
    """Save a model with random weights whose features of noise differ, with a normalisation of its own."""
    torch.manual_seed(3)
    model, config = models.create_model(name), models.model_config(name)
    for parameter in model.visual.parameters():
        if parameter.ndim > 1:
            parameter.data.mul_(3.0)
    model.visual.preprocess_cfg |= {"mean": (0.4, 0.5, 0.3), "std": (0.2, 0.25, 0.3)}
    exported.save(model, config, models.preprocess_config(model), models.tokenizer_of(config), folder)
    return folder


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save(tmp_path_factory.mktemp("models") / "teacher", "vit-micro"))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Eight images, each with two captions to draw from, and a bad one that is replaced."""
    folder = captioned_noise(tmp_path_factory.mktemp("images"), 9 * [(40, 60)])
    for number in range(9):
        (folder / f"{number:02}.txt").write_text(f"noise number {number}\nthe {number}-th of many\n")
    (folder / "04.png").write_bytes(b"no image")
    return str(folder)


@pytest.fixture(scope="module")
def stored(teacher: str, images: str, tmp_path_factory: pytest.TempPathFactory) -> StoredFeatures:
    return encode(teacher, images, output=str(tmp_path_factory.mktemp("stored") / "two"), crops=2, precision="fp32",
                  device="cpu", workers=0)


def settings(images: str, output: Path, **more: Any) -> dict[str, Any]:
    return {"data": images, "output": str(output), "recipe": "distill", "model": "vit-micro", "batch_size": 4,
            "samples": 24, "precision": "fp32", "device": "cpu", "workers": 0, "lr": 1e-3, "save_every": 0.0,
            "evaluate_every": 0.0, "log_every": 1, **more}


def losses(run: aclip.Run) -> list[float]:
    return [record["loss"] for record in aclip.Run(run.folder).metrics]


def test_they_are_half_precision_features_of_every_crop_and_caption(stored: StoredFeatures, teacher: str) -> None:
    assert (stored.crops, stored.teacher) == (2, teacher)
    assert stored.logit_scale == pytest.approx(1 / 0.07)
    rows = stored.rows(1, 3)
    assert {name: (row.shape, row.dtype) for name, row in rows.items()} == {
        "frozen": ((1, WIDTH), np.dtype("f2")), "frozen-captions": ((WIDTH,), np.dtype("f2"))}
    assert np.linalg.norm(rows["frozen"].astype(np.float32)) == pytest.approx(1, abs=1e-3)
    assert np.array_equal(stored.rows(3, 3)["frozen"], rows["frozen"])
    assert not np.array_equal(stored.rows(0, 3)["frozen"], rows["frozen"])
    assert any(not np.array_equal(*(stored.rows(k, i)["frozen-captions"] for k in (0, 1))) for i in range(9))


@pytest.mark.parametrize(("recipe", "more"), [
    ("distill", {"workers": 2}), ("distill", {"micro_batch": 2}), ("finetune", {})])
def test_a_run_is_that_with_the_teacher_itself(
    images: str, teacher: str, stored: StoredFeatures, tmp_path: Path, recipe: str, more: dict[str, Any]
) -> None:
    """As long as crops do not repeat; a bad image is replaced by the same one."""
    computed = aclip.train(**settings(images, tmp_path / "a", teacher=teacher, samples=16, recipe=recipe, **more))
    read = aclip.train(**settings(images, tmp_path / "b", teacher_features=str(stored.folder), samples=16,
                                  recipe=recipe, **more))
    assert losses(read) == pytest.approx(losses(computed), rel=1e-3)
    assert losses(read) != losses(computed)
    sizes = [sum(path.stat().st_size for path in (run.folder / "checkpoints").rglob("*.safetensors"))
             for run in (computed, read)]
    assert sizes[1] < sizes[0] - 20e6  # the teacher is in no checkpoint


def test_crops_captions_and_features_repeat(images: str, stored: StoredFeatures) -> None:
    dataset = PairDataset(open_training(images), VIEWS["one_crop"](), WordTokenizer(), sizes={"a": (32, 32)}, seed=0,
                          stored=stored)
    for sample in range(9):
        first, second, third = (dataset[Request(epoch, sample)] for epoch in range(3))
        assert np.array_equal(first.views["a"].pixels, third.views["a"].pixels)
        assert not np.array_equal(first.views["a"].pixels, second.views["a"].pixels)
        assert torch.equal(first.tokens, third.tokens)
        assert (first.seed, first.key) == (third.seed, third.key)
        assert first.stored.keys() == {"frozen", "frozen-captions"}
        for name, features in first.stored.items():
            assert np.array_equal(features, third.stored[name])
            assert np.array_equal(features, stored.rows(0, sample)[name])


def test_a_resumed_run_is_the_same_run(
    images: str, stored: StoredFeatures, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over three epochs, the features elsewhere from the fourth step on."""
    whole = aclip.train(**settings(images, tmp_path / "whole", teacher_features=str(stored.folder)))
    with monkeypatch.context() as patch:
        stop_after(3, patch)
        with pytest.raises(Interrupted):
            aclip.train(**settings(images, tmp_path / "run", teacher_features=str(stored.folder)))
    moved = shutil.copytree(stored.folder, tmp_path / "moved")
    run = aclip.train(resume=str(tmp_path / "run"), teacher_features=str(moved))
    assert losses(run) == losses(whole)


def test_a_killed_call_is_continued(
    images: str, teacher: str, stored: StoredFeatures, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoding, "BATCH_SIZE", 4)
    monkeypatch.setattr(encoding, "SAVE_SECONDS", 0.0)
    write = encoding._Encoding._write

    def failing(self: Any, *given: Any) -> None:
        if self.description["done"] >= 8:
            raise KeyboardInterrupt
        write(self, *given)

    options: dict[str, Any] = {"output": str(tmp_path / "new"), "crops": 2, "precision": "fp32", "device": "cpu",
                               "workers": 0}
    with monkeypatch.context() as patch:
        patch.setattr(encoding._Encoding, "_write", failing)
        with pytest.raises(KeyboardInterrupt):
            encode(teacher, images, **options)
    with pytest.raises(ConfigError, match=r"new are not complete: run `aclip data encode .* again, it goes on"):
        StoredFeatures(tmp_path / "new")
    counted: list[int] = []
    monkeypatch.setattr(encoding._Encoding, "_write", lambda self, *given: (counted.append(1), write(self, *given))[1])
    found = encode(teacher, images, **options)
    assert len(counted) == 3  # 18 in all, 8 were done
    for name in ("frozen", "frozen-captions"):
        np.testing.assert_allclose(np.load(found.folder / f"{name}.npy"), np.load(stored.folder / f"{name}.npy"),
                                   atol=2e-3)
    with pytest.raises(ConfigError, match="holds features of another teacher, source, recipe, seed or number of crops"):
        encode(teacher, images, **{**options, "crops": 3})
    with pytest.raises(ConfigError, match="holds something else than features"):
        encode(teacher, images, **{**options, "output": images})


@pytest.mark.parametrize(("changes", "sentence"), [
    ({"seed": 1}, r"do not fit this run \(seed is 0 there and 1 here\): change that, or store others with `aclip data"),
    ({"changes": {"recipe.view_options": {"scale": [0.2, 1.0]}}}, r"view_options"),
    ({"model": "vit-tiny"}, r"sizes\.a is \[32, 32\] there and \[64, 64\] here"),
    ({"teacher": "vit-tiny"}, "are those of '.*teacher', not of 'vit-tiny': leave out --teacher"),
    ({"recipe": "finetune-attentive"}, "needs more of its frozen pass 'frozen' than features of whole images"),
    ({"recipe": "clip"}, "teacher_features has no effect: recipe 'clip' has no frozen encoder"),
    ({"teacher_features": "nowhere"}, "nowhere holds no features: store them with `aclip data encode TEACHER"),
])
def test_features_of_something_else_are_refused(
    images: str, stored: StoredFeatures, tmp_path: Path, changes: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        aclip.train(**settings(images, tmp_path / "run", **{"teacher_features": str(stored.folder), **changes}))
    assert not (tmp_path / "run").exists()


def test_features_of_other_data_are_refused(stored: StoredFeatures, tmp_path: Path) -> None:
    (tmp_path / "others").mkdir()
    others = captioned_noise(tmp_path / "others", 9 * [(40, 60)])
    (others / "08.png").rename(others / "09.png")
    (others / "08.txt").rename(others / "09.txt")
    with pytest.raises(ConfigError, match=r"they are of .*images\w*, not of .*others"):
        aclip.train(**settings(str(others), tmp_path / "run", teacher_features=str(stored.folder)))


def test_damage_is_told(stored: StoredFeatures, tmp_path: Path) -> None:
    copy = shutil.copytree(stored.folder, tmp_path / "copy")
    (copy / "frozen.npy").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"frozen\.npy cannot be read .*: remove .* and encode again"):
        StoredFeatures(copy)
    (copy / "features.json").write_text("{")
    with pytest.raises(DataError, match=r"features\.json is damaged"):
        StoredFeatures(copy)


def test_an_architecture_cannot_teach(images: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "encode", "vit-micro", images, "--output", str(tmp_path / "new")]) == 2
    assert "'vit-micro' is an architecture without weights, and cannot teach" in capsys.readouterr().err
    assert len(open_training(images)) == 9
