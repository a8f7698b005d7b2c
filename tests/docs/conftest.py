"""A folder with what the pages and the docstrings name."""

import csv
import shutil
from pathlib import Path

import pytest

import aclip
from made_pictures import picture


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures, tables, runs, an index; copy it before you write into it."""
    folder = tmp_path_factory.mktemp("workspace")
    photos = folder / "photos"
    photos.mkdir()
    rows = []
    for number in range(12):
        for ending in ("png", "jpg"):
            picture(number, side=40).save(photos / f"{number:02}.{ending}")
            (photos / f"{number:02}.txt").write_text(f"noise number {number}\n")
        rows.append((f"photos/{number:02}.png", f"noise number {number}"))
    for name in ("pairs", "held-out", "more", "shuffled", "before", "new-held-out"):
        with (folder / f"{name}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("filepath", "caption"), *rows])
    shutil.copy(photos / "00.jpg", folder / "street.jpg")
    for name in ("cat", "dog"):
        shutil.copy(photos / "00.png", folder / f"{name}.png")
    (folder / "names.txt").write_text("".join(f"{caption}\n" for _, caption in rows))
    aclip.train(recipe="a-clip", model="vit-micro", data=str(folder / "pairs.csv"), epochs=1, batch_size=4, workers=0,
                validation=f"held-out={folder / 'held-out.csv'}", output=str(folder / "runs" / "first"))
    for name in ("fine", "mine", "b16", "demo", "seed0", "seed1", "seed2"):
        shutil.copytree(folder / "runs" / "first", folder / "runs" / name)
    aclip.index(str(folder / "runs" / "first"), str(photos), output=folder / "photos.index", workers=0)
    shutil.copytree(folder / "photos.index", folder / "runs" / "first" / "index")
    return folder
