"""The set `tuxpaint`: 934 stamps of the drawing program Tux Paint, each with a sentence in English.

A stamp is one thing cut out of its background, so its alpha channel says which pixels are the thing: ground truth for
what a model should look at. The pictures are stored as RGBA with straight alpha, padded to a square by transparent
pixels and never rescaled (19 to 2,348 pixels a side, half of them below 200); whoever decodes them as a picture sees
them on white. Stamps that come as a vector drawing alone are drawn at 256 pixels; 16 of those state no size that the
renderer understands and are left out.

The package does not say which stamps are photos. A stamp has the label `photo` by a rule of ours: there is no vector
drawing of it, it lies neither below `symbols` nor in a folder `cartoon`, and its opaque pixels, 1,000 or more, have
at least half as many distinct colours. By that rule 259 stamps are photos. Seen by eye, fewer than ten of these are
drawings, and about a hundred photos are missed: small, smooth or stored with few colours, and the coins, which lie
below `symbols`.

There is one split, `all`: the set is for evaluation. The folder holds `all/000000.tar` with `.png` and `.json`
(caption, label, category: the stamp's folder in the package), and `licences/`.
"""

import importlib.metadata
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image

from aclip.data.captions import caption_lines, decode_text
from aclip.data.fetch.debian import DebianPackage, read_files
from aclip.data.fetch.licences import Licence, write_licences
from aclip.data.fetch.packaged import PackagedSet
from aclip.data.fetch.packages import download
from aclip.data.fetch.progress import Progress
from aclip.data.fetch.render import ELEMENTS, render_document, require_renderer
from aclip.data.fetch.shards import ShardFolder, shuffled
from aclip.data.tar_files import Sample
from aclip.errors import BadSampleError, DataError

DRAWING_PIXELS = 256
SAMPLES_PER_SHARD = 1000
PHOTO_PIXELS = 1000
PHOTO_COLOURS = 0.5

PACKAGE = DebianPackage(
    "tuxpaint-stamps-default",
    "2022.06.04-1",
    "6db6c1bfc870a47f1499d6203b083522eacb57c5f9c87d468f2e92eb6d9d5f34",
    160_880_444,
)

_LAYOUT = 1  # raise it when the same package would be written differently
_LICENCE = "GPL-2.0-or-later"
_STAMPS = PurePosixPath("usr/share/tuxpaint/stamps")
_COPYRIGHT = "usr/share/doc/tuxpaint-stamps-default/copyright"

# Three more than elsewhere: the drawings are few and of one pinned package, so their cost is known.
_DRAWN = ELEMENTS | {"pattern", "style", "switch"}


@dataclass(frozen=True)
class _Stamp:
    """A stamp: where it lies below the folder of all stamps, what it says, and its PNG or else its SVG file."""

    path: PurePosixPath
    caption: str
    png: bytes | None
    svg: bytes | None

    @property
    def key(self) -> str:
        return str(self.path).replace("/", "--").replace(".", "_")

    def sample(self) -> Sample:
        picture = self._picture()
        drawn = self.svg is not None or self.path.parts[0] == "symbols" or "cartoon" in self.path.parts
        facts = {
            "caption": self.caption,
            "label": "drawing" if drawn or not _is_colourful(picture) else "photo",
            "category": str(self.path.parent),
            "licence": _LICENCE,
        }
        png = io.BytesIO()
        _square(picture).save(png, "PNG")
        return Sample(self.key, {"png": png.getvalue(), "json": json.dumps(facts, ensure_ascii=False).encode()})

    def _picture(self) -> Image.Image:
        data = self.png
        if data is None:
            assert self.svg is not None
            data = render_document(self.svg, DRAWING_PIXELS, _DRAWN)
        try:
            return Image.open(io.BytesIO(data), formats=["PNG"]).convert("RGBA")
        except (OSError, SyntaxError, ValueError) as error:
            raise BadSampleError(f"damaged PNG: {error}") from None


def _is_colourful(picture: Image.Image) -> bool:
    """Say whether an RGBA picture has as many colours as a photo: see `PHOTO_PIXELS` and `PHOTO_COLOURS`."""
    pixels = np.asarray(picture).reshape(-1, 4)
    opaque = pixels[pixels[:, 3] == 255]
    colours = len(np.unique(opaque.view(np.uint32)))  # the four channels as one number
    return len(opaque) >= PHOTO_PIXELS and colours >= PHOTO_COLOURS * len(opaque)


def _square(picture: Image.Image) -> Image.Image:
    """Return an RGBA picture centred in the smallest square, which is transparent around it."""
    side = max(picture.size)
    square = Image.new("RGBA", (side, side), (255, 255, 255, 0))
    square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return square


@dataclass(frozen=True)
class TuxPaint(PackagedSet):
    """Fetches the set.

    Attributes:
        package: what holds it; tests bring a smaller one.
    """

    package: DebianPackage = PACKAGE

    name = "tuxpaint"
    about = "934 stamps with sentences and object masks (alpha), 259 of them photos; 161 MB to download, with apt"
    licence = _LICENCE

    def build(self, shards: ShardFolder, packages: Path, progress: Progress) -> None:
        """See `PackagedSet.build`."""
        require_renderer()
        path = download([self.package], packages, progress)[self.package.name]
        stamps, copyright_file = _read(path)
        shards.resume({tool: importlib.metadata.version(tool) for tool in ("pillow", "resvg-py")})
        licence = Licence(
            "stamps", self.package.name, self.package.version, "Tux Paint stamps", "Bill Kendrick and others",
            licence=_LICENCE,
        )
        write_licences(shards.folder / "licences", [licence], {"copyright": copyright_file})

        def samples(part: Sequence[_Stamp], skipped: dict[str, str]) -> Iterator[Sample]:
            for stamp in part:
                progress.advance(1)
                try:
                    yield stamp.sample()
                except BadSampleError as error:
                    skipped[stamp.key] = error.reason

        shards.fill({"all": stamps}, samples, SAMPLES_PER_SHARD, "writing", progress)
        skipped = shards.skipped()
        captions = [stamp.caption for stamp in stamps if stamp.key not in skipped]
        summary = {"all": {"samples": len(captions), "captions": len(set(captions))}}
        shards.finish({"name": self.name, "splits": summary, "skipped": skipped})

    def origin(self) -> dict[str, Any]:
        """See `PackagedSet.origin`."""
        return {
            "layout": _LAYOUT,
            "drawing_pixels": DRAWING_PIXELS,
            "samples_per_shard": SAMPLES_PER_SHARD,
            "packages": {self.package.spec: self.package.sha256},
        }


def _read(path: Path) -> tuple[list[_Stamp], bytes]:
    """Return the stamps that have a sentence, in the order of the shards, and the package's copyright file."""
    files = read_files(
        path, lambda name: name == _COPYRIGHT or (name.endswith((".png", ".svg", ".txt")) and "/stamps/" in name)
    )
    if _COPYRIGHT not in files:
        raise DataError(f"{path.name} has no {_COPYRIGHT}: it is not the package that was expected")
    stamps = []
    for name, text in files.items():
        stem = name.removesuffix(".txt")
        png, svg = files.get(f"{stem}.png"), files.get(f"{stem}.svg")
        if stem != name and (png or svg):
            caption = caption_lines(decode_text(text))[0]  # the lines below are translations
            stamps.append(_Stamp(PurePosixPath(stem).relative_to(_STAMPS), caption, png, svg))
    return sorted(stamps, key=lambda stamp: shuffled(stamp.key)), files[_COPYRIGHT]
