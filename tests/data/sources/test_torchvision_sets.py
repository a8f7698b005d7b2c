"""Sets in torchvision's own layouts, made small."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torchvision
from PIL import Image

from aclip.data import decode_image, open_source
from aclip.data.sources.torchvision_sets import SETS
from aclip.errors import BadSampleError, ConfigError, DataError


@pytest.fixture
def food(tmp_path: Path) -> Path:
    """`food-101/images/CLASS/NUMBER.jpg`, listed in `food-101/meta/SPLIT.json`."""
    for name in ("apple_pie", "pizza"):
        folder = tmp_path / "food-101" / "images" / name
        folder.mkdir(parents=True)
        for number in range(3):
            Image.new("RGB", (20, 10), (80 * number, 10, 10)).save(folder / f"{number}.jpg", quality=95)
    (tmp_path / "food-101" / "meta").mkdir()
    test = {"apple_pie": ["apple_pie/2"], "pizza": ["pizza/1", "pizza/2"]}
    (tmp_path / "food-101" / "meta" / "test.json").write_text(json.dumps(test))
    return tmp_path


def test_pictures_and_labels_of_a_split(food: Path) -> None:
    source = open_source(f"torchvision:food101?root={food}&split=test")
    assert [source.read(i).label for i in range(len(source))] == ["apple_pie", "pizza", "pizza"]
    image = decode_image(source.read(1).image)
    assert image.size == (20, 10)
    assert np.abs(np.asarray(image).astype(int) - (80, 10, 10)).max() <= 8  # as JPEG keeps it
    assert source.name(2) == "food101 2"
    assert [open_source(f"torchvision:food101?root={food}&split=test&labels=number").read(i).label
            for i in (0, 2)] == ["0000", "0001"]


def test_a_damaged_picture_is_a_bad_sample(food: Path) -> None:
    (food / "food-101" / "images" / "pizza" / "1.jpg").write_bytes(b"torn")
    with pytest.raises(BadSampleError, match="torchvision cannot read it: cannot identify image file"):
        open_source(f"torchvision:food101?root={food}&split=test").read(1)


@pytest.mark.parametrize(("spec", "sentence"), [
    ("torchvision:food101", r"say where it lies, as in 'torchvision:food101\?root=FOLDER&split=test'"),
    ("torchvision:food101?root=x", r"has the splits train, test: say which, as in .*&split=test'"),
    ("torchvision:food101?root=x&split=dev", "has the splits train, test"),
    ("torchvision:food?root=x", "unknown set of torchvision 'food': did you mean 'food101'"),
    ("torchvision:food101?root=x&split=test&labels=numbers", "did you mean 'number'"),
])
def test_what_is_wrong_is_said(spec: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        open_source(spec)


def test_a_set_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"torchvision cannot open 'torchvision:food101.*not found"):
        open_source(f"torchvision:food101?root={tmp_path}&split=test")


def test_pickles_of_other_contents_are_not_opened(tmp_path: Path) -> None:
    (tmp_path / "cifar-10-batches-py").mkdir()

    class Opened:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (tmp_path / "opened",)  # type: ignore[return-value]

    (tmp_path / "cifar-10-batches-py" / "test_batch").write_bytes(pickle.dumps(Opened()))
    with pytest.raises(DataError, match="not found or corrupted"):
        open_source(f"torchvision:cifar10?root={tmp_path}&split=test")
    assert not (tmp_path / "opened").exists()


def test_all_sets_exist() -> None:
    assert all(hasattr(torchvision.datasets, kind) for kind, *_ in SETS.values())
