"""Searching: against a slow oracle, with every kind of query, on the command line."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from saved_models import save_model

import aclip
from aclip.cli import main
from aclip.errors import CheckpointError, ConfigError, DataError
from aclip.models import LoadedModel
from aclip.search import store as module
from aclip.search.store import Index
from made_pictures import encode, picture


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for number in range(30):
        (folder / f"{number:02}.png").write_bytes(encode(picture(number)))
        (folder / f"{number:02}.txt").write_text(f"picture [bold]{number}")
    (folder / "copy of 07.jpg").write_bytes(encode(picture(7).resize((96, 96)), "JPEG", quality=90))
    return folder


@pytest.fixture(scope="module")
def index(model_folder: Path, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Index:
    return aclip.index(model_folder, images, output=tmp_path_factory.mktemp("indexes") / "index", workers=0)


@pytest.mark.parametrize("block", [1, 7, 4096])
def test_nearest_are_those_of_a_full_sort(index: Index, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(module, "_BLOCK", block)
    queries = torch.from_numpy(np.random.default_rng(0).standard_normal((3, index.features.shape[1]))).float()
    products = queries.numpy() @ index.features.astype(np.float32).T
    similarity, rows = index.nearest(queries, 9)
    np.testing.assert_array_equal(rows, np.argsort(-products, axis=1, kind="stable")[:, :9])
    np.testing.assert_allclose(similarity, -np.sort(-products, axis=1)[:, :9], atol=1e-5)
    assert index.nearest(queries, 1000)[1].shape == (3, len(index))


def test_queries_are_texts_images_and_sums_of_them(index: Index, model: LoadedModel, images: Path) -> None:
    text, other = model.encode_texts(["a picture", "noise"])
    image = model.encode_images([images / "03.png"])[0]
    features = torch.from_numpy(index.features).float()
    for queries, not_, vector in [
        (("a picture",), (), text),
        ((str(images / "03.png"),), (), image),
        ((images / "03.png",), (), image),
        ((picture(3),), (), image),
        ((np.asarray(picture(3)), "a picture"), (), (image + text) / (image + text).norm()),
        (("a picture",), "noise", text - 0.5 * other),
    ]:
        hits = index.search(*queries, not_=not_, top=5)
        expected = features @ vector
        assert [hit.row for hit in hits] == expected.argsort(descending=True)[:5].tolist()
        assert hits[0].similarity == pytest.approx(float(expected.max()), abs=1e-4)
    assert index.search(images / "03.png", top=1)[0].name == "03.png"


@pytest.mark.parametrize(("queries", "error", "message"), [
    ((), ConfigError, "nothing to search for"),
    ((" ",), ConfigError, "nothing to search for"),
    (("gone.png",), DataError, r"the image gone.png does not exist"),
])
def test_a_query_that_makes_no_sense_is_one_sentence(
    index: Index, queries: tuple[str, ...], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        index.search(*queries)


def test_a_text_may_name_a_file_type(index: Index) -> None:
    assert len(index.search("a photo of a .png", top=3)) == 3


def test_the_model_must_be_the_one_that_encoded(index: Index, model_folder: Path, tmp_path: Path) -> None:
    other = save_model(tmp_path / "other", seed=1)
    with pytest.raises(CheckpointError, match="has other weights than those"):
        Index(index.folder, model=other).search("a picture")
    moved = shutil.copytree(model_folder, tmp_path / "moved")
    assert Index(index.folder, model=moved).search("a picture") == index.search("a picture")


def test_duplicates_are_the_components_of_a_full_comparison(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BLOCK", 7)
    features = index.features.astype(np.float32)
    products = features @ features.T
    threshold = float(np.sort(products[np.triu_indices(len(products), 1)])[-12])
    found = {frozenset(hit.row for hit in group) for group in index.duplicates(threshold)}
    groups = [{row} for row in range(len(products))]
    for one, two in np.argwhere(products >= threshold):
        first, second = (next(group for group in groups if row in group) for row in (one, two))
        if first is not second:
            groups.remove(second)
            first |= second
    assert found == {frozenset(group) for group in groups if len(group) > 1}
    assert len(found) >= 1
    sizes = [len(group) for group in index.duplicates(threshold)]
    assert sizes == sorted(sizes, reverse=True)
    with pytest.raises(ConfigError, match="--threshold is a cosine"):
        index.duplicates(1.5)


def test_a_damaged_index_is_one_sentence(index: Index, tmp_path: Path) -> None:
    broken = shutil.copytree(index.folder, tmp_path / "broken")
    (broken / index.description["items"]).write_bytes(b"PAR1")
    with pytest.raises(DataError, match="is damaged"):
        Index(broken)


def test_command_line_prints_tables_and_json_and_writes_sheets(
    index: Index, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    folder = str(index.folder)
    sheet = tmp_path / "out" / "sheet.png"
    assert main(["search", folder, str(images / "03.png"), "--top", "7", "--sheet", str(sheet)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 8
    assert lines[1].strip().split(maxsplit=2) == ["1.000", str(images / "03.png"), "picture [bold]3"]
    with Image.open(sheet) as page:
        page.load()
        assert page.size[0] > 5 * 224
    assert main(["search", folder, "picture", "--not", "noise", "--top", "2", "--json"]) == 0
    records = json.loads(capsys.readouterr().out)
    assert [record["name"] for record in records] == [hit.name for hit in index.search("picture", not_="noise", top=2)]
    assert main(["search", folder, "--duplicates", "--threshold", "0.5", "--json"]) == 0
    assert [len(group) for group in json.loads(capsys.readouterr().out)] == [
        len(group) for group in index.duplicates(0.5)]
    assert main(["search", folder, "--duplicates", "--threshold", "0.5", "--sheet", str(sheet)]) == 0
    assert "of near-duplicates" in capsys.readouterr().out
    assert main(["search", folder, "--duplicates", "a picture"]) == 2
    assert main(["search", folder, "a picture", "--sheet", "sheet.gif"]) == 2
    assert main(["search", folder, "a picture", "--top", "0"]) == 2
    assert main(["search", str(images), "a picture"]) == 2


def test_command_line_builds(model_folder: Path, images: Path, tmp_path: Path) -> None:
    assert main(["index", str(model_folder), str(images), "--output", str(tmp_path / "index"), "--workers", "0"]) == 0
    assert len(Index(tmp_path / "index")) == 31
    shutil.copy(images / "03.png", tmp_path / "index")
    sheet = tmp_path / "sheet.jpg"  # an image that is gone is a grey cell
    shutil.copytree(images, tmp_path / "images")
    assert main(["index", str(model_folder), str(tmp_path / "images"), "--output", str(tmp_path / "second")]) == 0
    shutil.rmtree(tmp_path / "images")
    assert main(["search", str(tmp_path / "second"), "a picture", "--sheet", str(sheet)]) == 0
    assert sheet.exists()
