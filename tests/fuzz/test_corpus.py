"""Inputs that once broke a reader; found by `readers.py` beside this file."""

from itertools import islice
from pathlib import Path

import pytest
from readers import CORPUS, Checker, mutations, read_everything, seeds

ENDINGS = ("tar", "csv", "jsonl", "json", "parquet", "arrow")


@pytest.mark.parametrize("path", sorted(CORPUS.glob("*.*")), ids=lambda path: path.name)
def test_what_once_broke_a_reader(path: Path) -> None:
    read_everything(path)


@pytest.mark.parametrize("ending", ENDINGS)
def test_good_files_and_some_changes_of_them(tmp_path: Path, ending: str, capsys: pytest.CaptureFixture[str]) -> None:
    good = seeds(ending)
    check = Checker(tmp_path, ending)
    for data in [*good, *islice(mutations(good, seed=1), 60)]:
        check(data)
    assert check.tried == len(good) + 60
    assert capsys.readouterr().out == ""
