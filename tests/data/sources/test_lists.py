"""JSON, Parquet and class folders: recognised, read as they are meant, and never more than a clear error."""

import contextlib
import json
import logging
import os
import pickle
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from aclip.data.sources import ColumnarSource, Source, columnar, open_source, records
from aclip.data.sources.base import WINDOW, window_order
from aclip.errors import AclipError, BadSampleError, ConfigError, DataError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for number in range(3):
        (tmp_path / "images" / f"{number}.jpg").write_bytes(b"picture %d" % number)
    return tmp_path


def captions(source: Source) -> list[tuple[str, ...]]:
    return [source.read(index).captions for index in range(len(source))]


def write_lines(path: Path, *objects: Any) -> str:
    path.write_text("\n".join(one if isinstance(one, str) else json.dumps(one) for one in objects), "utf-8")
    return str(path)


def test_json_lines(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="aclip"):
        source = open_source(write_lines(
            folder / "pairs.jsonl",
            {"id": 7, "image": "images/0.jpg", "caption": ["a dog", "one\ndog"], "tags": "pet; brown", "label": 3},
            "", "{broken", "[1]", {"image": "images/2.jpg", "caption": "a cat \ud800"}, {"caption": "no picture"},
        ))  # fmt: skip
    assert "image from 'image', caption from 'caption'" in caplog.text
    first = source.read(0)
    assert (first.image, first.captions, first.tags, first.label) == (
        b"picture 0", ("a dog", "one\ndog"), ("pet", "brown"), "3")
    assert source.read(3).captions == ("a cat ?",)
    for index, reason in ((1, "JSON that cannot be read"), (2, "not a JSON object"), (4, "missing image path")):
        with pytest.raises(BadSampleError, match=reason):
            source.read(index)


def test_json_columns_can_be_named_and_are_checked(folder: Path) -> None:
    spec = write_lines(folder / "pairs.ndjson", {"photo": "images/1.jpg", "alt": "x", "words": "y"})
    assert captions(open_source(f"{spec}?image=photo&caption=words")) == [("y",)]
    with pytest.raises(ConfigError, match="unknown column 'wrods': did you mean 'words'"):
        open_source(f"{spec}?image=photo&caption=wrods")
    with pytest.raises(ConfigError, match="unknown option 'picture'"):
        open_source(f"{spec}?picture=photo")


def test_list_of_objects(folder: Path) -> None:
    (folder / "pairs.json").write_text(json.dumps([{"file": "images/0.jpg", "text": "a"}, 5]))
    source = pickle.loads(pickle.dumps(open_source(str(folder / "pairs.json"))))
    assert source.read(0).captions == ("a",)
    with pytest.raises(BadSampleError, match="not a JSON object"):
        source.read(1)


@pytest.mark.parametrize(
    "name", ["pairs.jsonl", "pairs.json", "pairs.parquet", "{pairs,sub/pairs}.parquet", "coco.json"])
def test_every_manifest_makes_one_sample_of_a_picture(folder: Path, name: str) -> None:
    rows = [("images/0.jpg", ["a", "b"]), ("images/1.jpg", ["c", "c"]), ("images/0.jpg", ["b", "d"])]
    objects = [{"image": image, "captions": captions} for image, captions in rows]
    if name.endswith(".parquet"):
        (folder / "sub").mkdir()
        (folder / "sub" / "images").symlink_to(folder / "images")
        pq.write_table(pa.Table.from_pylist(objects), folder / "pairs.parquet")
        pq.write_table(pa.Table.from_pylist([{"image": str(folder / "images/1.jpg"), "captions": ["e"]}]),
                       folder / "sub" / "pairs.parquet")  # fmt: skip
    elif name == "coco.json":
        images = [{"id": number, "file_name": image} for number, (image, _) in enumerate(rows)]
        notes = [{"image_id": number, "caption": one} for number, (_, many) in enumerate(rows) for one in many]
        (folder / name).write_text(json.dumps({"images": images, "annotations": notes}))
    elif name == "pairs.json":
        (folder / name).write_text(json.dumps(objects))
    else:
        write_lines(folder / name, *objects)
    source = open_source(str(folder / name))
    assert captions(source) == [("a", "b", "d"), ("c", "e") if "sub" in name else ("c", "c")]
    assert [source.read(index).image for index in range(2)] == [b"picture 0", b"picture 1"]


def write_list(path: Path, images: list[str]) -> str:
    """Write a list of any kind whose captions are the paths."""
    objects = [{"image": image, "caption": image} for image in images]
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(objects), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(objects))
    elif path.suffix == ".jsonl":
        write_lines(path, *objects)
    else:
        path.write_text("image,caption\n" + "".join(f"{image},{image}\n" for image in images))
    return str(path)


KINDS = ("csv", "jsonl", "json", "parquet")


@pytest.mark.parametrize("kind", KINDS)
def test_pictures_lie_in_another_folder_than_the_list(
    folder: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = write_list(folder / f"pairs.{kind}", ["0.jpg", "2.jpg", "9.jpg"])
    monkeypatch.chdir(folder.parent)
    monkeypatch.setenv("HOME", str(folder))
    for images in (str(folder / "images"), f"{folder.name}/images", "~/images"):
        source = open_source(f"{spec}?images={images}")
        assert [source.read(index).image for index in range(2)] == [b"picture 0", b"picture 2"]
    with pytest.raises(BadSampleError, match=f"No such file or directory: {folder}/images/9.jpg$"):
        source.read(2)
    fields = f"{spec}?image=caption&caption=image&images={folder / 'images'}"
    assert open_source(fields).read(1).captions == ("2.jpg",)
    write_list(folder / "images" / f"pairs.{kind}", ["1.jpg"])
    if kind != "json":
        joined = open_source(f"{folder}/{{,images/}}pairs.{kind}?images={folder / 'images'}")
        assert joined.read(3).image == b"picture 1"


@pytest.mark.parametrize("kind", KINDS)
def test_a_list_whose_images_are_elsewhere(folder: Path, kind: str) -> None:
    (folder / "lists").mkdir()
    spec = write_list(folder / "lists" / f"pairs.{kind}", [f"{number}.jpg" for number in range(3)])
    source = open_source(f"{spec}[1:]")
    assert source.read(0).image == b"picture 1"
    assert f"found in {folder}/images" in str(open_source(spec).summary)
    write_list(Path(spec), [f"gone/{number}.jpg" for number in range(7, 26)])
    where = f"19 were looked for, first {folder}/lists/gone/7.jpg"
    with pytest.raises(DataError, match=f"none of its images is there, {where}: say where they lie with"):
        open_source(spec)
    with pytest.raises(DataError, match=r"first .*/7\.jpg$"):  # the advice was followed already
        open_source(f"{spec}?images={folder}/lists")
    write_list(Path(spec), [*(f"{number}.jpg" for number in range(39)), "../images/0.jpg"])
    source = open_source(spec)
    assert len(source) == 40
    # one lies where the list says, so all others should
    assert "39 left out (file missing: 0.jpg)" in str(source.summary)


def test_what_to_do_about_pictures_that_are_not_there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder / "images")
    for images in (["7.jpg"], ["/nowhere/7.jpg"], ["https://x.org/1.jpg", "", "7.jpg"]):
        write_list(Path("pairs.csv"), images)
        with pytest.raises(DataError, match=r"7\.jpg: say where they lie with 'pairs.csv\?images=FOLDER'"):
            open_source("pairs.csv")
    write_list(Path("pairs.csv"), ["https://x.org/1.jpg", "", "https://x.org/2.jpg"])
    with pytest.raises(DataError, match=r"images are URLs, such as https://x\.org/1\.jpg: download .*img2dataset"):
        open_source("pairs.csv")
    write_list(Path("pairs.csv"), ["https://x.org/1.jpg"] * 30 + ["0.jpg"])
    assert len(open_source("pairs.csv")) == 2


COCO = {
    "images": [{"id": 10, "file_name": "0.jpg"}, {"id": 11, "file_name": "1.jpg"}, {"id": 12, "file_name": "9.jpg"}],
    "annotations": [
        {"image_id": 11, "caption": "second"}, {"image_id": 10, "caption": "first"},
        {"image_id": 11, "caption": "second again"}, {"image_id": 12, "caption": "gone"}, {"image_id": 10},
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("place", "query"),
    [("train2017", ""), ("../train2017", ""), ("images", ""), ("", ""), ("elsewhere", "?images={}/a/elsewhere")],
)
def test_coco_finds_the_pictures(tmp_path: Path, place: str, query: str) -> None:
    base = tmp_path / "a"
    base.mkdir()
    (base / place).mkdir(exist_ok=True)
    for number in range(2):
        (base / place / f"{number}.jpg").write_bytes(b"%d" % number)
    (base / "captions_train2017.json").write_text(json.dumps(COCO))
    source = open_source(str(base / "captions_train2017.json") + query.format(tmp_path))
    assert captions_of(source, 2) == [("first",), ("second", "second again")]
    assert source.read(1).image == b"1"
    with pytest.raises(BadSampleError, match="No such file"):
        source.read(2)


def captions_of(source: Source, count: int) -> list[tuple[str, ...]]:
    return [source.read(index).captions for index in range(count)]


@pytest.mark.parametrize("content", ["{}", "3", '{"images": 1, "annotations": {}}', "{", '{"a": 1}\n{"a": 2}', "[]"])
def test_other_json_is_an_error(tmp_path: Path, content: str) -> None:
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(AclipError, match=r"x\.json"):
        open_source(str(tmp_path / "x.json"))


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("broken", ["[{},{}x,{}]", "[{},{}", "[{},{}] x", "[{} {}]"])
def test_malformed_lists_lose_no_rows_silently(folder: Path, large: bool, broken: str,
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "LARGE", 0 if large else 2**30)
    row = json.dumps({"image": "images/0.jpg", "caption": "a"})
    (folder / "x.json").write_text(broken.replace("{}", row))
    with pytest.raises(DataError, match="is not JSON"):
        open_source(str(folder / "x.json"))


def test_a_long_json_list_is_not_held_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = " ".join(["word"] * 400)
    with (tmp_path / "long.json").open("w") as file:
        lines = (json.dumps({"image": f"{n}.jpg", "text": "a", "other": words}) for n in range(5000))
        file.write(f"[{', '.join(lines)}]")
    monkeypatch.setattr(records, "LARGE", 1)
    (tmp_path / "0.jpg").touch()
    tracemalloc.start()
    source = open_source(str(tmp_path / "long.json"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(source) == 5000
    assert peak < (tmp_path / "long.json").stat().st_size // 5


def test_parquet_with_paths(folder: Path) -> None:
    table = pa.table({"path": ["images/0.jpg", None, "images/2.jpg"], "captions": [["a", "b"], ["c"], None]})
    pq.write_table(table, folder / "pairs.parquet")
    source = open_source(str(folder / "pairs.parquet"))
    assert (source.read(0).image, source.read(0).captions) == (b"picture 0", ("a", "b"))
    assert source.read(2).captions == ("",)
    with pytest.raises(BadSampleError, match="missing image path"):
        source.read(1)


def embedded(folder: Path, files: int = 2, rows: int = 10, group: int = 3, struct: bool = True) -> Path:
    for file in range(files):
        numbers = [file * rows + row for row in range(rows)]
        pictures: list[Any] = [b"picture %d" % number for number in numbers]
        if struct:
            pictures = [{"bytes": data, "path": None} for data in pictures]
        texts = [str(number) for number in numbers]
        pq.write_table(pa.table({"image": pictures, "text": texts}), folder / f"{file}.parquet", row_group_size=group)
    return folder


@pytest.mark.parametrize("struct", [True, False])
def test_parquet_with_pictures(tmp_path: Path, struct: bool) -> None:
    source = open_source(str(embedded(tmp_path, struct=struct)))
    assert isinstance(source, ColumnarSource)
    assert source.groups == (3, 3, 3, 1) * 2
    copy = pickle.loads(pickle.dumps(source))
    for index in (0, 19, 3, 9, 10, 5):
        for one in (source, copy):
            sample = one.read(index)
            assert (sample.image, sample.captions) == (b"picture %d" % index, (str(index),))
    assert source.name(10) == "1.parquet: group 1, row 1"
    assert len(open_source(str(tmp_path / "{0..1}.parquet"))) == len(open_source(str(tmp_path / "*.parquet"))) == 20


def test_training_order_needs_each_row_group_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(str(embedded(tmp_path, rows=100, group=5)))
    assert isinstance(source, ColumnarSource)
    opened: list[int] = []
    original = columnar._File.read
    monkeypatch.setattr(columnar._File, "read", lambda file, *args: opened.append(1) or original(file, *args))
    for index in window_order(source.groups, seed=0, epoch=0).tolist():
        source.read(index)
    assert len(opened) == len(source.groups)


def test_more_parquet_files_than_can_be_open(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    for number in range(100):
        table = pa.table({"image": [b"image"], "text": [str(number)]})
        pq.write_table(table, tmp_path / f"{number:02}.parquet")
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    with open(os.devnull) as file:
        resource.setrlimit(resource.RLIMIT_NOFILE, (file.fileno() + 50, before[1]))
    try:
        source = open_source(str(tmp_path))
        assert [source.read(number).captions for number in range(100)] == [(str(number),) for number in range(100)]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_pictures_missing_or_gone(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [b"x", None], "text": ["a", "b"]}), tmp_path / "a.parquet")
    source = open_source(str(tmp_path / "a.parquet"))
    with pytest.raises(BadSampleError, match="missing image"):
        source.read(1)
    fresh = pickle.loads(pickle.dumps(source))
    (tmp_path / "a.parquet").unlink()
    with pytest.raises(BadSampleError, match=r"cannot read a\.parquet"):
        fresh.read(0)


def text_that_is_no_utf8() -> pa.Array:
    buffers = [None, pa.array([0, 1, 3], pa.int32()).buffers()[1], pa.py_buffer(b"a\xff\xfe")]
    return pa.Array.from_buffers(pa.string(), 2, buffers)


def test_text_that_is_no_utf8_in_parquet(folder: Path) -> None:
    pq.write_table(pa.table({"image": [b"x", b"y"], "text": text_that_is_no_utf8()}), folder / "a.parquet")
    source = open_source(str(folder / "a.parquet"))
    assert source.read(0).captions == ("a",)
    with pytest.raises(BadSampleError, match=r"cannot read a\.parquet"):
        source.read(1)
    pq.write_table(pa.table({"image": ["images/0.jpg"] * 2, "text": text_that_is_no_utf8()}), folder / "b.parquet")
    with pytest.raises(DataError, match=r"b\.parquet cannot be read"):
        open_source(str(folder / "b.parquet"))


@pytest.mark.parametrize(
    "kind",
    [
        pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string()), pa.binary(),
        pa.large_binary(), pa.struct([("path", pa.string()), ("bytes", pa.binary())]),
    ],
    ids=str,
)  # fmt: skip
def test_every_way_to_hold_a_picture_in_parquet(folder: Path, kind: pa.DataType) -> None:
    values: list[Any] = ["images/1.jpg"]
    if pa.types.is_struct(kind):
        values = [{"path": "images/1.jpg", "bytes": None}]
    elif "binary" in str(kind):
        values = [b"picture 1"]
    pq.write_table(pa.table({"image": pa.array(values, pa.string()).cast(kind) if "dictionary" in str(kind)
                             else pa.array(values, kind), "text": ["a"]}), folder / "A.PARQUET")  # fmt: skip
    sample = open_source(str(folder / "A.PARQUET")).read(0)
    assert (sample.image, sample.captions) == (b"picture 1", ("a",))


def test_a_folder_with_a_list_takes_the_captions_from_it(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_lines(folder / "metadata.jsonl", {"file_name": "images/1.jpg", "text": "one"})
    with caplog.at_level(logging.INFO, logger="aclip"):
        assert captions(open_source(str(folder))) == [("one",)]
    assert "metadata.jsonl: 1 image; JSON lines" in caplog.text
    assert captions(open_source(f"{folder}?templates=my {{}}")) == [("my images",)] * 3
    write_lines(folder / "more.jsonl", {"file_name": "images/1.jpg", "text": "two"})
    with pytest.raises(DataError, match=r"several lists of pairs, metadata\.jsonl, more\.jsonl: name one"):
        open_source(str(folder))
    (folder / "images" / "0.txt").write_text("beside")
    assert captions(open_source(str(folder))) == [("beside",), (), ()]


def test_parquet_that_cannot_be_used(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [1, 2], "text": ["a", "b"]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="column 'image' holds int64, neither paths nor images"):
        open_source(str(tmp_path / "a.parquet"))
    pq.write_table(pa.table({"image": ["x"], "caption": ["a"]}), tmp_path / "b.parquet")
    with pytest.raises(DataError, match=r"b\.parquet has other columns than .*a\.parquet"):
        open_source(str(tmp_path / "*.parquet"))
    (tmp_path / "c.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-20])
    with pytest.raises(DataError, match=r"c\.parquet cannot be read as a Parquet file"):
        open_source(str(tmp_path / "c.parquet"))


def test_class_folders(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("tabby_cat/0.jpg", "dog/1.jpg"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(b"x")
    with caplog.at_level(logging.INFO, logger="aclip"):
        assert captions(open_source(str(tmp_path))) == [("a photo of a dog.",), ("a photo of a tabby cat.",)]
    assert "its 2 folders are classes" in caplog.text
    templated = open_source(f"{tmp_path}/?templates=a {{}}.|my {{}}")
    assert captions(templated) == [("a dog.", "my dog"), ("a tabby cat.", "my tabby cat")]
    with pytest.raises(ConfigError, match=r"has no \{\} for the folder's name"):
        open_source(f"{tmp_path}/?templates=a cat")
    (tmp_path / "dog" / "1.txt").write_text("Rex")  # with captions of its own it is no set of classes any more
    assert captions(open_source(str(tmp_path))) == [("Rex",), ()]
    assert captions(open_source(f"{tmp_path}?templates=a {{}}")) == [("Rex",), ("a tabby cat",)]


def test_a_million_rows_cost_little_memory(tmp_path: Path) -> None:
    rows = 50_000  # a twentieth of a million, against a twentieth of 200 MB
    lines = (f'{{"image": "images/{n:09}.jpg", "caption": "a picture of thing number {n}"}}\n' for n in range(rows))
    (tmp_path / "pairs.jsonl").write_text("".join(lines))
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "000000000.jpg").touch()
    tracemalloc.start()
    source = open_source(str(tmp_path / "pairs.jsonl"))
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(source) == rows
    assert kept < 200e6 / 20


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    groups=st.lists(st.integers(0, 7), min_size=1, max_size=40).filter(sum),
    epoch=st.integers(0, 3),
)
def test_window_order(groups: list[int], epoch: int) -> None:
    order = window_order(groups, 1, epoch)
    assert sorted(order.tolist()) == list(range(sum(groups)))
    assert order.tolist() == window_order(groups, 1, epoch).tolist()
    owner = [group for group, size in enumerate(groups) for _ in range(size)]
    seen = [owner[index] for index in order.tolist()]
    for group in set(seen):  # between its first and its last sample, only one window's groups appear
        first = seen.index(group)
        last = len(seen) - 1 - seen[::-1].index(group)
        assert len(set(seen[first : last + 1])) <= WINDOW


def test_window_order_mixes_and_changes() -> None:
    groups = [10] * 4 * WINDOW
    first, second = window_order(groups, 0, 0), window_order(groups, 0, 1)
    assert first.tolist() != second.tolist()
    assert len({index // 10 for index in first[:80].tolist()}) == WINDOW


VALID = {
    ".csv": b"image,caption\nimages/0.jpg,a\n",
    ".jsonl": b'{"image": "images/0.jpg", "caption": "a"}\n{"image": "images/1.jpg", "caption": ["b"]}',
    ".json": json.dumps(COCO).encode(),
    ".parquet": b"",
}


@pytest.mark.parametrize("ending", list(VALID))
@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(position=st.integers(0, 400), junk=st.binary(max_size=30), cut=st.integers(0, 30), fresh=st.booleans())
@example(position=11, junk=b'"\\ud800"', cut=14, fresh=False)
@example(position=0, junk=b"\xff\xfe\x00\xd8", cut=0, fresh=True)
@example(position=0, junk=b"[" * 30, cut=0, fresh=True)
def test_any_bytes_give_rows_or_a_clear_error(
    folder: Path, ending: str, position: int, junk: bytes, cut: int, fresh: bool
) -> None:
    path = folder / f"pairs{ending}"
    content = VALID[ending]
    if ending == ".parquet":
        pq.write_table(pa.table({"image": ["images/0.jpg"], "caption": ["a"]}), path)
        content = path.read_bytes()
    path.write_bytes(junk if fresh else content[:position] + junk + content[position + cut :])
    try:
        source = open_source(str(path))
    except AclipError:
        return
    for index in range(len(source)):
        with contextlib.suppress(BadSampleError):
            assert source.read(index).name


def test_images_sought_in_all_folders_of_a_relative_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "set/train/6/e").mkdir(parents=True)
    (tmp_path / "set/train/6/e/6e1a.jpg").write_bytes(b"tower")
    (tmp_path / "set/train.csv").write_text("id,caption\n6e1a,a tower\n")
    monkeypatch.chdir(tmp_path)
    source = open_source("set/train.csv")
    assert source.read(0).image == b"tower"
    monkeypatch.chdir(tmp_path.parent)
    assert source.read(0).image == b"tower"
