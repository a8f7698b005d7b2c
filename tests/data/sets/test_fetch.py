"""Fetching by name: once, resumed, whole; and what `NAME:SPLIT` means."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from synthetic_packages import Shelf, tree

from aclip.data import sets
from aclip.data.sets import SETS, DataSet, fetch, list_sets
from aclip.data.sets.base import Entries, shuffle_key, unit_hash
from aclip.data.sources.base import RawSample
from aclip.data.spec import locate
from aclip.errors import BadSampleError, ConfigError, DataError, MissingDependencyError
from made_pictures import encode, picture


def finished(sample: RawSample, number: int) -> RawSample:
    if number == 3:
        raise BadSampleError("no image")
    return replace(sample, image=encode(picture(number)))


def entry(number: int) -> tuple[RawSample, int]:
    return RawSample(f"n-{number}", b"", (f"number {number}",), ("digit",), "n", "c"), number


@pytest.fixture
def mine(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> DataSet:
    """A set of a user: ten samples, one of them bad, and a split of one."""
    package = shelf.put("words", {"words.json": ["alpha", "beta"]})

    def open_mine(files: sets.base.Files) -> dict[str, Entries]:
        assert list(files) == ["words"]
        entries = [entry(number) for number in range(10)]
        return {"train": Entries("mine:train", entries, finished), "test": Entries("mine:test", entries[:1], finished)}

    def licences(_: sets.base.Files) -> dict[str, bytes]:
        return {"words/LICENSE": b"MIT"}

    monkeypatch.setitem(
        SETS, "mine", DataSet("mine", "ten numbers", "MIT", (package,), open_mine, licences, shard_size=4))
    return SETS["mine"]


def test_hashes_are_those_of_the_definition() -> None:
    assert unit_hash("concept1f607") < 0.1 < unit_hash("concept1f600")  # by sha1sum
    assert unit_hash("abc") == 0xA9993E36 / 2**32
    assert shuffle_key("x") == (unit_hash("orderx"), "x")


def test_a_set_is_fetched_as_shards(mine: DataSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = fetch("mine", workers=0)
    assert folder == tmp_path / "data" / "mine"
    assert "mine is ready in " in capsys.readouterr().out
    assert sorted(path.name for path in (folder / "train").glob("*.tar")) == ["000000.tar", "000001.tar", "000002.tar"]
    assert json.loads((folder / "dataset.json").read_text())["splits"] == {
        "train": {"samples": 9}, "test": {"samples": 1}}
    assert (folder / "licences/words/LICENSE").read_bytes() == b"MIT"


def test_a_finished_set_is_kept(mine: DataSet, shelf: Shelf, tmp_path: Path) -> None:
    folder = fetch("mine", workers=0)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    (tmp_path / "data/packages/words-1.0.0.tgz").unlink()
    assert fetch("mine") == folder
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    assert len(shelf.calls) == 1


def test_an_interrupted_fetch_continues_to_the_same_bytes(
    mine: DataSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tree(fetch("mine", folder=str(tmp_path / "whole"), workers=0))
    real, left = Entries.read, 7

    def interrupted(self: Entries, index: int) -> object:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        return real(self, index)

    with monkeypatch.context() as patched:
        patched.setattr(Entries, "read", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fetch("mine", folder=str(tmp_path / "cut"), workers=0)
    first = tmp_path / "cut/mine/train/000000.tar"
    written = first.stat().st_mtime_ns
    assert not (tmp_path / "cut/mine/dataset.json").exists()
    assert tree(fetch("mine", folder=str(tmp_path / "cut"), workers=0)) == whole
    assert first.stat().st_mtime_ns == written


def test_a_missing_shard_is_written_again(mine: DataSet) -> None:
    folder = fetch("mine", workers=0)
    whole = tree(folder)
    (folder / "train/000001.tar").unlink()
    assert tree(fetch("mine", workers=0)) == whole


def test_other_packages_replace_the_set(mine: DataSet, shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = fetch("mine", workers=0)
    package = shelf.put("words", {"words.json": ["gamma"]})
    monkeypatch.setitem(SETS, "mine", replace(mine, packages=(package,), shard_size=100))
    fetch("mine", workers=0)
    assert [path.name for path in (folder / "train").glob("*.tar")] == ["000000.tar"]
    assert package.sha256 in (folder / "dataset.json").read_text()


def test_what_is_missing_is_said_before_the_download(
    mine: DataSet, shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SETS, "mine", replace(mine, drawn=True))
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    with pytest.raises(MissingDependencyError, match="resvg-py"):
        fetch("mine")
    assert shelf.calls == []


def test_packages_of_another_content_are_an_error(mine: DataSet, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(_: sets.base.Files) -> dict[str, Entries]:
        return {}["icons"]

    monkeypatch.setitem(SETS, "mine", replace(mine, open=failing))
    with pytest.raises(DataError, match=r"'mine' do not have the expected content: KeyError\('icons'\)"):
        fetch("mine")


def test_errors_name_the_set_and_the_folder(mine: DataSet, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'emojis': did you mean 'emoji'\? There are: cifar10, emoji, icons, mine"):
        fetch("emojis")
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"'mine' cannot be written below .*file: Not a directory"):
        fetch("mine", folder=str(tmp_path / "file"))


def test_a_split_stands_for_its_folder(mine: DataSet, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="fetch it with `aclip data fetch mine`"):
        locate("mine:train")
    fetch("mine", workers=0)
    assert locate("mine:train") == str(tmp_path / "data/mine/train")
    for wrong in ("mine:vall", "mine", "mine:"):
        with pytest.raises(DataError, match=f"'{wrong}' names no split .* there are mine:train, mine:test"):
            locate(wrong)
    with pytest.raises(DataError, match=r"'pairs\.csv' does not exist"):
        locate("pairs.csv")
    assert locate("s3://bucket/{00..12}.tar") == "s3://bucket/{00..12}.tar"


def test_sets_are_listed_with_what_is_here(mine: DataSet, capsys: pytest.CaptureFixture[str]) -> None:
    fetch("mine", workers=0)
    assert list_sets() == {name: {"train": 9, "test": 1} if name == "mine" else {} for name in SETS}
    out = capsys.readouterr().out
    assert all(name in out for name in SETS)


def test_entries_are_shuffled_by_their_names() -> None:
    source = Entries("s", [entry(number) for number in range(20)], finished)
    names = [source.name(index) for index in range(20)]
    assert names == sorted(names, key=shuffle_key)
    assert sorted(names) == sorted(f"n-{number}" for number in range(20))
