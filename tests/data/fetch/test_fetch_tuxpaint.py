"""The set `tuxpaint` on a small made-up package: pictures, masks, captions, labels."""

import csv
import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from made_packs import Interrupting, Shelf, samples, tree
from PIL import Image

from aclip.data.decode import decode_image
from aclip.data.fetch import tuxpaint
from aclip.data.fetch.progress import Silent
from aclip.data.fetch.tuxpaint import PACKAGE, TuxPaint
from aclip.errors import DataError, MissingDependencyError

pytest.importorskip("resvg_py")

FROG = "A green frög.\nde.utf8=Ein Frosch.\nfr.utf8=Une grenouille.\n".encode()
SVG = b"""<?xml version="1.0"?>
<svg xmlns="http://www.w3.org/2000/svg" xmlns:made="http://made.example" width="20" height="40" made:path="C:\\art">
<metadata><made:work/></metadata><made:view/><text>depends on fonts</text><image href="/etc/hostname"/>
<switch><foreignObject/><g><rect width="20" height="40" fill="#f00"/></g></switch></svg>"""


def png(array: np.ndarray, mode: str = "RGBA") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array, mode="RGBA").convert(mode).save(buffer, "PNG")
    return buffer.getvalue()


def noise(width: int, height: int, colours: int = 256) -> np.ndarray:
    """Return a picture of random colours whose left half is transparent."""
    picture = np.random.default_rng(1).integers(colours, size=(height, width, 4), dtype=np.uint8)
    picture[..., 3] = 255
    picture[:, : width // 2, 3] = 0
    return picture


def stamps(files: dict[str, bytes]) -> dict[str, bytes]:
    folder = "usr/share/tuxpaint/stamps"
    return {"usr/share/doc/tuxpaint-stamps-default/copyright": b"GPL", **{f"{folder}/{k}": v for k, v in files.items()}}


FILES = {
    "animals/frog.png": png(noise(80, 60)),
    "animals/frog.txt": FROG,
    "animals/frog.dat": b"noflip",
    "animals/frog_desc_de.ogg": b"sound",
    "animals/frog_mirror.png": png(noise(80, 60)),  # no sentence of its own
    "animals/cartoon/frog.png": png(noise(80, 60)),
    "animals/cartoon/frog.txt": b"A frog.",
    "symbols/coin.png": png(noise(80, 60)),
    "symbols/coin.txt": b"A coin.",
    "food/flat.png": png(noise(80, 60, colours=2)),
    "food/flat.txt": b"A flat drawing.",
    "food/small.png": png(noise(20, 20)),
    "food/small.txt": b"Something small.",
    "food/v1.2.svg": SVG,
    "food/v1.2.txt": b"A bar.",
    "food/both.svg": SVG,
    "food/both.png": png(noise(80, 60), "LA"),
    "food/both.txt": b"Both.",
    "food/points.svg": SVG.replace(b'width="20" height="40"', b'width="20pt" height="40pt"'),
    "food/points.txt": b"In points, without a viewBox.",
    "food/broken.png": png(noise(80, 60))[:200],
    "food/broken.txt": b"Broken.",
}


@pytest.fixture
def small(shelf: Shelf) -> TuxPaint:
    return TuxPaint(shelf.put_debian("stamps", "1", stamps(FILES)))


def test_the_set_is_pinned() -> None:
    assert PACKAGE.spec == "tuxpaint-stamps-default=2022.06.04-1"
    assert len(bytes.fromhex(PACKAGE.sha256)) == 32


def test_a_stamp_has_its_english_sentence_its_folder_and_a_label(small: TuxPaint, tmp_path: Path) -> None:
    found = {key: facts for key, (facts, _) in samples(small.fetch(tmp_path, Silent()), "all").items()}
    licence = "GPL-2.0-or-later"
    assert found["animals--frog"] == {
        "caption": "A green frög.", "label": "photo", "category": "animals", "licence": licence
    }  # fmt: skip
    labels = {key: facts["label"] for key, facts in found.items()}
    assert labels == {
        "animals--frog": "photo",
        "animals--cartoon--frog": "drawing",
        "symbols--coin": "drawing",
        "food--flat": "drawing",  # 16 colours
        "food--small": "drawing",  # 200 opaque pixels
        "food--v1_2": "drawing",
        "food--both": "drawing",
    }
    assert found["animals--cartoon--frog"]["category"] == "animals/cartoon"


def test_the_alpha_channel_is_kept_in_a_square(small: TuxPaint, tmp_path: Path) -> None:
    _, picture = samples(small.fetch(tmp_path, Silent()), "all")["animals--frog"]
    image = Image.open(io.BytesIO(picture))
    assert (image.mode, image.size) == ("RGBA", (80, 80))
    original, stored = noise(80, 60), np.asarray(image)
    np.testing.assert_array_equal(stored[10:70, 40:], original[:, 40:])
    mask = stored[..., 3] == 255
    assert mask.sum() == 60 * 40
    assert mask[10:70, 40:].all()
    white = np.asarray(decode_image(picture))
    np.testing.assert_array_equal(white[~mask], 255)
    np.testing.assert_array_equal(white[mask], original[:, 40:, :3].reshape(-1, 3))


def test_grey_with_alpha_becomes_rgba(small: TuxPaint, tmp_path: Path) -> None:
    _, picture = samples(small.fetch(tmp_path, Silent()), "all")["food--both"]
    image = np.asarray(Image.open(io.BytesIO(picture)))
    assert image.shape == (80, 80, 4)
    assert set(np.unique(image[..., 3])) == {0, 255}


def test_a_vector_drawing_is_drawn_without_what_reaches_outside(small: TuxPaint, tmp_path: Path) -> None:
    _, picture = samples(small.fetch(tmp_path, Silent()), "all")["food--v1_2"]
    image = np.asarray(Image.open(io.BytesIO(picture)))
    assert image.shape == (256, 256, 4)
    bar = image[:, 64:192]
    assert (bar == [255, 0, 0, 255]).all()
    assert (image[..., 3] == 0).sum() == 256 * 128


def test_what_cannot_be_drawn_is_skipped_and_named(small: TuxPaint, tmp_path: Path) -> None:
    facts = json.loads((small.fetch(tmp_path, Silent()) / "dataset.json").read_bytes())
    assert facts["splits"] == {"all": {"samples": 7, "captions": 7}}
    assert set(facts["skipped"]) == {"food--points", "food--broken"}
    assert "damaged PNG" in facts["skipped"]["food--broken"]
    assert "invalid size" in facts["skipped"]["food--points"]


def test_the_licence_is_kept(small: TuxPaint, tmp_path: Path) -> None:
    licences = small.fetch(tmp_path, Silent()) / "licences"
    assert (licences / "copyright").read_bytes() == b"GPL"
    with (licences / "licences.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert (row["package"], row["version"], row["licence"]) == ("stamps", "1", "GPL-2.0-or-later")


def test_an_interrupted_fetch_continues_to_the_same_bytes(
    small: TuxPaint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuxpaint, "SAMPLES_PER_SHARD", 3)
    whole = tree(small.fetch(tmp_path / "whole", Silent()))
    for unit, at in (("bytes", 1), ("pictures", 1), ("pictures", 4), ("pictures", 9)):
        with pytest.raises(KeyboardInterrupt):
            small.fetch(tmp_path / "cut", Interrupting(unit, at))
        assert not (tmp_path / "cut/tuxpaint/dataset.json").exists()
    assert tree(small.fetch(tmp_path / "cut", Silent())) == whole


def test_a_finished_set_needs_neither_apt_nor_renderer(
    small: TuxPaint, shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = small.fetch(tmp_path, Silent())
    before = tree(folder)
    (shelf.bin / "apt-get").unlink()
    (tmp_path / "packages" / small.package.filename).unlink()
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    small.fetch(tmp_path, Silent())
    assert tree(folder) == before


@pytest.mark.usefixtures("shelf")
def test_a_missing_renderer_is_said_before_the_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    with pytest.raises(MissingDependencyError, match="resvg-py"):
        TuxPaint().fetch(tmp_path, Silent())


def test_another_package_is_named(shelf: Shelf, tmp_path: Path) -> None:
    package = shelf.put_debian("else", "1", {"usr/bin/else": b""})
    with pytest.raises(DataError, match=r"else_1_all\.deb has no usr/share/doc/.*/copyright"):
        TuxPaint(package).fetch(tmp_path, Silent())
