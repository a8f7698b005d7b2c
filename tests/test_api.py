"""The Python API as a user calls it: train, resume, evaluate, load, export; also outside the main thread."""

import logging
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import aclip
from aclip import checkpoint, devices, dist
from aclip.errors import ConfigError, DataError
from aclip.run_folder import RunFolder
from made_pictures import captioned_noise

SMALL: dict[str, Any] = {"model": "vit-micro", "precision": "fp32", "batch_size": 8, "workers": 0, "log_every": 1}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16 images of noise with captions."""
    return captioned_noise(tmp_path_factory.mktemp("images"), 16 * [(40, 40)])


@pytest.fixture(scope="module")
def run(images: Path, tmp_path_factory: pytest.TempPathFactory) -> aclip.Run:
    return aclip.train(recipe="flip", data=str(images), validation=f"held={images}", epochs=2, lr=1e-3,
                       output=str(tmp_path_factory.mktemp("runs") / "run"), **SMALL)


def test_a_run_is_evaluated_loaded_and_exported(run: aclip.Run, images: Path, tmp_path: Path) -> None:
    assert [record["step"] for record in run.metrics] == [1, 2, 3, 4]
    assert run.config.recipe.optimization.lr == 1e-3
    found = {(r.set, r.metric): r.value for r in run.evaluate(data=f"held={images}", workers=0)}
    assert 0.0 <= found["held", "image_to_text_r1"] <= 1.0
    features = run.model.encode_images([images / "00.png"])
    torch.testing.assert_close(aclip.load(run.folder).encode_images([images / "00.png"]), features)
    assert (run.model.step, run.model.samples_seen) == (4, 32)
    folder = aclip.export(str(run.folder), to="open_clip", output=str(tmp_path / "exported"))
    torch.testing.assert_close(aclip.load(folder).encode_images([images / "00.png"]), features)


def test_a_finished_run_is_continued_and_only_machinery_may_change(run: aclip.Run, images: Path) -> None:
    before = run.metrics
    assert aclip.train(resume=str(run.folder), log_every=2).metrics == before
    with pytest.raises(ConfigError, match=r"other settings \(epochs is 2.0 there and 3.0 here\): on resume only these"):
        aclip.train(resume=str(run.folder), epochs=3)
    with pytest.raises(ConfigError, match="which run is to be resumed"):
        aclip.train(resume=True)
    with pytest.raises(ConfigError, match="holds no run to resume"):
        aclip.train(resume=str(images))
    with pytest.raises(ConfigError, match="already holds a run"):
        aclip.train(recipe="flip", data=str(images), output=str(run.folder), **SMALL)


def test_the_best_model_is_kept_and_changes_are_counted_from_a_pretrained_start(
    run: aclip.Run, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    new = tmp_path / "new"
    new.mkdir()
    for colour in ("red", "green", "blue", "yellow", "black", "white", "purple", "orange"):  # soon learned
        Image.new("RGB", (40, 40), colour).save(new / f"{colour}.png")
        (new / f"{colour}.txt").write_text(colour)
    fine = aclip.train(
        recipe="clip", data=str(new), validation=(f"new={new}", f"old={images}"), output=str(tmp_path / "fine"),
        epochs=40, lr=1e-3, keep_best="new", keep_checkpoints=99, evaluate_every=1, save_every=1,
        **{**SMALL, "model": str(run.folder)})
    found = [(r["step"], r["metrics"]["image_to_text_r1"]) for r in RunFolder(fine.folder).records("evaluations")
             if r["set"] == "new"]
    assert [step for step, _ in found] == [0, 10, 20, 30, 40]
    best, value = max(found, key=lambda one: one[1])  # of equal ones the first
    assert best > 0
    loaded = aclip.load(fine.folder / "best")
    assert loaded.step == best
    stored = checkpoint.open_checkpoint(fine.folder / "checkpoints" / f"step-{best:08}").tensors("method/model.")
    assert all(torch.equal(tensor, stored[name]) for name, tensor in loaded.model.state_dict().items())
    assert fine.model.step == 40
    said = " ".join(capsys.readouterr().out.split())
    assert f"new was best at step {best}" in said
    assert said.count("in brackets the change since the start") == 2 * 4
    change = f"({100 * (value - found[0][1]):+.1f})"
    assert f"image_to_text_r1 {value:.1%} {change}" in said
    page = (fine.folder / "report.html").read_text()
    assert f" % ({100 * (found[-1][1] - found[0][1]):+.1f})</td>" in page
    assert "since the start" in page


def test_a_run_ends_early_and_stays_ended(run: aclip.Run, images: Path, tmp_path: Path) -> None:
    settings = {**SMALL, "model": str(run.folder), "output": str(tmp_path / "run"), "data": str(images)}
    early = aclip.train(recipe="clip", epochs=40, validation=f"held={images}", keep_best="held:text_to_image_r10",
                        early_stop=1, lr=1e-12, **settings)  # stands still, so that nothing improves
    assert early.model.step == 10
    assert aclip.load(early.folder / "best").step == 0
    before = (early.folder / "final" / "open_clip_model.safetensors").read_bytes()
    assert aclip.train(resume=str(early.folder)).model.step == 10
    weights = (early.folder / "final" / "open_clip_model.safetensors").read_bytes()
    assert weights == before


@pytest.mark.parametrize(("settings", "reason"), [
    ({"keep_best": "hold"}, "unknown validation set 'hold': did you mean 'held'"),
    ({"keep_best": "held:r1"}, "unknown metric 'r1'"), ({"early_stop": 3}, "add --keep-best SET"),
    ({"keep_best": "held", "recipe": "simclr"}, "recipe 'simclr' trains no text tower"),
])
def test_a_best_that_cannot_be_told_is_refused(
    images: Path, tmp_path: Path, settings: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason):
        aclip.train(**{"recipe": "clip", **settings}, data=str(images), validation=f"held={images}",
                    output=str(tmp_path / "run"), **SMALL)


def test_a_run_goes_on_from_another_working_folder_and_names_moved_data(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(images.parent)
    settings = {"recipe": "clip", "data": images.name, "validation": f"held={images.name}", "epochs": 1, **SMALL}
    run = aclip.train(output=str(tmp_path / "run"), **settings)
    assert run.config.data == (str(images),)
    monkeypatch.chdir(tmp_path)
    aclip.train(resume="run")
    hidden = images.rename(images.with_name("moved"))
    try:
        with pytest.raises(DataError, match="if its data has moved, add --data"):
            aclip.train(resume="run")
        moved = {"data": str(hidden), "validation": f"held={hidden}"}
        assert aclip.train(resume="run", **moved).config.data == (str(hidden),)
    finally:
        hidden.rename(images)


def test_training_works_outside_the_main_thread_with_workers(images: Path, tmp_path: Path) -> None:
    settings = {**SMALL, "workers": 2}
    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(aclip.train, recipe="a-clip", data=str(images), output=str(tmp_path / "run"), epochs=1,
                           **settings)
        run = done.result()
    assert len(run.metrics) == 2


def test_a_validation_set_that_cannot_be_used_is_refused_before_the_first_step(images: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    for number in range(4):
        Image.new("RGB", (8, 8)).save(empty / f"{number}.png")
        (empty / f"{number}.txt").write_text("\n")
    with pytest.raises(DataError, match="empty"):
        aclip.train(recipe="clip", data=str(images), validation=str(empty), output=str(tmp_path / "run"), **SMALL)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_ranks_that_opened_different_data_are_refused(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    collect = dist.collect
    monkeypatch.setattr(dist, "collect", lambda value: [*collect(value), *["another digest"] * isinstance(value, str)])
    with pytest.raises(DataError, match="the ranks opened different data"):
        aclip.train(recipe="clip", data=str(images), output=str(tmp_path / "run"), **SMALL)


def test_compiling_without_a_compiler_is_one_sentence(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices.shutil, "which", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs a C\+\+ compiler"):
        aclip.train(data=str(images), output=str(tmp_path / "run"), device="cpu", compile=True, **SMALL)


def test_advice_is_given_before_training(images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    same = tmp_path / "same"
    same.mkdir()
    for path in images.glob("*.png"):
        os.link(path, same / path.name)
        (same / path.name).with_suffix(".txt").write_text("a photo")
    with caplog.at_level(logging.INFO, logger="aclip"):
        aclip.train(recipe="clip", data=str(same), output=str(tmp_path / "run"), epochs=1, **SMALL)
    assert "has one caption for every image" in caplog.text


def test_losses_and_tables_are_public() -> None:
    features = torch.eye(4)
    loss = aclip.losses.clip_loss(features, features, torch.tensor(100.0))
    assert loss < 1e-6
    assert "a-clip" in aclip.RECIPES
    assert "attentive" in aclip.MASKING
    assert {"contrastive", "byol"} <= set(aclip.OBJECTIVES)
    assert "retrieval" in aclip.EVALUATORS
    assert "huggingface" in aclip.EXPORTERS
    assert "emoji" in aclip.SETS
