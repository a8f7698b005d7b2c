"""The set `icons`: 130,375 pictures of 54,793 short captions in 192 families of icons.

Mostly black glyphs on nothing, named by their designers in one to three words ("bell off", "monkey wrench"): many more
words and many more styles than emoji, each picture much simpler.

Of the collection @iconify/json these families are left out: emoji (they are the set `emoji`), logos (names, not
things), families that a newer release has replaced, and those whose licence forbids commercial use. The caption of an
icon is its name without what says which variant it is: prefixes and suffixes that the family declares, then the last
words as long as they are among `VARIANTS`. A caption has up to three words of letters alone and at least three
characters; in each family it belongs to the icon with the shortest name.

| split | captions | families | pictures |
|---|---|---|---|
| train | 50,045 | 186 | 121,822 |
| val_vendor | 2,929 of those | 6 held out | 3,785 |
| val_both | 4,748 others | the same 6 | 4,768 |

The splits are called like those of `emoji`, a family being the vendor. Families copy each other now and then: five
drawings of the families held out are, line by line, also in `train`.

The folder holds `SPLIT/000000.tar` ... of 2,000 samples each: `.png` 128 x 128 RGBA and `.json` (caption, label, style,
licence), in an order that is shuffled by hash. Animated icons show their still picture; the 13 that begin with
nothing are left out.
"""

import importlib.metadata
import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aclip.data.fetch.drawn import draw_samples, worker_count
from aclip.data.fetch.iconify import Icon, icon_of
from aclip.data.fetch.licences import Licence, write_licences
from aclip.data.fetch.packaged import PackagedSet
from aclip.data.fetch.packages import Package, download, read_members, stream_members
from aclip.data.fetch.progress import Progress
from aclip.data.fetch.render import open_renderer, require_renderer
from aclip.data.fetch.shards import ShardFolder, shuffled
from aclip.data.tar_files import Sample
from aclip.errors import DataError

PIXELS = 128
SAMPLES_PER_SHARD = 2000

HELD_OUT = ("ph", "iconoir", "solar", "game-icons", "healthicons", "meteocons")
"""Families that are never trained on."""

VARIANTS = (
    "outline", "outlined", "filled", "fill", "solid", "line", "linear", "bold", "duotone", "twotone", "thin", "light",
    "regular", "round", "rounded", "sharp", "broken", "alt",
)  # fmt: skip
"""Last words of a name that say how the thing is drawn, not what it is; so do numbers, with or without "px"."""

PACKAGE = Package(
    "@iconify/json", "2.2.535", "1a545f86fa224d6531d8fb101dcbe83aac2b28689a21cbed6fc68318a5af4d91", 104_043_282
)

_LAYOUT = 1  # raise it when the same package would be written differently
_LEFT_OUT = frozenset({"Emoji", "Logos"})
_VARIANT = re.compile(rf"-(?:{'|'.join(VARIANTS)}|\d+(?:px)?)$")
_CAPTION = re.compile(r"(?=.{3})[a-z]+(?: [a-z]+){0,2}")
_SAID_IN = ("package.json", "readme.md", "lib/license.txt")


@dataclass(frozen=True)
class _Picture:
    """An icon to be drawn and what is said of it."""

    family: str
    licence: str
    caption: str
    icon: Icon

    @property
    def key(self) -> str:
        return f"{self.family}--{self.caption.replace(' ', '-')}"

    def sample(self, png: bytes) -> Sample:
        facts = {"caption": self.caption, "label": self.caption, "style": self.family, "licence": self.licence}
        return Sample(self.key, {"png": png, "json": json.dumps(facts).encode()})


def is_used(info: Mapping[str, Any]) -> bool:
    """Say whether a family of `collections.json` is in the set."""
    licence = info.get("license", {}).get("spdx", "")
    return info.get("category") not in _LEFT_OUT and not info.get("hidden") and "-NC" not in licence


def caption_of(name: str, prefixes: Collection[str] = (), suffixes: Collection[str] = ()) -> str | None:
    """Return the caption of an icon, or None where its name is none.

    Args:
        name: of the icon.
        prefixes: what its family puts before a name for a variant, without the dash.
        suffixes: what it puts behind.

    >>> caption_of("baseline-bell-off-outline-24px", prefixes=["baseline"]), caption_of("file-type-c2")
    ('bell off', None)
    """
    # The longest first: "bold-duotone" is one variant, not a thing called bold.
    for prefix in sorted(filter(None, prefixes), key=len, reverse=True):
        if name.startswith(f"{prefix}-"):
            name = name.removeprefix(f"{prefix}-")
            break
    for suffix in sorted(filter(None, suffixes), key=len, reverse=True):
        if name.endswith(f"-{suffix}"):
            name = name.removesuffix(f"-{suffix}")
            break
    while (shorter := _VARIANT.sub("", name)) != name:
        name = shorter
    caption = name.replace("-", " ")
    return caption if _CAPTION.fullmatch(caption) else None


@dataclass(frozen=True)
class Icons(PackagedSet):
    """Fetches the set; the fields are its definition, which tests make smaller.

    Attributes:
        package: the collection.
        held_out: families that are never trained on.
        workers: processes that render; None takes one a core, eight at most.
    """

    package: Package = PACKAGE
    held_out: tuple[str, ...] = HELD_OUT
    workers: int | None = None

    name = "icons"
    about = "130,375 pictures of icons in 192 families, with names of up to 3 words; 104 MB to download"
    licence = "by family, mostly MIT, Apache-2.0, CC-BY and CC0 (see licences/); none that forbids commercial use"

    def build(self, shards: ShardFolder, packages: Path, progress: Progress) -> None:
        """See `PackagedSet.build`."""
        require_renderer()
        path = download([self.package], packages, progress)[self.package.name]
        families = _families(path)
        splits = self._splits(_pictures(path, families))
        shards.resume({"resvg-py": importlib.metadata.version("resvg-py")})
        rows = [Licence.of_info(family, self.package, info) for family, info in sorted(families.items())]
        texts = {f"package/{name}": data for name, data in read_members(path, _SAID_IN).items()}
        write_licences(shards.folder / "licences", rows, texts)
        with open_renderer(PIXELS, worker_count(self.workers)) as renderer:

            def samples(pictures: Sequence[_Picture], skipped: dict[str, str]) -> Iterable[Sample]:
                return draw_samples(pictures, renderer, progress, skipped)

            shards.fill(splits, samples, SAMPLES_PER_SHARD, "rendering", progress)
        shards.finish(self._facts(splits, shards.skipped()))

    def origin(self) -> dict[str, Any]:
        """See `PackagedSet.origin`."""
        return {
            "layout": _LAYOUT,
            "pixels": PIXELS,
            "samples_per_shard": SAMPLES_PER_SHARD,
            "held_out": list(self.held_out),
            "packages": {self.package.spec: self.package.sha256},
        }

    def _splits(self, pictures: Iterable[_Picture]) -> dict[str, list[_Picture]]:
        """Return the pictures of each split in the order of the shards."""
        splits: dict[str, list[_Picture]] = {"train": [], "val_vendor": [], "val_both": []}
        held_out: list[_Picture] = []
        for picture in pictures:
            (held_out if picture.family in self.held_out else splits["train"]).append(picture)
        known = {picture.caption for picture in splits["train"]}
        for picture in held_out:
            splits["val_vendor" if picture.caption in known else "val_both"].append(picture)
        for some in splits.values():
            some.sort(key=lambda picture: shuffled(picture.key))
        return splits

    def _facts(self, splits: Mapping[str, Sequence[_Picture]], skipped: Mapping[str, str]) -> dict[str, Any]:
        summary = {}
        for split, pictures in splits.items():
            used = [picture for picture in pictures if picture.key not in skipped]
            summary[split] = {
                "samples": len(used),
                "captions": len({picture.caption for picture in used}),
                "styles": sorted({picture.family for picture in used}),
            }
        return {"name": self.name, "splits": summary, "skipped": dict(skipped)}


def _families(path: Path) -> dict[str, Mapping[str, Any]]:
    """Return what the collection says of the families that are used, by family."""
    for _, data in stream_members(path, ["collections.json"]):
        try:
            return {family: info for family, info in json.loads(data).items() if is_used(info)}
        except (ValueError, AttributeError) as error:
            raise DataError(f"{path.name}: collections.json has an unexpected form ({error!r})") from None
    raise DataError(f"{path.name} has no collections.json: it is not the package that was expected")


def _pictures(path: Path, families: Mapping[str, Mapping[str, Any]]) -> Iterator[_Picture]:
    """Yield the pictures of all families; one family's file is in memory at a time."""
    for member, text in stream_members(path, [f"json/{family}.json" for family in families]):
        family = Path(member).stem
        licence = str(families[family].get("license", {}).get("spdx", "unknown"))
        try:
            data = json.loads(text)
            for caption, name in _named(data).items():
                yield _Picture(family, licence, caption, icon_of(data, name))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(f"{path.name}: {member} has an unexpected form ({error!r})") from None


def _named(data: Mapping[str, Any]) -> dict[str, str]:
    """Return the icon of each caption of a family: the one with the shortest name, then the first by letters."""
    variants = {side: data.get(side) or {} for side in ("prefixes", "suffixes")}
    names: dict[str, str] = {}
    for name in sorted(data["icons"], key=lambda name: (len(name), name)):
        caption = caption_of(name, **variants)
        if caption is not None and not data["icons"][name].get("hidden"):
            names.setdefault(caption, name)
    return names
