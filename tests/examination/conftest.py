"""Fixtures of the examination's tests."""

from pathlib import Path

import pytest

from made_pictures import encode, picture


@pytest.fixture
def pair_folder(tmp_path: Path) -> Path:
    """Forty good pairs; the caption of `007.png` is "picture 7"."""
    folder = tmp_path / "pairs"
    folder.mkdir()
    for number in range(40):
        (folder / f"{number:03}.png").write_bytes(encode(picture(number)))
        (folder / f"{number:03}.txt").write_text(f"picture {number}")
    return folder
