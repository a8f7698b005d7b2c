"""Folders of Hugging Face's `save_to_disk`."""

import pickle
from pathlib import Path

import datasets
import pytest

from aclip.data.sources import ColumnarSource, open_source
from aclip.errors import BadSampleError, ConfigError, DataError
from made_pictures import encode, picture


@pytest.fixture(autouse=True)
def _quiet() -> None:
    datasets.disable_progress_bars()


def made(rows: int = 5) -> datasets.Dataset:
    features = datasets.Features(
        image=datasets.Image(), caption=datasets.Sequence(datasets.Value("string")),
        label=datasets.ClassLabel(names=["cat", "dog"]),
    )  # fmt: skip
    content = {
        "image": [{"bytes": encode(picture(n)), "path": None} for n in range(rows)],
        "caption": [[f"first {n}", f"second {n}"] for n in range(rows)],
        "label": [n % 2 for n in range(rows)],
    }
    return datasets.Dataset.from_dict(content, features=features)


def test_pictures_captions_and_the_names_of_classes(tmp_path: Path) -> None:
    made().select([3, 0, 4]).save_to_disk(tmp_path / "saved")
    source = open_source(str(tmp_path / "saved"))
    assert isinstance(source, ColumnarSource)
    for one in (source, pickle.loads(pickle.dumps(source))):
        assert [one.read(n).image for n in range(len(one))] == [encode(picture(n)) for n in (3, 0, 4)]
        assert (one.read(0).captions, one.read(0).label) == (("first 3", "second 3"), "dog")
    assert source.name(2) == "data-00000-of-00001.arrow: group 1, row 3"
    classes = open_source(f"{tmp_path / 'saved'}?image=image&caption=label&label=label")
    assert [classes.read(n).captions for n in range(3)] == [("dog",), ("cat",), ("cat",)]


def test_splits(tmp_path: Path) -> None:
    datasets.DatasetDict(train=made(4), test=made(2)).save_to_disk(tmp_path / "both")
    assert len(open_source(f"{tmp_path / 'both'}?split=train")) == 4
    with pytest.raises(ConfigError, match=r"holds the splits test \(1\), train \(1\): say which, as in "
                                          r"'both\?split=train'"):
        open_source(str(tmp_path / "both"))
    with pytest.raises(ConfigError, match="has no split 'trian': it holds"):
        open_source(f"{tmp_path / 'both'}?split=trian")
    datasets.DatasetDict(train=made(3)).save_to_disk(tmp_path / "single")
    assert len(open_source(str(tmp_path / "single"))) == 3
    with pytest.raises(ConfigError, match="has no splits"):
        open_source(f"{tmp_path / 'single' / 'train'}?split=train")


def test_paths_are_relative_to_the_folder(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"path": ["0.png", "9.png"], "text": ["a", "b"]}).save_to_disk(tmp_path / "saved")
    (tmp_path / "saved" / "0.png").write_bytes(b"zero")
    source = open_source(str(tmp_path / "saved"))
    assert source.read(0).image == b"zero"
    with pytest.raises(BadSampleError, match="cannot read the image file: No such file"):
        source.read(1)


def test_damage_is_a_clear_error(tmp_path: Path) -> None:
    made().save_to_disk(tmp_path / "saved")
    source = open_source(str(tmp_path / "saved"))
    (tmp_path / "saved" / "data-00000-of-00001.arrow").write_bytes(b"torn")
    with pytest.raises(BadSampleError, match=r"cannot read data-00000-of-00001\.arrow"):
        source.read(0)
    (tmp_path / "saved" / "state.json").write_text("{")
    with pytest.raises(DataError, match="cannot be read as a saved dataset"):
        open_source(str(tmp_path / "saved"))
