"""What every source offers beside its samples: digests, summaries, captions without images, advice."""

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from aclip.data import open_source, open_training
from aclip.data.sources import base
from aclip.data.sources.base import Source
from aclip.errors import ConfigError, DataError
from made_pictures import encode, picture


def folder(root: Path, count: int = 6) -> str:
    (root / "folder").mkdir()
    for number in range(count):
        (root / "folder" / f"{number}.png").write_bytes(encode(picture(number)))
        (root / "folder" / f"{number}.txt").write_text(f"number {number}")
    return str(root / "folder")


def table(root: Path) -> str:
    folder(root)
    rows = "".join(f"folder/{number}.png,number {number}\n" for number in range(6))
    (root / "pairs.csv").write_text("image,caption\n" + rows)
    return str(root / "pairs.csv")


def parquet(root: Path, group: int = 2) -> str:
    rows = {"image": [encode(picture(number)) for number in range(6)], "text": [f"number {n}" for n in range(6)]}
    pq.write_table(pa.table(rows), root / "pairs.parquet", row_group_size=group)
    return str(root / "pairs.parquet")


def joined(root: Path) -> str:
    table(root)
    return f"{root}/{{pairs,pairs}}.csv"


KINDS: tuple[Callable[[Path], str], ...] = (folder, table, parquet, joined)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("part", ["", "[1:4]"])
def test_captions_are_those_of_the_sample(tmp_path: Path, kind: Callable[[Path], str], part: str) -> None:
    source = open_source(kind(tmp_path) + part)
    for index in range(len(source)):
        assert source.captions(index) == source.read(index).captions
        assert source.name(index) == source.read(index).name
        path = source.path(index)
        assert path is None or path.read_bytes() == source.read(index).image
    assert source.summary.found == source.summary.captioned


@pytest.mark.parametrize("kind", [folder, table])
def test_captions_need_no_image(tmp_path: Path, kind: Callable[[Path], str]) -> None:
    source = open_source(kind(tmp_path))
    (tmp_path / "folder/3.png").unlink()
    assert source.captions(3) == ("number 3",)


@pytest.mark.parametrize("kind", KINDS)
def test_digests_tell_what_ranks_would_see_otherwise(tmp_path: Path, kind: Callable[[Path], str]) -> None:
    spec = kind(tmp_path)
    digest = open_source(spec).digest()
    assert open_source(spec).digest() == digest
    assert open_source(f"{spec}[1:]").digest() != digest
    if kind is parquet:
        parquet(tmp_path, group=3)
    else:
        (tmp_path / "folder/0.png").rename(tmp_path / "folder/9.png")
        (tmp_path / "folder/0.txt").rename(tmp_path / "folder/9.txt")
        text = (tmp_path / "pairs.csv").read_text() if kind is not folder else ""
        (tmp_path / "pairs.csv").write_text(text.replace("0.png", "9.png"))
    assert open_source(spec).digest() != digest


def test_a_stretched_source_is_said_and_checked(tmp_path: Path) -> None:
    spec = folder(tmp_path)
    source = open_source(f"{spec}?stretch=4095[:3]")
    assert (len(source), source.spec) == (3, f"{spec}?stretch=4095[0:3]")
    assert source.read(1).image == encode(picture(1))  # colours stay as they are
    with pytest.raises(ConfigError, match="write 1, or the grey value that is white"):
        open_source(f"{spec}?stretch=x")


def test_weights_are_for_training(tmp_path: Path) -> None:
    spec = folder(tmp_path)
    with pytest.raises(ConfigError, match="a weight such as =2 is for sources that are mixed"):
        open_source(f"{spec}=2")
    assert len(open_training(f"{spec}=2")) == 6


def test_training_without_captions_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images/1.png").write_bytes(encode(picture(1)))
    assert len(open_source(str(tmp_path / "images"))) == 1
    with pytest.raises(DataError, match=r"no image of .*images has a caption, and training needs them: .*templates"):
        open_training(str(tmp_path / "images"))


def test_a_fetched_set_is_read_by_split(tmp_path: Path) -> None:
    for split in ("train", "val_vendor"):
        (tmp_path / "mine" / split).mkdir(parents=True)
        with tarfile.open(tmp_path / "mine" / split / "000000.tar", "w") as archive:
            for name, data in (("a.png", encode(picture(1))), ("a.txt", split.encode())):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    splits = {"train": {"samples": 1}, "val_vendor": {"samples": 1}}
    (tmp_path / "mine/dataset.json").write_text(json.dumps({"splits": splits}))
    assert open_source(f"{tmp_path}/mine?split=val_vendor").captions(0) == ("val_vendor",)
    with pytest.raises(ConfigError, match=r"holds the splits train \(1\), val_vendor \(1\)"):
        open_source(f"{tmp_path}/mine")


def test_groups_that_are_large_or_single_are_advised_against(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(parquet(tmp_path))
    assert source.advice() == []
    monkeypatch.setattr(base, "_LARGE_GROUP", 1)
    assert "a row group or shard of 2 pairs" in advice(source)
    assert "aclip data pack" in advice(source)


def test_one_caption_of_a_group_of_one_is_not_taken_for_all(tmp_path: Path) -> None:
    assert open_source(parquet(tmp_path, group=1)).advice() == []


def advice(source: Source) -> str:
    (sentence,) = source.advice()
    return sentence
