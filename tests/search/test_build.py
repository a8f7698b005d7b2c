"""Indexes: what is in them, what an update encodes, and that a kill costs nothing but time."""

import errno
import json
import logging
import os
import re
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import torch
from saved_models import save_model

import aclip
from aclip import data
from aclip.errors import BadSampleError, ConfigError, DataError, MissingDependencyError
from aclip.models import LoadedModel
from aclip.search import approximate, build
from aclip.search.store import Index
from bad_samples import SKIPPED, make_mixed_folder
from made_pictures import encode, picture
from tests_support import Numbers


def content(folder: Path) -> tuple[np.ndarray, Any, str]:
    described = Index.describe(folder)
    return (np.load(folder / described["features"]), pyarrow.parquet.read_table(folder / described["items"]),
            (folder / "skipped.jsonl").read_text())


def assert_equal(one: Path, other: Path, *, exactly: bool = True) -> None:
    features, table, skipped = content(one)
    others, other_table, other_skipped = content(other)
    if exactly:
        np.testing.assert_array_equal(features, others)
    else:  # of the same images in other batches
        np.testing.assert_allclose(features, others, atol=2e-3)
    assert table.equals(other_table)
    assert skipped == other_skipped


def counts(caplog: pytest.LogCaptureFixture) -> tuple[int, ...]:
    """Return the numbers of images, encoded, as before, forgotten, of the last build."""
    found = re.findall(r"(\d+) images, (\d+) encoded, (\d+) as before, (\d+) forgotten", caplog.text)
    return tuple(map(int, found[-1]))


@pytest.fixture(autouse=True)
def _log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="aclip")


@pytest.mark.parametrize("workers", [0, 2])
def test_rows_are_the_features_of_the_images_in_order_and_bad_ones_are_named(
    model: LoadedModel, tmp_path: Path, caplog: pytest.LogCaptureFixture, workers: int
) -> None:
    folder = make_mixed_folder(tmp_path / "mixed")
    index = aclip.index(model, folder, output=tmp_path / "index", workers=workers)
    bad = [name for name, reason in SKIPPED.items() if "caption" not in reason]  # an image needs no caption here
    skipped = [json.loads(line) for line in (tmp_path / "index" / "skipped.jsonl").read_text().splitlines()]
    assert {line["name"] for line in skipped} == set(bad)
    assert all(line["reason"].startswith(SKIPPED[line["name"]]) for line in skipped)
    assert "skipped 4 bad samples: giant.png (image too large" in caplog.text
    names = sorted(path.name for path in folder.glob("*.*") if path.suffix != ".txt" and path.name not in bad)
    hits = index.hits(range(len(index)), [0.0] * len(index))
    assert [hit.name for hit in hits] == names
    assert [hit.path for hit in hits] == [str(folder / name) for name in names]
    assert hits[names.index("chinese.png")].captions == ("一只在雪地里奔跑的狗",)
    assert hits[names.index("missing_caption.png")].captions == ()
    expected = model.encode_images([folder / name for name in names])
    assert index.features.dtype == np.float16
    np.testing.assert_allclose(index.features, expected.numpy(), atol=2e-3)
    assert index.image(names.index("cmyk.jpg")).mode == "RGB"


def test_an_update_encodes_what_is_new_or_changed_and_forgets_what_is_gone(
    model: LoadedModel, pair_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    index = tmp_path / "index"
    aclip.index(model, pair_folder, output=index, workers=0)
    assert counts(caplog) == (40, 40, 0, 0)
    features = Index.describe(index)["features"]
    aclip.index(model, pair_folder, output=index, workers=0)
    assert counts(caplog) == (40, 0, 40, 0)
    assert Index.describe(index)["features"] == features

    (pair_folder / "003.png").write_bytes(encode(picture(103)))
    (pair_folder / "005.png").unlink()
    (pair_folder / "011b.png").write_bytes(encode(picture(104)))
    (pair_folder / "020.txt").write_text("another caption")
    (pair_folder / "030.png").write_bytes(b"torn")
    aclip.index(model, pair_folder, output=index, workers=0)
    assert counts(caplog) == (39, 2, 37, 3)
    aclip.index(model, pair_folder, output=tmp_path / "fresh", workers=0)
    assert_equal(index, tmp_path / "fresh", exactly=False)
    assert len(list(index.iterdir())) == 4  # nothing is left of earlier builds
    opened = Index(index)
    assert opened.hits([18], [0.0])[0].captions == ("picture 18",)
    assert opened.hits([20], [0.0])[0].captions == ("another caption",)


def test_several_sources_are_one_index_and_one_can_be_left_out_again(
    model: LoadedModel, pair_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = shutil.copytree(pair_folder, tmp_path / "other")
    aclip.index(model, [f"{other}[:10]", str(pair_folder)], output=tmp_path / "index", workers=0)
    assert counts(caplog) == (50, 50, 0, 0)
    index = aclip.index(model, str(other), output=tmp_path / "index", workers=0)
    assert counts(caplog) == (40, 30, 10, 40)
    np.testing.assert_array_equal(index.image(12), np.asarray(picture(12)))


def test_samples_of_shards_are_known_by_their_bytes(
    model: LoadedModel, pair_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shards = data.pack(str(pair_folder), output=str(tmp_path / "shards"), side=None, shard_size=15, workers=0)
    index = aclip.index(model, shards, output=tmp_path / "index", workers=0)
    np.testing.assert_array_equal(index.image(17), np.asarray(picture(17)))
    assert index.hits([17], [0.0])[0].path is None
    (pair_folder / "003.png").write_bytes(encode(picture(103)))
    again = data.pack(str(pair_folder), output=str(tmp_path / "again"), side=None, shard_size=20, workers=0)
    aclip.index(model, again, output=tmp_path / "index", workers=0)
    assert counts(caplog) == (40, 1, 39, 1)
    index._sources[0] = Numbers(40)  # the shards were packed anew from other images
    with pytest.raises(BadSampleError, match="the source has changed, run `aclip index` again: "):
        index.image(3)


def test_other_weights_encode_everything_again(
    model: LoadedModel, pair_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    aclip.index(model, pair_folder, output=tmp_path / "index", workers=0)
    other = save_model(tmp_path / "model", seed=1)
    aclip.index(other, pair_folder, output=tmp_path / "index", workers=0)
    assert "was built by other weights" in caplog.text
    assert counts(caplog) == (40, 40, 0, 40)
    aclip.index(other, pair_folder, output=tmp_path / "fresh", workers=0)
    assert_equal(tmp_path / "index", tmp_path / "fresh")


MOMENTS = [(build, "encode_batch", 1), (build, "encode_batch", 3), (build._Build, "_write_piece", 4),
           (build, "_write_rows", 1), (build, "write_atomically", 1), (build, "write_atomically", 2)]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
@pytest.mark.parametrize(("owner", "name", "call"), MOMENTS, ids=[f"{name}-{call}" for _, name, call in MOMENTS])
@pytest.mark.parametrize("update", [False, True])
def test_a_killed_build_goes_on_to_the_same_index(
    model: LoadedModel, pair_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture, owner: Any, name: str, call: int, update: bool
) -> None:
    monkeypatch.setattr(build, "BATCH_SIZE", 8)
    monkeypatch.setattr(build, "PIECE_SECONDS", -1.0)
    for folder in ("index", "undisturbed") if update else ():
        aclip.index(model, f"{pair_folder}[:3]", output=tmp_path / folder, workers=0)
    aclip.index(model, pair_folder, output=tmp_path / "undisturbed", workers=0)
    if os.fork() == 0:
        original, calls = getattr(owner, name), []

        def killed(*arguments: Any, **options: Any) -> Any:
            calls.append(name)
            if len(calls) == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments, **options)

        setattr(owner, name, killed)
        aclip.index(model, pair_folder, output=tmp_path / "index", workers=0)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.wait()[1]) == -signal.SIGKILL
    aclip.index(model, pair_folder, output=tmp_path / "index", workers=0)
    assert_equal(tmp_path / "index", tmp_path / "undisturbed")
    assert counts(caplog)[1] == {"encode_batch": 40 - 3 * update - 8 * (call - 1) + 3 * update * (call > 1),
                                 "_write_piece": 40 - 3 * 8}.get(name, 0)
    assert sorted(path.name[:8] for path in (tmp_path / "index").iterdir()) == [
        "features", "index.js", "items-1." if not update else "items-2.", "skipped."]


def test_a_full_disk_is_one_sentence_and_nothing_encoded_is_lost(
    model: LoadedModel, pair_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(build, "_write_rows", full)
        with pytest.raises(DataError, match="the disk is full; the same command continues where it stopped"):
            aclip.index(model, pair_folder, output=tmp_path / "index", workers=0)
    aclip.index(model, pair_folder, output=tmp_path / "index", workers=0)
    assert counts(caplog) == (40, 0, 40, 0)


def test_what_is_no_index_is_left_alone(model: LoadedModel, pair_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds something else than an index"):
        aclip.index(model, pair_folder, output=pair_folder)
    with pytest.raises(ConfigError, match=r"is no index: build one with `aclip index MODEL SOURCE --output "):
        Index(pair_folder)
    (tmp_path / "run" / "index").mkdir(parents=True)
    (tmp_path / "run" / "config.json").touch()
    with pytest.raises(ConfigError, match=r"--output .*run/index`"):
        Index(tmp_path / "run")
    (tmp_path / "run" / "index" / "index.json").touch()
    with pytest.raises(ConfigError, match=r"did you mean .*run/index\?"):
        Index(tmp_path / "run")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "1.png").write_bytes(b"torn")
    with pytest.raises(DataError, match=r"no usable image in .*bad: skipped 1 bad sample: 1.png \(not an image"):
        aclip.index(model, tmp_path / "bad", output=tmp_path / "index", workers=0)


def test_pyarrow_is_asked_for(model: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'attentive-clip\[parquet\]'"):
        aclip.index(model, "images", output=tmp_path / "index")


def test_a_large_index_gets_a_graph_that_is_kept_while_it_fits(
    model: LoadedModel, pair_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("usearch")
    monkeypatch.setattr(approximate, "APPROXIMATE_FROM", 40)
    index = aclip.index(model, pair_folder, output=tmp_path / "index", workers=0)
    assert "the graph finds 100.0 % of the 10 nearest images of 40 captions" in caplog.text
    queries = torch.from_numpy(index.features[:5]).float()
    assert torch.equal(index.nearest(queries, 7)[1], index.nearest(queries, 7, exact=True)[1])
    (graph,) = (tmp_path / "index").glob("graph-*")
    before = graph.stat()
    aclip.index(model, pair_folder, output=tmp_path / "index", workers=0)
    assert graph.stat() == before
    assert Index(tmp_path / "index").graph is not None
    (pair_folder / "003.png").write_bytes(encode(picture(103)))
    aclip.index(model, pair_folder, output=tmp_path / "index", workers=0)
    assert not graph.exists()
    assert len(list((tmp_path / "index").glob("graph-*"))) == 1


def test_without_usearch_a_large_index_is_compared_whole(
    model: LoadedModel, pair_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(approximate, "APPROXIMATE_FROM", 40)
    monkeypatch.setitem(sys.modules, "usearch.index", None)
    index = aclip.index(model, pair_folder, output=tmp_path / "index", workers=0)
    assert "pip install 'attentive-clip[search]'" in caplog.text
    assert index.graph is None
