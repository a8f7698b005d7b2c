"""What users write: every part of it, and names that look like it."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aclip.data.spec import Spec, absolute, expand_braces, expand_paths, parse_spec, split_name
from aclip.errors import ConfigError, DataError


@pytest.mark.parametrize(("text", "expected"), [
    ("a.csv", Spec("a.csv", "a.csv")),
    ("a.csv?image=file&caption=title,text[:10]=2",
     Spec("", "a.csv", {"image": "file", "caption": "title,text"}, (0, 10), 2.0)),
    ("emoji:train[5:]", Spec("", "emoji:train", {}, (5, None))),
    ("a.csv[2:][1:3]", Spec("", "a.csv", {}, (3, 5))),
    ("a.csv[2:4][1:9]", Spec("", "a.csv", {}, (3, 4))),
    ("s3://b/{0000..0009}.tar=.5", Spec("", "s3://b/{0000..0009}.tar", {}, None, 0.5)),
    ("a?.csv", Spec("", "a?.csv")),
    ("a.csv?image=2", Spec("", "a.csv", {"image": "2"})),
    ("a.csv?caption=Q&A text&image=R&D", Spec("", "a.csv", {"caption": "Q&A text", "image": "R&D"})),
    ("a.csv?images=C++ shots #1", Spec("", "a.csv", {"images": "C++ shots #1"})),
    ("d?templates=what = this? {}|a+b", Spec("", "d", {"templates": "what = this? {}|a+b"})),
])  # fmt: skip
def test_parts_of_a_specification(text: str, expected: Spec) -> None:
    parsed = parse_spec(text)
    assert (parsed.path, dict(parsed.options), parsed.part, parsed.weight) == (
        expected.path, dict(expected.options), expected.part, expected.weight)


@pytest.mark.parametrize(("text", "message"), [
    ("a.csv?colour=x", "unknown option 'colour'.*write %26 for an &"),
    ("a.csv?image=a&captoin=b", "unknown option 'captoin': did you mean 'caption'"),
    ("a.csv?image=", "the option 'image' is empty"),
    ("a.csv=0", "must be a positive number, not 0"),
    ("a.csv[-1:]", "takes no negative numbers"),
    ("a.csv[:3]?image=x&caption=y", r"comes after the options, as in 'a.csv\?image=x&caption=y\[:3\]'"),
    ("{0..99999999}.tar", "expands to more than 1,000,000 files"),
])  # fmt: skip
def test_what_makes_no_sense_is_said(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        list(expand_braces(parse_spec(text).path))


@pytest.mark.parametrize("name", ["year=2020", "a[1:2]", "what?image=x", "50%26", "{a,b}", "emoji:train",
                                  "a=b?split=c[:3]=2"])
def test_a_path_that_exists_is_that_path(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    for text in (name, f"{tmp_path}/{name}"):
        assert parse_spec(text) == Spec(text, text)
        assert expand_paths(text) == [Path(text)]
        parsed = parse_spec(f"{text}?split=train[:7]=3")
        assert (parsed.path, parsed.options, parsed.part, parsed.weight) == (text, {"split": "train"}, (0, 7), 3.0)


@given(st.text(st.sampled_from("abc=?&[]:+%#1{}., "), min_size=1, max_size=12))
def test_any_text_is_parsed_or_refused(text: str) -> None:
    try:
        parsed = parse_spec(text)
    except ConfigError:
        return
    assert parsed.text == text


def test_folders_of_options_win_over_weights(tmp_path: Path) -> None:
    (tmp_path / "year=2024").mkdir()
    (tmp_path / "a b").mkdir()
    spec = parse_spec(f"a.csv?images={tmp_path}/year=2024")
    assert (spec.weight, spec.folder("images")) == (None, tmp_path / "year=2024")
    assert parse_spec(f"a.csv?images={tmp_path}/a%20b").folder("images") == tmp_path / "a b"
    assert parse_spec(f"a.csv?images={tmp_path}/a b=4").weight == 4.0
    with pytest.raises(ConfigError, match=r"the folder '.*gone' of 'images=' does not exist"):
        parse_spec(f"a.csv?images={tmp_path}/gone").folder("images")
    assert parse_spec(f"{tmp_path}/a.csv?images=a b").folder("images") == tmp_path / "a b"  # beside the list


def test_names_of_sets_and_folders_with_equal_signs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "year=2020").mkdir()
    (tmp_path / "year=2020/part.parquet").touch()
    assert split_name("year=2020/part.parquet") == (None, "year=2020/part.parquet")
    assert split_name("year=2020/part.parquet[:5]") == (None, "year=2020/part.parquet[:5]")
    assert split_name("year=2020/*.parquet") == (None, "year=2020/*.parquet")
    assert split_name("val=year=2020/part.parquet") == ("val", "year=2020/part.parquet")
    assert split_name("val=emoji:val_both") == ("val", "emoji:val_both")


def test_files_of_patterns(tmp_path: Path) -> None:
    for name in ("00.tar", "01.tar", "02.tar"):
        (tmp_path / name).touch()
    assert [path.name for path in expand_paths(f"{tmp_path}/{{01..02}}.tar")] == ["01.tar", "02.tar"]
    assert [path.name for path in expand_paths(f"{tmp_path}/*.tar")] == ["00.tar", "01.tar", "02.tar"]
    with pytest.raises(DataError, match=r"no such file: .*03\.tar \(1 missing, 2 found"):
        expand_paths(f"{tmp_path}/{{01..03}}.tar")


def test_relative_paths_are_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    (tmp_path / "pairs.csv").touch()
    assert absolute("pairs.csv[:10]=2") == f"{tmp_path}/pairs.csv[:10]=2"
    assert absolute("val=pairs.csv?images=images") == f"val={tmp_path}/pairs.csv?images={tmp_path}/images"
    assert absolute("shards/{0..3}.tar") == f"{tmp_path}/shards/{{0..3}}.tar"
    for text in ("emoji:train", "s3://bucket/{0..3}.tar", "/elsewhere/pairs.csv", "missing.csv"):
        assert absolute(text) == text
