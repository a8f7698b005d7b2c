"""Batches of groups of samples that are alike: from an index to the end of a run."""

import logging
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import aclip
from aclip import data, runs
from aclip.cli import main
from aclip.data.sources import open_training
from aclip.errors import ConfigError, TrainingError
from aclip.overfit import overfit_one_batch
from aclip.recipes import configure
from aclip.run_folder import RunFolder
from aclip.search.clusters import cluster_samples
from aclip.search.store import Index
from aclip.training.guard import Interrupted
from over_ranks import run_ranks
from tests_support import stop_after

COLOURS = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)]


def pictures(folder: Path, count: int, first: int = 0) -> Path:
    """Write captioned pictures of four plain colours, in turns, with a little noise."""
    folder.mkdir()
    for number in range(first, first + count):
        noise = np.random.default_rng(number).integers(-20, 20, (40, 40, 3))
        pixels = np.clip(np.array(COLOURS[number % 4]) + noise, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:02}.png")
        (folder / f"{number:02}.txt").write_text(f"picture number {number}\n")
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pictures(tmp_path_factory.mktemp("data") / "images", 32)


@pytest.fixture(scope="module")
def index(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("index") / "index"
    aclip.index("vit-micro", images, output=folder, workers=0, device="cpu")
    return folder


def settings(images: Path, index: Path, output: Path, **more: Any) -> dict[str, Any]:
    return {"data": str(images), "output": str(output), "hard_negatives": str(index), "recipe": "clip",
            "model": "vit-micro", "batch_size": 8, "samples": 64, "precision": "fp32", "device": "cpu", "workers": 0,
            "save_every": 0.0, "evaluate_every": 0.0, "log_every": 1, **more}


def losses(run: Path) -> list[float]:
    return [record["loss"] for record in aclip.Run(run).metrics]


def test_clusters_are_those_of_the_features(images: Path, index: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    source = open_training(str(images))
    clusters = cluster_samples(index, source, seed=0)
    assert clusters.dtype == np.int32
    assert len(set(clusters.tolist())) <= 6  # the root of 32
    for cluster in range(6):
        assert len({number % 4 for number in np.flatnonzero(clusters == cluster).tolist()}) <= 1
    assert np.array_equal(clusters, cluster_samples(index, source, seed=0))
    assert f"hard negatives: 6 clusters of the features in {index}; 0 of 32 samples have none" in caplog.text


def test_samples_are_found_by_their_files_or_names(images: Path, index: Path, tmp_path: Path) -> None:
    opened, source = Index(index), open_training(str(images))
    assert opened.rows_of(source).tolist() == list(range(32))
    assert opened.rows_of(open_training(f"{images}[8:16]")).tolist() == list(range(8, 16))
    mixture = open_training([f"{images}[16:]=1", f"{images}[:4]=2"])
    assert opened.rows_of(mixture).tolist() == [*range(16, 32), *range(4)]
    shards = data.pack(str(images), output=str(tmp_path / "shards"), workers=0)
    aclip.index("vit-micro", shards, output=tmp_path / "of-shards", workers=0, device="cpu")
    assert Index(tmp_path / "of-shards").rows_of(open_training(str(shards))).tolist() == list(range(32))
    assert set(Index(tmp_path / "of-shards").rows_of(source).tolist()) == {-1}
    twice = [shards, shutil.copytree(shards, tmp_path / "again")]
    aclip.index("vit-micro", twice, output=tmp_path / "of-both", workers=0, device="cpu")
    assert set(Index(tmp_path / "of-both").rows_of(open_training(str(shards))).tolist()) == {-1}  # ambiguous


def test_images_that_the_index_lacks_have_no_cluster(
    images: Path, index: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    others = pictures(tmp_path / "others", 40)
    clusters = cluster_samples(index, open_training([f"{images}", f"{others}[32:]"]), seed=0)
    assert (clusters[:32] >= 0).all()
    assert (clusters[32:] == -1).all()
    assert "8 of 40 samples have none and are drawn at random" in caplog.text


def test_an_index_of_other_data_is_refused(index: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    others = pictures(tmp_path / "others", 12)  # whose names are the same
    words = [f"--{name.replace('_', '-')}={value}" for name, value in settings(others, index, tmp_path / "run").items()]
    assert main(["train", *words]) == 2
    assert (f"the index {index} has features of 0 of the 12 images of {others}: build one of the same data with `aclip "
            f"index vit-micro {others} --output INDEX`") in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    with pytest.raises(ConfigError, match="nothing is no index: build one with `aclip index"):
        aclip.train(**settings(others, tmp_path / "nothing", tmp_path / "run"))


def test_groups_must_fill_the_batch(images: Path, index: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a batch of 8 is not made of groups of 3"):
        aclip.train(**settings(images, index, tmp_path / "run", group_size=3))


def test_a_resumed_run_sees_the_same_batches_without_the_index(
    images: Path, index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = aclip.train(**settings(images, index, tmp_path / "whole"))
    plain = aclip.train(**settings(images, index, tmp_path / "plain", hard_negatives=None))
    assert losses(plain.folder) != losses(whole.folder)
    moved, run = shutil.copytree(index, tmp_path / "index"), tmp_path / "run"
    step = aclip.trainer.Trainer.train_step
    seen: list[tuple[str, ...]] = []

    def recording(self: Any, batch: Any, **options: Any) -> Any:
        seen.append(batch.keys)
        return step(self, batch, **options)

    with monkeypatch.context() as patch:
        patch.setattr(aclip.trainer.Trainer, "train_step", recording)
        stop_after(3, patch)
        with pytest.raises(Interrupted):
            aclip.train(**settings(images, moved, run))
    shutil.rmtree(moved)
    aclip.train(resume=str(run))
    assert losses(run) == losses(whole.folder)
    clusters = np.load(RunFolder(run).clusters)
    groups = [[int(key.partition(".")[0]) for key in keys[at : at + 4]] for keys in seen for at in (0, 4)]
    assert sum(len({clusters[number] for number in group}) == 1 for group in groups) >= 4

    RunFolder(run).clusters.unlink()
    with pytest.raises(ConfigError, match=r"the clusters of its samples, .*clusters\.npy, cannot be read"):
        aclip.train(resume=str(run))


def clusters_on_a_rank(_: Path, images: Path, index: Path) -> np.ndarray | None:
    config = configure(**settings(images, index, Path("run")))
    return runs._clusters(config, open_training(str(images)), RunFolder(Path("run")), resumed=False)


def test_ranks_have_the_same_clusters(images: Path, index: Path, tmp_path: Path) -> None:
    first, second = run_ranks(2, tmp_path, clusters_on_a_rank, images, index)
    assert np.array_equal(first, second)


def test_the_batch_that_is_overfitted_is_the_first(
    images: Path, index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, ...]] = []
    step = aclip.trainer.Trainer.train_step
    monkeypatch.setattr(aclip.trainer.Trainer, "train_step", lambda self, batch, **options: (
        seen.append(batch.keys), step(self, batch, **options))[1])
    aclip.train(**settings(images, index, tmp_path / "run", samples=8))
    with suppress(TrainingError):  # two steps are too few to learn anything
        overfit_one_batch(configure(**settings(images, index, tmp_path / "none")), 2)
    assert len(seen) == 3
    assert len(set(seen)) == 1
