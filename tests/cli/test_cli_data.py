"""`aclip data`: listing and fetching."""

import argparse
from pathlib import Path

import pytest

from aclip.cli import data
from aclip.data.fetch import DATASETS, Progress
from aclip.errors import ConfigError


class Made:
    """A set of one file, with both kinds of stages."""

    name = "made"
    about = "made up for a test"
    licence = "MIT"

    def fetch(self, root: Path, progress: Progress) -> Path:
        progress.start("downloading", 2000, "bytes")
        progress.advance(500, cached=True)
        progress.advance(1500)
        progress.start("rendering", 3, "pictures")
        progress.advance(3)
        folder = root / self.name
        folder.mkdir(parents=True, exist_ok=True)
        splits = '{"train": {"samples": 1234}, "test": {"samples": 1}}'
        (folder / "dataset.json").write_text(f'{{"splits": {splits}}}')
        return folder


@pytest.fixture(autouse=True)
def _with_made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(DATASETS, "made", Made())
    monkeypatch.setenv("ACLIP_DATA", str(tmp_path / "default"))
    monkeypatch.setenv("COLUMNS", "200")


def run(*arguments: str) -> None:
    parser = argparse.ArgumentParser()
    data.register(parser.add_subparsers())
    args = parser.parse_args(["data", *arguments])
    args.run(args)


def test_fetch_ends_with_one_line_that_says_where(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("fetch", "made", "--root", str(tmp_path / "a [b]"))
    streams = capsys.readouterr()
    assert streams.out == f"made is ready in {tmp_path / 'a [b]' / 'made'} (train 1,234, test 1)\n"
    assert "downloading" in streams.err
    assert "2.0/2.0 kB" in streams.err
    assert "rendering" in streams.err
    assert "3/3" in streams.err


@pytest.mark.parametrize("arguments", [(), ("list",)])
def test_list_says_what_there_is_and_what_is_here(
    arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    run(*arguments)
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert lines["made"].rstrip().endswith("no")
    assert "made up for a test" in lines["made"]
    assert "CC-BY-SA-4.0" in lines["emoji"]
    run("fetch", "made")
    capsys.readouterr()
    run(*arguments)
    assert "train, test" in capsys.readouterr().out


def test_an_unknown_name_is_the_users_error() -> None:
    with pytest.raises(ConfigError, match="unknown data set 'mode': did you mean 'made'"):
        run("fetch", "mode")


def test_help_names_the_default_folder(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        run("fetch", "--help")
    assert left.value.code == 0
    out = capsys.readouterr().out
    assert "$ACLIP_DATA" in out
    assert "aclip data fetch emoji" in out
