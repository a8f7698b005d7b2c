"""Finding the reader, and what a folder of pictures with captions reads as."""

import json
import logging
import pickle
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aclip.data.sources import FolderSource, ListSource, ShardSource, Source, open_source
from aclip.data.sources.base import PackedStrings, Runs
from aclip.errors import BadSampleError, ConfigError, DataError
from made_pictures import encode, picture


@given(st.lists(st.text(max_size=9)))
def test_packed_strings(strings: list[str]) -> None:
    packed = PackedStrings(strings)
    packed.append("last\udcff")
    assert list(packed) == [*strings, "last\udcff"]
    assert list(pickle.loads(pickle.dumps(packed))) == [*strings, "last\udcff"]
    with pytest.raises(IndexError):
        packed[len(strings) + 1]


def test_a_folder(pair_folder: Path) -> None:
    source = open_source(str(pair_folder))
    assert isinstance(source, FolderSource)
    assert isinstance(source, Source)
    assert [source.name(i) for i in range(len(source))] == [f"{i:03}.png" for i in range(40)]
    sample = source.read(7)
    assert (sample.name, sample.captions, sample.tags, sample.label) == ("007.png", ("picture 7",), (), None)
    assert sample.image == encode(picture(7))


def test_what_a_folder_takes_and_what_not(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("z.PNG", "cats/b.c.jpeg", "cats/a.tiff", ".hidden.jpg", ".git/x.jpg", "notes.pdf", "a.txt"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x")
    (tmp_path / "cats/b.c.txt").write_text("first line\n\nsecond line\n", encoding="utf-16")
    with caplog.at_level(logging.INFO, logger="aclip"):
        source = open_source(str(tmp_path))
    assert [source.name(i) for i in range(len(source))] == ["cats/a.tiff", "cats/b.c.jpeg", "z.PNG"]
    assert source.read(0).captions == ()
    assert source.read(0).label == "cats"
    assert source.read(1).captions == ("first line", "second line")
    assert "1 text files have no image beside them: a.txt" in caplog.text


def test_a_picture_that_goes_missing_is_a_bad_sample(pair_folder: Path) -> None:
    source = open_source(str(pair_folder))
    (pair_folder / "003.png").unlink()
    with pytest.raises(BadSampleError, match="cannot read the image file: No such file"):
        source.read(3)


def test_readers_are_found_by_name(pair_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "pairs.CSV").write_text("filepath,caption\na.png,hello\n")
    (tmp_path / "a.png").touch()
    shards = tmp_path / "shards"
    shards.mkdir()
    with tarfile.open(shards / "0.tar", "w") as archive:
        archive.add(pair_folder / "000.png", "000.png")
    assert isinstance(open_source(str(tmp_path / "pairs.CSV")), ListSource)
    assert isinstance(open_source(str(shards)), ShardSource)
    assert isinstance(open_source(str(shards / "0.tar")), ShardSource)
    (shards / "picture.png").write_bytes(b"")
    assert isinstance(open_source(str(shards)), FolderSource)


def test_a_source_that_is_nothing_lists_what_is_accepted(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere' does not exist") as caught:
        open_source(str(tmp_path / "nowhere"))
    assert all(word in str(caught.value) for word in (".tar", "CSV", "TSV", "folder"))
    with pytest.raises(DataError, match="no images in"):
        open_source(str(tmp_path))


def test_a_field_that_a_source_does_not_take_is_refused_by_name(pair_folder: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        archive.add(pair_folder / "000.png", "000.png")
    (tmp_path / "a.json").write_text(json.dumps({"images": [{"id": 1, "file_name": "pairs/000.png"}],
                                                 "annotations": [{"image_id": 1, "caption": "a"}]}))  # fmt: skip
    (tmp_path / "b.json").write_text(json.dumps({"images": [
        {"filename": "pairs/000.png", "split": "test", "sentences": [{"raw": "a"}]}]}))  # fmt: skip
    pq.write_table(pa.table({"image": [b"x"], "text": ["a"]}), tmp_path / "a.parquet")
    for spec, message in (
        ("0.tar?images={0}", "'.*0.tar.*': unknown option 'images': did you mean 'image'"),
        ("*.tar?label=x", "unknown option 'label'"),
        ("pairs?images={0}", "unknown option 'images': .*templates"),
        ("a.json?image=x&caption=y", "is COCO captions, .* takes no 'image' and 'caption'"),
        ("b.json?image=x&caption=y&split=test", "Karpathy's split test, .* takes no 'image' and 'caption'"),
        ("a.parquet?images={0}", "column 'image' holds binary, not paths: 'images' is for lists of paths"),
        ("a.json?images=", "the option 'images' is empty"),
        ("a.json?images={0}/nowhere", "the folder '.*/nowhere' of 'images=' does not exist"),
    ):
        with pytest.raises(ConfigError, match=message):
            open_source(f"{tmp_path}/{spec.format(tmp_path)}")


@given(st.lists(st.integers(0, 5), max_size=9))
def test_runs(sizes: list[int]) -> None:
    runs = Runs(sizes)
    expected = [(run, place) for run, size in enumerate(sizes) for place in range(size)]
    assert [runs.place(number) for number in range(len(runs))] == expected
    assert [runs.start(run) for run in range(len(sizes))] == [sum(sizes[:run]) for run in range(len(sizes))]
