"""The table of data sets and what their names mean elsewhere."""

from pathlib import Path

import pytest

from aclip.data import fetch
from aclip.data.fetch import DATASETS, Progress, default_root, resolve_spec
from aclip.errors import ConfigError, DataError


class Made:
    """A set that is fetched by writing one file."""

    name = "made"
    about = "made up"
    licence = "MIT"

    def fetch(self, root: Path, progress: Progress) -> Path:
        progress.start("writing", 1, "pictures")
        progress.advance(1)
        folder = root / self.name
        folder.mkdir(parents=True)
        (folder / "dataset.json").write_text('{"splits": {"train": {"samples": 2}, "test": {"samples": 1}}}')
        return folder


@pytest.fixture(autouse=True)
def _with_made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(DATASETS, "made", Made())
    monkeypatch.setenv("ACLIP_DATA", str(tmp_path / "data"))


@pytest.mark.parametrize("name", DATASETS)
def test_every_set_says_what_it_is_in_a_line(name: str) -> None:
    one = DATASETS[name]
    assert one.name == name
    assert one.about
    assert one.licence
    assert "\n" not in one.about + one.licence


def test_fetch_goes_to_the_chosen_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert fetch.fetch("made") == tmp_path / "data" / "made"
    assert fetch.fetch("made", tmp_path / "else") == tmp_path / "else" / "made"
    monkeypatch.delenv("ACLIP_DATA")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_root() == tmp_path / ".cache" / "aclip" / "data"


def test_an_unknown_set_lists_those_there_are() -> None:
    with pytest.raises(ConfigError, match=r"'emojis': did you mean 'emoji'\? There are: cifar10, emoji, .*, made"):
        fetch.fetch("emojis")


def test_a_root_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"'made' cannot be written below .*file: Not a directory"):
        fetch.fetch("made", tmp_path / "file")


def test_a_split_of_a_fetched_set_is_a_source(tmp_path: Path) -> None:
    fetch.fetch("made")
    assert resolve_spec("made:train") == str(tmp_path / "data/made/train")


@pytest.mark.parametrize("spec", ["made:vall", "made", "made:"])
def test_a_split_that_does_not_exist_lists_the_others(spec: str) -> None:
    fetch.fetch("made")
    with pytest.raises(DataError, match=f"'{spec}' names no split .* there are made:train, made:test"):
        resolve_spec(spec)


def test_a_set_that_is_not_here_names_the_command() -> None:
    with pytest.raises(DataError, match="`aclip data fetch made` brings it"):
        resolve_spec("made:train")


def test_other_specifications_are_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_spec("pairs.csv") == "pairs.csv"
    assert resolve_spec("shards/{00..12}.tar") == "shards/{00..12}.tar"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "made").mkdir()
    assert resolve_spec("made") == "made"
