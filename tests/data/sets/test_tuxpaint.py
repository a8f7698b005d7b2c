"""The set `tuxpaint` on a small synthetic package: images, masks, captions, labels."""

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from synthetic_packages import Shelf, samples

from aclip.data.decode import decode_image
from aclip.data.sets import SETS, fetch
from aclip.data.sets.tuxpaint import PACKAGE

pytest.importorskip("resvg_py")

Found = dict[str, tuple[dict[str, object], bytes]]

FROG = "A green frög.\nde.utf8=Ein Frosch.\nfr.utf8=Une grenouille.\n".encode()
SVG = b"""<?xml version="1.0"?>
<svg xmlns="http://www.w3.org/2000/svg" xmlns:some="http://some.example" width="20" height="40" some:path="C:\\art">
<metadata><some:work/></metadata><some:view/><text>depends on fonts</text><image href="/etc/hostname"/>
<switch><foreignObject/><g><rect width="20" height="40" fill="#f00"/></g></switch></svg>"""


def png(array: np.ndarray, mode: str = "RGBA") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array, mode="RGBA").convert(mode).save(buffer, "PNG")
    return buffer.getvalue()


def noise(width: int, height: int, colours: int = 256) -> np.ndarray:
    """Return a picture of random colours whose left half is transparent."""
    pixels = np.random.default_rng(1).integers(colours, size=(height, width, 4), dtype=np.uint8)
    pixels[..., 3] = 255
    pixels[:, : width // 2, 3] = 0
    return pixels


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
def folder(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> Path:
    package = shelf.put(PACKAGE.name, stamps(FILES), "apt")
    monkeypatch.setitem(SETS, "tuxpaint", replace(SETS["tuxpaint"], packages=(package,)))
    return fetch("tuxpaint", workers=0)


@pytest.fixture
def found(folder: Path) -> Found:
    return samples(folder, "all")


def test_the_set_is_pinned() -> None:
    assert PACKAGE.spec == "tuxpaint-stamps-default=2022.06.04-1"


def test_every_stamp_with_a_sentence_is_a_sample(found: Found) -> None:
    assert {key: (fields["captions"], fields["label"]) for key, (fields, _) in found.items()} == {
        "animals--frog": (["A green frög."], "photo"),
        "animals--cartoon--frog": (["A frog."], "drawing"),
        "symbols--coin": (["A coin."], "drawing"),
        "food--flat": (["A flat drawing."], "drawing"),
        "food--small": (["Something small."], "drawing"),
        "food--v1_2": (["A bar."], "drawing"),
        "food--both": (["Both."], "drawing"),
    }


def test_the_alpha_channel_is_kept_in_a_square(found: Found) -> None:
    _, png_file = found["animals--frog"]
    image = Image.open(io.BytesIO(png_file))
    assert (image.mode, image.size) == ("RGBA", (80, 80))
    original, stored = noise(80, 60), np.asarray(image)
    np.testing.assert_array_equal(stored[10:70, 40:], original[:, 40:])
    mask = stored[..., 3] == 255
    assert mask.sum() == 60 * 40
    assert mask[10:70, 40:].all()
    white = np.asarray(decode_image(png_file))
    np.testing.assert_array_equal(white[~mask], 255)
    np.testing.assert_array_equal(white[mask], original[:, 40:, :3].reshape(-1, 3))


def test_grey_with_alpha_becomes_rgba(found: Found) -> None:
    _, png_file = found["food--both"]
    image = np.asarray(Image.open(io.BytesIO(png_file)))
    assert image.shape == (80, 80, 4)
    assert set(np.unique(image[..., 3])) == {0, 255}


def test_a_vector_drawing_is_rendered(found: Found) -> None:
    _, png_file = found["food--v1_2"]
    image = np.asarray(Image.open(io.BytesIO(png_file)))
    assert image.shape == (256, 256, 4)
    bar = image[:, 64:192]
    assert (bar == [255, 0, 0, 255]).all()
    assert (image[..., 3] == 0).sum() == 256 * 128


def test_what_cannot_be_drawn_is_skipped_and_named(folder: Path) -> None:
    lines = map(json.loads, (folder / "all/skipped.jsonl").read_text().splitlines())
    reasons = {line["key"]: line["reason"] for line in lines}
    assert set(reasons) == {"food--points", "food--broken"}
    assert "damaged PNG" in reasons["food--broken"]
    assert "invalid size" in reasons["food--points"]


def test_the_licence_is_kept(folder: Path) -> None:
    assert (folder / "licences/copyright").read_bytes() == b"GPL"
