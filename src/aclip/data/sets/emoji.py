"""The set `emoji`: 12,720 images of 1,914 concepts in ten drawing styles, with names and keywords.

A tenth of the concepts, by a stable hash, and three styles are held out:

| split | concepts | styles | images |
|---|---|---|---|
| train | known | known | 6,912 |
| val_vendor | known | held out | 4,612 |
| val_concept | held out | known | 706 |
| val_both | held out | held out | 490 |

Which icon shows which concept is decided by `match`. Seven images show a neighbour of their concept, such as the
cricket bat for the insect. They are kept: the counts above define the set.

A *concept* is a sequence of code points in lower-case hex joined by "-", without the variation selector fe0f, e.g.
"2764" or "1f468-200d-1f373". Entries of emojibase without a group (bare regional letters) and those of the group of
components (skin tones, hair styles alone) are none.
"""

import json
import re
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from aclip.data.sets.base import DataSet, Entries, Files, unit_hash
from aclip.data.sets.drawings import Icon, draw_icon, icon_of
from aclip.data.sets.packages import Package, read_npm
from aclip.data.sources.base import RawSample, Source

HELD_OUT_STYLES = ("openmoji", "fluent-emoji-flat", "fluent-emoji")
HELD_OUT_FRACTION = 0.10
SPLITS = ("train", "val_vendor", "val_concept", "val_both")

LABELS = "emojibase-data"
"""The package that says which concepts there are, and their names and keywords."""

_COMPONENTS = 2  # emojibase's group of skin tones and hair styles, which are modifiers
_LICENCE_FILES = ("LICENSE", "LICENSE.md", "LICENSE.txt", "README.md", "info.json", "package.json")

# fmt: off
PACKAGES = (
    Package(LABELS, "17.0.0", "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a", 6_711_091),
    *(Package(f"@iconify-json/{style}", version, sha256, size) for style, version, size, sha256 in (
        ("noto", "1.2.9", 3_102_958, "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad"),
        ("twemoji", "1.2.5", 1_555_888, "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7"),
        ("openmoji", "1.2.29", 1_264_633, "03181e2c156cab35cf4a62f1f7886bd971d59212e75ac3f189d5a4cae3930fc5"),
        ("fluent-emoji-flat", "1.2.6", 1_172_438, "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175"),
        ("fluent-emoji", "1.2.7", 14_323_330, "8044210dbf11e016d4de85f15d01a243423bd832457e7e2491df1b751c0e272b"),
        ("noto-v1", "1.2.5", 1_587_591, "2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37"),
        ("fxemoji", "1.2.2", 1_034_876, "f3e72b3c59d05e1db03b7e308d55c0d05bd7ba3f625a90da1b79313c12858eef"),
        ("emojione", "1.2.3", 687_690, "26a14f44284407e8bcde91799388dca2bfd91dbcd55a97f425524a1c5b73610e"),
        ("emojione-v1", "1.2.3", 3_704_153, "6641d59d48a42823fdc2b84e7427e9f302944eb98d2c7d94d6e67c139e7b37b3"),
        ("streamline-emojis", "1.2.4", 381_714, "5dac87c876b322500989828c5823143e0100d78881627a2e4081a4b897cbfdbc"),
    )),
)
# fmt: on


class Concept(NamedTuple):
    """One emoji."""

    label: str  # its English name
    tags: tuple[str, ...]  # English keywords


class Pack(NamedTuple):
    """Drawings by name, plain renames included, and code points -> name, empty where a pack has no `chars.json`."""

    icons: Mapping[str, Icon]
    codes: Mapping[str, str]


def open_emoji(files: Files) -> dict[str, Source]:
    """Return the source of each split."""
    concepts = read_concepts(files[LABELS])
    packs = {_style(package): read_pack(path) for package, path in files.items() if package != LABELS}
    splits: dict[str, list[tuple[RawSample, Icon]]] = {split: [] for split in SPLITS}
    for style, icons in match(packs, concepts).items():
        for code, icon in icons.items():
            label, tags = concepts[code]
            sample = RawSample(f"{style}-{code}", b"", (label,), tags, label, code)
            splits[split_of(code, style in HELD_OUT_STYLES)].append((sample, icon))
    return {split: Entries(f"emoji:{split}", entries, draw_icon) for split, entries in splits.items()}


def split_of(code: str, style_held_out: bool) -> str:
    """Return the split of a concept's image in a style."""
    if unit_hash(f"concept{code}") < HELD_OUT_FRACTION:
        return "val_both" if style_held_out else "val_concept"
    return "val_vendor" if style_held_out else "train"


def licences(files: Files) -> dict[str, bytes]:
    """Return what the packages say, in a folder for each style."""
    return {f"{_style(package)}/{name}": data
            for package, path in files.items() for name, data in read_npm(path, _LICENCE_FILES)}


def _style(package: str) -> str:
    return "labels" if package == LABELS else package.rpartition("/")[2]


def concept_code(hexcode: str) -> str:
    """Return code points in the spelling of a concept: "2764-FE0F-200D-1F525" becomes "2764-200d-1f525"."""
    return "-".join(point for point in hexcode.lower().split("-") if point != "fe0f")


def read_concepts(path: Path) -> dict[str, Concept]:
    """Return the concepts of an emojibase package by code, in the package's order."""
    (content,) = dict(read_npm(path, ["en/data.json"])).values()
    return {concept_code(entry["hexcode"]): Concept(entry["label"], tuple(entry.get("tags", ())))
            for entry in json.loads(content) if entry.get("group", _COMPONENTS) != _COMPONENTS}


def read_pack(path: Path) -> Pack:
    """Read an Iconify package; of the aliases only plain renames: one that also mirrors its parent is another image."""
    members = {name: json.loads(data) for name, data in read_npm(path, ["icons.json", "chars.json"])}
    pack = members["icons.json"]
    icons = {name: icon_of(pack, name) for name in pack["icons"]}
    for name, alias in pack.get("aliases", {}).items():
        if set(alias) == {"parent"} and alias["parent"] in pack["icons"]:
            icons.setdefault(name, icons[alias["parent"]])
    return Pack(icons, members.get("chars.json", {}))


def letters(text: str) -> str:
    """Return a label or an icon's name reduced to its letters and digits, without accents.

    Packs spell names with dashes, without, and with other apostrophes; reduced they agree.
    """
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    return re.sub(r"[^a-z0-9]", "", plain.lower())


def match(packs: Mapping[str, Pack], concepts: Mapping[str, Concept]) -> dict[str, dict[str, Icon]]:
    """Decide which icon of each pack shows which concept, at most one each.

    1. A pack with a `chars.json` is matched by it alone; of several spellings of a concept (with and without fe0f)
       the first counts.
    2. In a pack without, an icon shows the concept whose label has the same letters and digits as one of the icon's
       names (`letters`).
    3. A concept still without an icon takes the one whose name has the concept's code in the `chars.json` of another
       pack, in the order of `packs`.

    Returns:
        For each style the icon of each concept it has, in the order of `concepts`.
    """
    elsewhere: dict[str, list[str]] = {code: [] for code in concepts}
    for pack in packs.values():
        for code, name in pack.codes.items():
            elsewhere.get(concept_code(code), []).append(name)
    matches = {}
    for style, pack in packs.items():
        found: dict[str, Icon | None] = {}
        by_letters: dict[str, Icon] = {}
        for code, name in pack.codes.items():
            if name in pack.icons:
                found.setdefault(concept_code(code), pack.icons[name])
        for name, icon in pack.icons.items():
            by_letters.setdefault(letters(name), icon)
        for code, concept in concepts.items() if not pack.codes else ():
            candidates = [by_letters.get(letters(concept.label)), *(pack.icons.get(name) for name in elsewhere[code])]
            found[code] = next(filter(None, candidates), None)
        matches[style] = {code: shown for code in concepts if (shown := found.get(code)) is not None}
    return matches


EMOJI = DataSet(
    "emoji",
    "12,720 images of 1,914 emoji in 10 drawing styles, with names and keywords; 36 MB to download",
    "Apache-2.0, CC-BY-4.0, CC-BY-SA-4.0 and MIT, by style (see licences/)",
    PACKAGES, open_emoji, licences, drawn=True,
)
