"""Tables: delimiters, encodings and columns are found out; rows that do not fit are bad samples."""

import csv
import logging
import pickle
import zipfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from aclip.data.sources import ListSource, open_source
from aclip.data.sources.columns import Columns, settle_columns
from aclip.data.spec import parse_spec
from aclip.errors import AclipError, BadSampleError, ConfigError, DataError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for number in range(6):
        (tmp_path / "images" / f"{number}.jpg").write_bytes(b"picture %d" % number)
    return tmp_path


def open_text(folder: Path, text: str, name: str = "pairs.csv", encoding: str = "utf-8") -> ListSource:
    (folder / name).write_bytes(text.encode(encoding))
    source = open_source(str(folder / name))
    assert isinstance(source, ListSource)
    return source


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("name", ["pairs.csv", "pairs.tsv"])
def test_delimiters(folder: Path, delimiter: str, name: str) -> None:
    # Captions with every other delimiter in them must not mislead.
    other = "".join({",", ";", "\t", "|"} - {delimiter})
    rows = [["filepath", "title"]] + [[f"images/{n}.jpg", f"dog{other} {n}"] for n in range(3)]
    source = open_text(folder, "\n".join(delimiter.join(row) for row in rows), name)
    assert [source.read(n).captions for n in range(3)] == [(f"dog{other} {n}",) for n in range(3)]
    assert [source.read(n).image for n in range(3)] == [b"picture %d" % n for n in range(3)]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252"])
def test_encodings(folder: Path, encoding: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="aclip"):
        source = open_text(folder, "image,caption\r\nimages/0.jpg,„café“\r\n", encoding=encoding)
    assert source.read(0).captions == ("„café“",)
    assert ("read as Windows-1252, as it is not UTF-8" in caplog.text) == (encoding == "cp1252")
    assert "image from 'image', caption from 'caption'" in caplog.text


def test_one_line_in_another_encoding_spoils_no_other(folder: Path) -> None:
    rows = ["image,caption", "images/0.jpg,café in Łódź", "images/1.jpg,„crème“ brûlée", "images/2.jpg,naïve 猫"]
    encodings = ["utf-8", "utf-8", "cp1252", "utf-8"]
    content = b"\n".join(row.encode(encoding) for row, encoding in zip(rows, encodings, strict=True))
    (folder / "mixed.csv").write_bytes(content)
    source = open_source(str(folder / "mixed.csv"))
    assert [source.read(n).captions for n in range(3)] == [("café in Łódź",), ("„crème“ brûlée",), ("naïve 猫",)]


def test_a_column_that_is_there_twice_is_an_error(folder: Path) -> None:
    with pytest.raises(ConfigError, match="has 2 columns named 'caption': rename all but one"):
        open_text(folder, "image,caption,caption\nimages/0.jpg,a,b\n")
    assert open_text(folder, "image,caption,n,n\nimages/0.jpg,a,1,2\n").read(0).captions == ("a",)


def test_several_tables_are_joined(folder: Path) -> None:
    for name in ("a", "b"):
        (folder / f"{name}.csv").write_text(f"image,caption,words\nimages/0.jpg,{name}0,w\nimages/1.jpg,{name}1,w\n")
    for pattern in ("{a,b}.csv", "*.csv"):
        source = pickle.loads(pickle.dumps(open_source(str(folder / pattern))))
        assert [source.read(n).captions[0] for n in range(len(source))] == ["a0", "a1", "b0", "b1"]
        assert source.name(2) == f"{folder / 'b.csv'}: row 1: images/0.jpg"
    assert open_source(f"{folder / '{a,b}.csv'}?image=image&caption=words").read(3).captions == ("w",)
    with pytest.raises(DataError, match=r"c\.csv"):
        open_source(str(folder / "{a,c}.csv"))


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("filepath,title", Columns("filepath", ("title",))),
        ("id,Image Path,ALT-TEXT,Tags", Columns("Image Path", ("ALT-TEXT",), tags="Tags")),
        ("image,label", Columns("image", ("label",), label="label")),
        ("path,label,caption", Columns("path", ("caption",), label="label")),
        ("file_name,text,title", Columns("file_name", ("title",))),
        ("file,title,description,keywords", Columns("file", ("title", "description"), tags="keywords")),
        ("image,filepath,caption", Columns("filepath", ("caption",))),
    ],
)
def test_columns_are_guessed(header: str, expected: Columns) -> None:
    assert settle_columns(parse_spec("t.csv"), header.split(","), []) == expected


def test_columns_that_cannot_be_guessed_are_listed(folder: Path) -> None:
    with pytest.raises(ConfigError, match="no column looks like the caption; there are: image, wording, n;"):
        open_text(folder, "image,wording,n\nimages/0.jpg,a,1\n")
    with pytest.raises(ConfigError, match="no column looks like the image; there are: where, caption"):
        open_text(folder, "where,caption\n0,a\n")


@pytest.mark.parametrize("delimiter", [",", "\t"])
def test_a_table_without_a_header(folder: Path, delimiter: str) -> None:
    rows = [("images/0.jpg#0", "a cat, sleeping"), ("images/1.jpg", "a dog. He barks")]
    (folder / "bare.csv").write_text("".join(f'{image}{delimiter}"{caption}"\n' for image, caption in rows))
    for query in ("", "?image=1&caption=2"):
        source = open_source(f"{folder}/bare.csv{query}")
        assert [source.captions(n) for n in range(2)] == [("a cat, sleeping",), ("a dog. He barks",)]
        assert "no header" in str(source.summary)


@pytest.mark.parametrize("name", ["url", "URL", "image_url"])
def test_urls_in_place_of_paths_are_said(folder: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=rf"column '{name}' has URLs, and none has paths .*: download .* img2dataset"):
        open_text(folder, f"{name},caption\nhttps://example.org/0.jpg,a\n")
    assert open_text(folder, f"{name},path,caption\nhttps://x.org/0.jpg,images/1.jpg,a\n").read(0).image == b"picture 1"


@pytest.mark.parametrize(
    "content", [b"", b"A letter, short.\n\nYours\n", b"%PDF-1.4\n%\xe2\xe3\n1 0 obj\n",
                b"PK\3\4" + b"\0\1\2\3\4\5" * 99])
def test_other_files_are_no_lists(folder: Path, content: bytes) -> None:
    (folder / "a.txt").write_bytes(content)
    with pytest.raises(AclipError, match=r"a\.txt(: no column| holds no rows| lists no images| is not UTF-8)"):
        open_source(f"{folder}/a.txt")


def test_a_workbook_is_to_be_saved_as_a_table(folder: Path) -> None:
    with zipfile.ZipFile(folder / "pairs.xlsx", "w") as file:
        file.writestr("[Content_Types].xml", "<Types/>")
    with pytest.raises(DataError, match=r"pairs\.xlsx is a workbook .*: save it as CSV"):
        open_source(f"{folder}/pairs.xlsx")


def test_columns_can_be_said(folder: Path) -> None:
    (folder / "t.csv").write_text("where,wording,kind\nimages/1.jpg,a dog,animal\n")
    path = f"{folder / 't.csv'}"
    sample = open_source(f"{path}?image=where&caption=wording,kind&label=kind").read(0)
    assert (sample.captions, sample.label) == (("a dog", "animal"), "animal")
    for query, message in (
        ("image=wher&caption=wording", "unknown column 'wher': did you mean 'where'"),
        ("image=where&captain=wording", "unknown option 'captain': did you mean 'caption'"),
        ("image=where", "name both columns"),
    ):
        with pytest.raises(ConfigError, match=message):
            open_source(f"{path}?{query}")


def test_tags_labels_and_absolute_paths(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "x.jpg"
    elsewhere.write_bytes(b"far")
    source = open_text(folder, f"image,caption,tags,class\n{elsewhere},hi,love; emotion ;,Heart\n")
    sample = source.read(0)
    assert (sample.image, sample.tags, sample.label) == (b"far", ("love", "emotion"), "Heart")
    assert sample.name == f"row 1: {elsewhere}"


def test_rows_that_are_bad_on_their_own(folder: Path) -> None:
    source = open_text(
        folder,
        "image,caption\n"
        "images/0.jpg,a, b and c\n"
        "images/1.jpg\n"
        ",no image\n"
        "images/9.jpg,gone\n"
        "\n"
        "https://example.org/1.jpg,far away\n"
        "images/2.jpg,\n"
        "images/\0.jpg,null\n",
    )
    reasons = (
        "3 fields in the row, 2 in the header", "1 fields in the row", "missing image path",
        f"cannot read the image file: No such file or directory: {folder}/images/9.jpg", "is a URL",
    )  # fmt: skip
    for index, reason in enumerate(reasons):
        with pytest.raises(BadSampleError, match=reason):
            source.read(index)
    assert source.read(5).captions == ("",)
    with pytest.raises(BadSampleError, match="null"):
        source.read(6)
    assert len(source) == 7


def test_rows_of_one_picture_are_one_sample(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="aclip"):
        source = open_text(
            folder,
            "image,caption,tags,label\n"
            "images/1.jpg,one,x,A\n"
            "images/0.jpg,nought,,B\n"
            f"{folder}/images/1.jpg,one again,y,C\n"
            "images/2.jpg,a, b and c\n"
            ",no image,,\n"
            "./images//1.jpg,one,z,A\n"
            ",no image either,,\n"
            "images/2.jpg,two,,\n",
        )
    samples = [source.read(index) for index in (0, 1, 5)]
    assert [sample.image for sample in samples] == [b"picture 1", b"picture 0", b"picture 2"]
    assert [sample.captions for sample in samples] == [("one", "one again"), ("nought",), ("two",)]
    assert [(sample.tags, sample.label) for sample in samples] == [(("x",), "A"), ((), "B"), ((), None)]
    assert [source.name(index) for index in range(len(source))] == [
        "row 1: images/1.jpg", "row 2: images/0.jpg", "row 4: images/2.jpg", "row 5", "row 7",
        "row 8: images/2.jpg"]  # fmt: skip
    for index, reason in ((2, "3 fields in the row"), (3, "missing image path"), (4, "missing image path")):
        with pytest.raises(BadSampleError, match=reason):
            source.read(index)
    assert ("2 of 8 rows repeat an image, which gets all captions; 1 have another label, and the first is kept"
            ) in caplog.text
    assert "6 images, 3 captioned" not in caplog.text  # nothing is left to guess: three rows cannot be used
    assert "3 left out (rows that cannot be read)" in caplog.text


def test_several_columns_of_captions_and_several_rows(folder: Path) -> None:
    (folder / "t.csv").write_text("image,a,b\nimages/1.jpg,one,ein\nimages/0.jpg,x,x\nimages/1.jpg,uno,one\n")
    source = pickle.loads(pickle.dumps(open_source(f"{folder / 't.csv'}?image=image&caption=a,b")))
    assert [source.read(index).captions for index in range(2)] == [("one", "ein", "uno"), ("x", "x")]


def test_a_path_above_a_linked_folder_is_another_picture(folder: Path) -> None:
    (folder / "far" / "deep").mkdir(parents=True)
    (folder / "far" / "0.jpg").write_bytes(b"far")
    (folder / "0.jpg").write_bytes(b"near")
    (folder / "link").symlink_to(folder / "far" / "deep")
    source = open_text(folder, "image,caption\n0.jpg,near\nlink/../0.jpg,far\nlink/../0.jpg,remote\n")
    assert [(source.read(index).image, source.read(index).captions) for index in range(len(source))] == [
        (b"near", ("near",)), (b"far", ("far", "remote"))]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pictures=st.lists(st.integers(0, 9), min_size=1, max_size=30))
def test_merging_is_that_of_a_dictionary(folder: Path, pictures: list[int]) -> None:
    expected: dict[str, list[str]] = {}
    for row, picture in enumerate(pictures):
        expected.setdefault(f"images/{picture}.jpg", []).append(f"caption {row // 2}")
    text = "".join(f"images/{picture}.jpg,caption {row // 2}\n" for row, picture in enumerate(pictures))
    (folder / "images" / f"{pictures[0]}.jpg").touch()
    source = open_text(folder, f"image,caption\n{text}")
    assert [source.name(index).partition(": ")[2] for index in range(len(source))] == list(expected)
    assert [source.captions(index) for index in range(len(source))] == [
        tuple(dict.fromkeys(captions)) for captions in expected.values()]


def test_tables_without_rows_or_header(folder: Path) -> None:
    with pytest.raises(DataError, match="holds no rows"):
        open_text(folder, "image,caption\n")
    with pytest.raises(DataError, match="holds no rows"):
        open_text(folder, "")


def test_a_quote_that_never_ends_is_taken_literally(folder: Path) -> None:
    source = open_text(folder, 'image,caption\nimages/0.jpg,"' + "never closed\n" * 20_000 + "images/1.jpg,after\n")
    assert source.captions(0) == ('"never closed',)
    assert source.read(len(source) - 1).captions == ("after",)


@pytest.mark.parametrize("mark", ["\r", "\u2028", "\x85", "\x0c"])
def test_a_row_ends_with_its_line(folder: Path, mark: str) -> None:
    source = open_text(folder, f'{mark}image,caption\n"images/0.jpg",before{mark}after\nimages/1.jpg,"one"{mark}\n')
    assert [" ".join(source.captions(index)[0].split()) for index in range(2)] == ["before after", "one"]


def test_a_quote_that_would_swallow_rows_is_taken_literally(folder: Path) -> None:
    source = open_text(folder, 'image\tcaption\nimages/0.jpg\tok\nimages/1.jpg\t"Hi, he said\nimages/2.jpg\tkept\n'
                               'images/3.jpg\t"So\n')  # fmt: skip
    assert [source.captions(n) for n in range(4)] == [("ok",), ('"Hi, he said',), ("kept",), ('"So',)]


FIELD = st.text(
    st.characters(exclude_categories=("Cs",), exclude_characters="\0"), max_size=20
).map(lambda text: text.strip().replace("\r\n", "\n"))  # a row's line ends are not told apart


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(captions=["0\n0", "a\u2028b", "a\rb"], delimiter=",")
@given(captions=st.lists(FIELD, min_size=1, max_size=6), delimiter=st.sampled_from(",;\t|"))
def test_quoting_comes_back(folder: Path, captions: list[str], delimiter: str) -> None:
    path = folder / "quoted.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerow(["image", "caption"])
        writer.writerows([f"images/{number}.jpg", caption] for number, caption in enumerate(captions))
    source = pickle.loads(pickle.dumps(open_source(str(path))))
    assert [source.read(n).captions for n in range(len(source))] == [(caption,) for caption in captions]
