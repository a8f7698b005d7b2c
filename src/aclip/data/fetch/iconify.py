"""Icon packs in the Iconify JSON format, and which of their icons show which emoji.

A pack's `icons.json` holds `icons` (name -> SVG body with optional left, top, width, height), `aliases`
(name -> parent, perhaps turned or mirrored) and defaults for width and height; `chars.json` maps code
points to names and is empty in some packs. emojibase's `en/data.json` says what exists: `hexcode`,
`label`, `tags`, `group`.

A *concept* is a sequence of code points in lower-case hex joined by `-`, without the variation selector
fe0f, e.g. "2764" or "1f468-200d-1f373". Entries without a group (bare regional letters) and those of
the group of components (skin tones, hair styles alone) are no concepts: no picture stands for them.
"""

import json
import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aclip.data.fetch.packages import read_members
from aclip.errors import DataError

_COMPONENTS = 2  # emojibase's group of skin tones and hair styles, which are modifiers
_DEFAULT_SIDE = 16.0  # what the format means where a pack says neither width nor height


@dataclass(frozen=True)
class Concept:
    """One emoji.

    Attributes:
        code: code points in lower-case hex joined by "-", without fe0f.
        label: its English name, e.g. "red heart".
        tags: English keywords.
        group: emojibase's group number.
    """

    code: str
    label: str
    tags: tuple[str, ...]
    group: int


@dataclass(frozen=True)
class Icon:
    """One drawing: the inside of an svg element and the rectangle it is drawn in."""

    body: str
    left: float
    top: float
    width: float
    height: float


@dataclass(frozen=True)
class Pack:
    """One icon pack.

    Attributes:
        icons: drawings by name, plain renames included (one drawing may have several names).
        codes: code points to names as in `chars.json`; empty where the pack does not say.
        info: the pack's `info.json`: title, author, licence.
    """

    icons: Mapping[str, Icon]
    codes: Mapping[str, str]
    info: Mapping[str, Any]


def concept_code(hexcode: str) -> str:
    """Return code points in the spelling of a concept.

    >>> concept_code("2764-FE0F-200D-1F525")
    '2764-200d-1f525'
    """
    return "-".join(point for point in hexcode.lower().split("-") if point != "fe0f")


def read_concepts(path: Path) -> dict[str, Concept]:
    """Read the concepts of an emojibase package, by code, in the order of the package.

    Raises:
        DataError: the package is not what it should be.
    """
    entries = _json(path, "en/data.json")
    try:
        concepts = [
            Concept(
                concept_code(entry["hexcode"]), entry["label"], tuple(entry.get("tags", ())), entry["group"]
            )
            for entry in entries
            if entry.get("group", _COMPONENTS) != _COMPONENTS
        ]
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path.name}: en/data.json has an unexpected form ({error!r})") from None
    return {concept.code: concept for concept in concepts}


def read_pack(path: Path) -> Pack:
    """Read an Iconify package.

    Of the aliases only plain renames are taken: one that also turns or mirrors its parent is another
    picture, and often another concept (a hand pointing left is no hand pointing right).

    Raises:
        DataError: the package is not what it should be.
    """
    data = _json(path, "icons.json")
    try:
        icons = {name: icon_of(data, name) for name in data["icons"]}
        for name, alias in data.get("aliases", {}).items():
            if set(alias) == {"parent"} and alias["parent"] in data["icons"]:
                icons.setdefault(name, icons[alias["parent"]])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{path.name}: icons.json has an unexpected form ({error!r})") from None
    return Pack(icons, _json(path, "chars.json", {}), _json(path, "info.json", {}))


def icon_of(data: Mapping[str, Any], name: str) -> Icon:
    """Return one icon of a pack in the Iconify format.

    Raises:
        KeyError, TypeError, ValueError, AttributeError: the format is another.
    """
    icon = data["icons"][name]
    sides = {key: data.get(key, _DEFAULT_SIDE) for key in ("width", "height")}
    offsets = {key: data.get(key, 0.0) for key in ("left", "top")}
    rectangle = {key: float(icon.get(key, value)) for key, value in {**sides, **offsets}.items()}
    return Icon(icon["body"], **rectangle)


def _json(path: Path, member: str, default: Any = None) -> Any:
    data = read_members(path, [member]).get(member)
    if data is None:
        if default is None:
            raise DataError(f"{path.name} has no {member}: it is not the package that was expected")
        return default
    try:
        return json.loads(data)
    except ValueError as error:
        raise DataError(f"{path.name}: {member} is not JSON ({error})") from None


def letters(text: str) -> str:
    """Return a label or an icon's name reduced to its letters and digits, accents dropped.

    Packs spell names with dashes, without, and with other apostrophes; reduced they agree.

    >>> letters("twelve o’clock"), letters("oclock-twelve"), letters("piñata")
    ('twelveoclock', 'oclocktwelve', 'pinata')
    """
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    return re.sub(r"[^a-z0-9]", "", plain.lower())


def match(packs: Mapping[str, Pack], concepts: Mapping[str, Concept]) -> dict[str, dict[str, Icon]]:
    """Say which icon of each pack shows which concept, at most one each.

    The rules, in this order:

    1. A pack with its own `chars.json` is matched by it alone; of several spellings of a concept (with
       and without fe0f) the first counts.
    2. In a pack without, an icon shows the concept whose label has the same letters and digits as one of
       the icon's names (`letters`).
    3. A concept that is still without an icon takes the one whose name has the concept's code in the
       `chars.json` of another pack (in the order of `packs`).

    Args:
        packs: by style.
        concepts: by code.

    Returns:
        For each style the icon of each concept it has, in the order of `concepts`.
    """
    elsewhere: dict[str, list[str]] = {code: [] for code in concepts}
    for pack in packs.values():
        for code, name in pack.codes.items():
            elsewhere.get(concept_code(code), []).append(name)

    matched: dict[str, dict[str, Icon]] = {}
    for style, pack in packs.items():
        found: dict[str, Icon] = {}
        if pack.codes:
            for code, name in pack.codes.items():
                if name in pack.icons:
                    found.setdefault(concept_code(code), pack.icons[name])
        else:
            by_letters: dict[str, Icon] = {}
            for name, icon in pack.icons.items():
                by_letters.setdefault(letters(name), icon)
            for code, concept in concepts.items():
                named = [pack.icons[name] for name in elsewhere[code] if name in pack.icons]
                icon_or_none = by_letters.get(letters(concept.label), named[0] if named else None)
                if icon_or_none is not None:
                    found[code] = icon_or_none
        matched[style] = {code: found[code] for code in concepts if code in found}
    return matched

