"""Where the images of a list lie, when they do not lie where it says."""

from pathlib import Path

import pytest

from aclip.data import open_source
from aclip.errors import BadSampleError, DataError


def read(root: Path, files: list[str], cells: list[str], at: str = "list.csv", query: str = "") -> list[str | None]:
    """Return the file that each cell of a list gives; every file holds its own name, None stands for a bad sample."""
    for name in files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    (root / at).parent.mkdir(exist_ok=True)
    rows = (f"{cell.replace('ROOT', str(root))},caption {number}\n" for number, cell in enumerate(cells))
    (root / at).write_text("image,caption\n" + "".join(rows))
    source = open_source(f"{root / at}{query.replace('ROOT', str(root))}")
    found: list[str | None] = []
    for index in range(len(source)):
        try:
            found.append(source.read(index).image.decode())
        except BadSampleError:
            found.append(None)
    return found


TEN = [f"i/{number}.jpg" for number in range(10)]


@pytest.mark.parametrize(("files", "cells", "at", "query"), [
    (["images/a.JPG", "images/b.JPG"], ["images/a.jpg", "images/b.jpg"], "list.csv", ""),
    (["images/a.png", "images/b.png"], ["./images/a.jpg", "./images/b.jpg"], "list.csv", ""),
    ([*TEN[:8], "i/8.png", "i/9.png"], TEN, "list.csv", ""),
    (["photos/x/0.webp", "photos/y/0.webp"], [r"C:\data\photos\x\0.webp", r"C:\data\photos\y\0.webp"], "list.csv", ""),
    (["photos/x/0.webp", "photos/y/0.webp"], [r"C:\data\\photos\x\0.jpg", r"C:\data\\photos\y\0.jpg"], "list.csv", ""),
    (["k/z/x/0.jpg", "k/z/y/0.jpg"], ["/home/a/x/0.jpg", "/home/a/y/0.jpg"], "list.csv", ""),
    (["images/train/1.jpg", "images/train/2.jpg"], ["1", "2"], "annotations/c.csv", ""),
    (["images/1.jpg", "pictures/2.jpg"], ["1.jpg", "2.jpg"], "lists/c.csv", ""),
    (["my images/0.jpg", "my images/1.jpg"], ["file://ROOT/my%20images/0.jpg", "file://ROOT/my%20images/1.jpg"],
     "list.csv", ""),
    (["a b.jpg", "c d.jpg"], ["a%20b.jpg", "c%20d.jpg"], "list.csv", ""),
    (["x/0007.png", "x/y_0042.png"], ["7", "42"], "list.csv", ""),
    (["x/7.png", "x/42.png"], ["7.0", "42.0"], "list.csv", ""),
    (["a.jpg.jpg", "b.jpg.jpg"], ["a.jpg", "b.jpg"], "list.csv", ""),
    (["far/deep/a1.png", "far/deep/b2.png"], ["a1", "b2"], "list.csv", "?images=ROOT/far"),
    (["train/1.jpg", "train/2.jpg"], ["1", "2"], "train.csv", ""),
    (["x/IMG_0001.JPG", "x/IMG_0002.JPG"], ["img_0001.jpg", "img_0002.jpg"], "list.csv", ""),
])  # fmt: skip
def test_images_are_found(tmp_path: Path, files: list[str], cells: list[str], at: str, query: str) -> None:
    root = tmp_path / "disk"
    root.mkdir()
    (root / "test").mkdir()
    (root / "test/1.jpg").write_text("of another split")
    assert read(root, files, cells, at, query) == files


def test_missing_images_stay_missing(tmp_path: Path) -> None:
    cells = [f"{number}.jpg" for number in range(10)]
    found = read(tmp_path, ["images/1.jpg", "images/2.jpg"], cells)
    assert found == [None, "images/1.jpg", "images/2.jpg", *[None] * 7]
    others = [f"none/{number}.jpg" for number in range(20, 40)]
    with pytest.raises(DataError, match="21 were looked for"):  # one name in another list's folder
        read(tmp_path, ["images/1.jpg"], ["none/1.jpg", *others], "lists/c.csv")
