"""The set `icons`: 130,375 images of 54,793 short captions in 192 families of icons.

Mostly black glyphs on nothing, named by their designers in one to three words ("bell off", "monkey wrench").

Of the collection @iconify/json these families are left out: emoji, logos, families that a newer release has replaced,
and those whose licence forbids commercial use. A caption is an icon's name without what says which variant it is, if
that leaves up to three words of letters alone; in each family it belongs to the icon with the shortest name.

| split | captions | families | images |
|---|---|---|---|
| train | 50,045 | 186 | 121,822 |
| val_vendor | 2,929 of those | 6 held out | 3,785 |
| val_both | 4,748 others | the same 6 | 4,768 |

The splits are named as those of `emoji`, a family being the vendor. Animated icons show their still image.
"""

import json
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from aclip.data.sets.base import DataSet, Entries, Files
from aclip.data.sets.drawings import Icon, draw_icon, icon_of
from aclip.data.sets.packages import Package, read_npm
from aclip.data.sources.base import RawSample, Source

HELD_OUT = ("ph", "iconoir", "solar", "game-icons", "healthicons", "meteocons")
"""Families that are never trained on."""

VARIANTS = (
    "outline", "outlined", "filled", "fill", "solid", "line", "linear", "bold", "duotone", "twotone", "thin", "light",
    "regular", "round", "rounded", "sharp", "broken", "alt",
)  # fmt: skip
"""Last words of a name that say how the thing is drawn, not what it is; so do numbers, with or without "px"."""

PACKAGE = Package(
    "@iconify/json", "2.2.535", "1a545f86fa224d6531d8fb101dcbe83aac2b28689a21cbed6fc68318a5af4d91", 104_043_282)

_LEFT_OUT = frozenset({"Emoji", "Logos"})
_VARIANT = re.compile(rf"-(?:{'|'.join(VARIANTS)}|\d+(?:px)?)$")
_CAPTION = re.compile(r"(?=.{3})[a-z]+(?: [a-z]+){0,2}")
_LICENCE_FILES = ("collections.json", "package.json", "readme.md", "lib/license.txt")


def open_icons(files: Files) -> dict[str, Source]:
    """Return the source of each split."""
    splits: dict[str, list[tuple[RawSample, Icon]]] = {"train": [], "val_vendor": [], "val_both": []}
    held_out: list[tuple[RawSample, Icon]] = []
    path = files[PACKAGE.name]
    for family, sample, icon in _entries(path, families(path)):
        (held_out if family in HELD_OUT else splits["train"]).append((sample, icon))
    known = {sample.label for sample, _ in splits["train"]}
    for sample, icon in held_out:
        splits["val_vendor" if sample.label in known else "val_both"].append((sample, icon))
    return {split: Entries(f"icons:{split}", entries, draw_icon) for split, entries in splits.items()}


def licences(files: Files) -> dict[str, bytes]:
    """Return what the package says, `collections.json` of each family."""
    return dict(read_npm(files[PACKAGE.name], _LICENCE_FILES))


def families(path: Path) -> list[str]:
    """Return the families of the collection that are used."""
    ((_, content),) = read_npm(path, ["collections.json"])
    return [family for family, info in json.loads(content).items() if is_used(info)]


def is_used(info: Mapping[str, Any]) -> bool:
    """Return whether a family of `collections.json` is in the set."""
    licence = info.get("license", {}).get("spdx", "")
    return info.get("category") not in _LEFT_OUT and not info.get("hidden") and "-NC" not in licence


def _entries(path: Path, used: Collection[str]) -> Iterator[tuple[str, RawSample, Icon]]:
    """Yield family, sample and drawing of every icon; the file of one family is in memory at a time."""
    for member, content in read_npm(path, [f"json/{family}.json" for family in used]):
        family, pack = Path(member).stem, json.loads(content)
        for caption, name in _captioned(pack).items():
            sample = RawSample(f"{family}--{caption.replace(' ', '-')}", b"", (caption,), label=caption)
            yield family, sample, icon_of(pack, name)


def _captioned(pack: Mapping[str, Any]) -> dict[str, str]:
    """Return the icon of each caption of a family: the one with the shortest name, then the first by letters."""
    prefixes, suffixes = (pack.get(side) or {} for side in ("prefixes", "suffixes"))
    names: dict[str, str] = {}
    for name in sorted(pack["icons"], key=lambda name: (len(name), name)):
        caption = caption_of(name, prefixes, suffixes)
        if caption is not None and not pack["icons"][name].get("hidden"):
            names.setdefault(caption, name)
    return names


def caption_of(name: str, prefixes: Collection[str] = (), suffixes: Collection[str] = ()) -> str | None:
    """Return the caption of an icon: "bell off" for "baseline-bell-off-outline-24px", None for "file-type-c2".

    `prefixes` and `suffixes` are what its family puts before and behind a name for a variant, without the dash.
    """
    # The longest: "bold-duotone" is one variant, not a thing called bold.
    before = max((f"{one}-" for one in prefixes if one and name.startswith(f"{one}-")), key=len, default="")
    name = name.removeprefix(before)
    behind = max((f"-{one}" for one in suffixes if one and name.endswith(f"-{one}")), key=len, default="")
    name = name.removesuffix(behind)
    while (shorter := _VARIANT.sub("", name)) != name:
        name = shorter
    caption = name.replace("-", " ")
    return caption if _CAPTION.fullmatch(caption) else None


ICONS = DataSet(
    "icons",
    "130,375 images of icons in 192 families, with names of up to 3 words; 104 MB to download",
    "by family, mostly MIT, Apache-2.0, CC-BY and CC0 (see licences/); none that forbids commercial use",
    (PACKAGE,), open_icons, licences, shard_size=2000, drawn=True,
)
