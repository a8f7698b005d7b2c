"""Karpathy's split files, in the form of `dataset_coco.json` and `dataset_flickr30k.json`."""

import json
from pathlib import Path

import pytest

from aclip.data import open_source
from aclip.errors import ConfigError


def entry(number: int, split: str, **more: str) -> dict[str, object]:
    sentences = [{"raw": f"caption {number}.{n} .", "tokens": ["caption"], "imgid": number} for n in range(5)]
    return {"filename": f"{number}.jpg", "imgid": number, "split": split, "sentences": sentences, **more}


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    splits = ["train", "restval", "test", "test", "val"]
    images = [entry(i, split, filepath="val2014") for i, split in enumerate(splits)]
    (tmp_path / "dataset_coco.json").write_text(json.dumps({"images": images, "dataset": "coco"}))
    (tmp_path / "images" / "val2014").mkdir(parents=True)
    for i in range(5):
        (tmp_path / "images" / "val2014" / f"{i}.jpg").write_bytes(b"%d" % i)
    return tmp_path / "dataset_coco.json"


def test_a_split_has_its_pictures_with_all_captions_in_order(coco: Path) -> None:
    source = open_source(f"{coco}?split=test")
    assert [source.read(i).image for i in range(len(source))] == [b"2", b"3"]
    assert source.read(1).captions == tuple(f"caption 3.{n} ." for n in range(5))


def test_splits_can_be_joined_and_pictures_lie_elsewhere(coco: Path, tmp_path: Path) -> None:
    source = open_source(f"{coco}?split=train+restval&images={tmp_path / 'images'}")
    assert [source.read(i).image for i in range(len(source))] == [b"0", b"1"]


def test_flickr_has_no_filepath(tmp_path: Path) -> None:
    (tmp_path / "dataset_flickr30k.json").write_text(json.dumps({"images": [entry(7, "test")], "dataset": "flickr30k"}))
    (tmp_path / "flickr30k").mkdir()
    (tmp_path / "flickr30k" / "7.jpg").write_bytes(b"7")
    assert open_source(f"{tmp_path / 'dataset_flickr30k.json'}?split=test").read(0).image == b"7"


def test_entries_without_a_file_name_are_left_out(coco: Path) -> None:
    content = json.loads(coco.read_text())
    content["images"] += [entry(5, "test") | {"filepath": 5}, entry(6, "test") | {"filename": None}]
    coco.write_text(json.dumps(content))
    source = open_source(f"{coco}?split=test")
    assert (len(source), source.summary.left_out) == (3, {"rows that cannot be read": 0, "file missing: 5.jpg": 1})


def test_the_split_must_be_named_and_exist(coco: Path) -> None:
    there = r"train \(1\), restval \(1\), test \(2\), val \(1\)"
    with pytest.raises(ConfigError, match=rf"holds the splits {there}: say which, .* 'dataset_coco.json\?split=train'"):
        open_source(str(coco))
    with pytest.raises(ConfigError, match=rf"has no split 'dev': it holds {there}"):
        open_source(f"{coco}?split=dev")


def test_other_json_has_no_splits(tmp_path: Path) -> None:
    (tmp_path / "pairs.json").write_text('[{"image": "0.jpg", "caption": "a"}]')
    with pytest.raises(ConfigError, match="has no splits"):
        open_source(f"{tmp_path / 'pairs.json'}?split=test")
