"""Fixtures of the tests of data sets: nothing here reaches a network."""

from pathlib import Path

import pytest
from synthetic_packages import Shelf


@pytest.fixture
def shelf(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Shelf:
    """A shelf whose clients are the only programs on the PATH."""
    shelf = Shelf(tmp_path_factory.mktemp("registry"))
    monkeypatch.setenv("PATH", str(shelf.bin))
    return shelf


@pytest.fixture(autouse=True)
def _own_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACLIP_DATA", str(tmp_path / "data"))
