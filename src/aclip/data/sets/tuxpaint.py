"""The set `tuxpaint`: 934 stamps of the drawing program Tux Paint, each with a sentence in English.

A stamp is one thing cut out of its background, so its alpha channel says which pixels are the thing: ground truth for
what a model should look at. The images are RGBA with straight alpha, padded to a square by transparent pixels and never
rescaled. Vector drawings are rendered at 256 pixels; 16 that state no size that the renderer understands are left out.

A stamp has the label `photo` if there is no vector drawing of it, it lies neither below `symbols` nor in a folder
`cartoon`, and its opaque pixels, 1,000 or more, have at least half as many distinct colours (259 stamps, of which fewer
than ten are drawings by eye; about a hundred photos are missed), else `drawing`. There is one split, `all`.
"""

import io
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
from PIL import Image

from aclip.data.sets.base import DataSet, Entries, Files
from aclip.data.sets.drawings import render
from aclip.data.sets.packages import Package, read_debian
from aclip.data.sources.base import RawSample, Source
from aclip.errors import BadSampleError

DRAWING_PIXELS = 256
PHOTO_PIXELS = 1000
PHOTO_COLOURS = 0.5

PACKAGE = Package(
    "tuxpaint-stamps-default", "2022.06.04-1", "6db6c1bfc870a47f1499d6203b083522eacb57c5f9c87d468f2e92eb6d9d5f34",
    160_880_444, client="apt")

_STAMPS = PurePosixPath("usr/share/tuxpaint/stamps")
_COPYRIGHT = "usr/share/doc/tuxpaint-stamps-default/copyright"
_EMBEDDED = re.compile(r"<image\b[^>]*?(/>|>.*?</image>)", re.DOTALL)


class Stamp(NamedTuple):
    """A stamp: its place below the folder of all stamps, and its PNG or else its SVG file."""

    path: PurePosixPath
    png: bytes | None
    svg: bytes | None


def _finish(sample: RawSample, stamp: Stamp) -> RawSample:
    """Return a sample with a PNG of its stamp, centred in a transparent square, and the label its pixels decide."""
    try:
        file = stamp.png if stamp.png is not None else _render(stamp.svg or b"")
        image = Image.open(io.BytesIO(file), formats=["PNG"]).convert("RGBA")
    except (OSError, SyntaxError, ValueError) as error:
        raise BadSampleError(f"damaged PNG: {error}") from None
    square = Image.new("RGBA", (max(image.size),) * 2, (255, 255, 255, 0))
    square.paste(image, ((square.width - image.width) // 2, (square.height - image.height) // 2))
    png = io.BytesIO()
    square.save(png, "PNG")
    drawn = stamp.svg is not None or stamp.path.parts[0] == "symbols" or "cartoon" in stamp.path.parts
    return replace(sample, image=png.getvalue(), label="drawing" if drawn or not _is_colourful(image) else "photo")


def _render(svg: bytes) -> bytes:
    document = _EMBEDDED.sub("", svg.decode("utf-8", errors="replace"))  # one drawing has bitmaps in it
    png = render(document, width=DRAWING_PIXELS)
    too_high = int.from_bytes(png[20:24], "big") > DRAWING_PIXELS  # the height in a PNG's first chunk
    return render(document, height=DRAWING_PIXELS) if too_high else png


def _is_colourful(image: Image.Image) -> bool:
    pixels = np.asarray(image).reshape(-1, 4)
    opaque = pixels[pixels[:, 3] == 255]
    colours = len(np.unique(opaque.view(np.uint32)))  # the four channels as one number
    return len(opaque) >= PHOTO_PIXELS and colours >= PHOTO_COLOURS * len(opaque)


def open_tuxpaint(files: Files) -> dict[str, Source]:
    """Return the source of the split `all`."""
    return {"all": Entries("tuxpaint:all", read_stamps(files[PACKAGE.name]), _finish)}


def read_stamps(path: Path) -> Iterator[tuple[RawSample, Stamp]]:
    """Yield the stamps of a package that have a sentence."""
    files = read_debian(path, lambda name: name.endswith((".png", ".svg", ".txt")) and "/stamps/" in name)
    for file, text in files.items():
        stem = file.removesuffix(".txt")
        png, svg = files.get(f"{stem}.png"), files.get(f"{stem}.svg")
        if stem != file and (png or svg):
            place = PurePosixPath(stem).relative_to(_STAMPS)
            # English first, then a line for each translation.
            lines = [line for line in text.decode("utf-8-sig", errors="replace").splitlines() if line.strip()]
            name = str(place).replace("/", "--").replace(".", "_")
            yield RawSample(name, b"", tuple(lines[:1])), Stamp(place, png, svg)


def licences(files: Files) -> dict[str, bytes]:
    """Return the package's copyright file."""
    return {"copyright": read_debian(files[PACKAGE.name], lambda name: name == _COPYRIGHT)[_COPYRIGHT]}


TUXPAINT = DataSet(
    "tuxpaint",
    "934 stamps with sentences and object masks (alpha), 259 of them photos; 161 MB to download, with apt",
    "GPL-2.0-or-later",
    (PACKAGE,), open_tuxpaint, licences, drawn=True,
)
