"""Packs and concepts: what is an icon, what is a concept, and which shows which."""

from pathlib import Path
from typing import Any

import pytest
from made_packs import emoji_entry, tarball

from aclip.data.fetch.iconify import (
    Concept,
    Icon,
    Pack,
    concept_code,
    letters,
    match,
    read_concepts,
    read_pack,
)
from aclip.errors import DataError


def write(path: Path, members: dict[str, Any]) -> Path:
    path.write_bytes(tarball(members))
    return path


def icon(body: str) -> Icon:
    return Icon(body, 0, 0, 16, 16)


def concepts(**labels: str) -> dict[str, Concept]:
    """Concepts by code; `c` stands before codes so that they are Python names, `_` for the dash."""
    codes = {name[1:].replace("_", "-"): label for name, label in labels.items()}
    return {code: Concept(code, label, (), 0) for code, label in codes.items()}


def test_concept_code_is_lower_case_without_the_variation_selector() -> None:
    assert concept_code("2764-FE0F") == "2764"
    assert concept_code("0023-FE0F-20E3") == "0023-20e3"
    assert concept_code("1F468-200D-2764-FE0F-200D-1F468") == "1f468-200d-2764-200d-1f468"


def test_skin_tones_and_bare_letters_are_no_concepts(tmp_path: Path) -> None:
    entries = [
        emoji_entry("1F1E6", "regional indicator A", group=None),
        emoji_entry("1F3FB", "light skin tone", group=2),
        emoji_entry("2764-FE0F", "red heart", group=8, tags=("love", "emotion")),
    ]
    # A variant in a skin tone is listed inside its entry, never on its own.
    entries[2]["skins"] = [emoji_entry("2764-1F3FB", "red heart: light skin tone", group=8)]
    path = write(tmp_path / "labels.tgz", {"en/data.json": entries})
    assert read_concepts(path) == {"2764": Concept("2764", "red heart", ("love", "emotion"), 8)}


def test_a_pack_gives_sizes_their_defaults_and_takes_plain_renames_only(tmp_path: Path) -> None:
    icons = {
        "width": 32,
        "height": 24,
        "icons": {"hand-left": {"body": "<g/>"}, "wide": {"body": "<b/>", "width": 48, "left": -8}},
        "aliases": {
            "palm-left": {"parent": "hand-left"},
            "hand-right": {"parent": "hand-left", "hFlip": True},
            "lost": {"parent": "nothing"},
        },
    }
    info = {"author": {"name": "A"}}
    members = {"icons.json": icons, "info.json": info, "chars.json": {"1": "wide"}}
    pack = read_pack(write(tmp_path / "p.tgz", members))
    hand = Icon("<g/>", 0, 0, 32, 24)
    assert pack.icons == {"hand-left": hand, "palm-left": hand, "wide": Icon("<b/>", -8, 0, 48, 24)}
    assert pack.codes == {"1": "wide"}
    assert pack.info == info


def test_a_pack_without_chars_or_sizes_is_read_too(tmp_path: Path) -> None:
    pack = read_pack(write(tmp_path / "p.tgz", {"icons.json": {"icons": {"a": {"body": "<g/>"}}}}))
    assert pack == Pack({"a": icon("<g/>")}, {}, {})


@pytest.mark.parametrize(
    "members", [{}, {"icons.json": b"{"}, {"icons.json": {"icons": {"a": {}}}}, {"icons.json": [1]}]
)
def test_a_package_of_another_form_is_named(members: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"p\.tgz.* icons\.json"):
        read_pack(write(tmp_path / "p.tgz", members))


def test_labels_and_names_agree_on_their_letters() -> None:
    assert letters("twelve o\u2019clock") == letters("twelve-oclock") == letters("TwelveOClock")
    assert letters("piñata") == "pinata"
    assert letters("keycap: *") == "keycap"


def test_code_points_win_where_a_pack_has_them() -> None:
    known = concepts(c1="apple", c2="pear", c3="plum")
    # The label would say otherwise for "pear"; the spelling with fe0f comes second; 9 is no concept.
    pack = Pack(
        {"pear": icon("drawn as 1"), "x": icon("2"), "y": icon("2 again"), "plum": icon("unlisted")},
        {"1": "pear", "2": "x", "2-fe0f": "y", "9": "x"},
        {},
    )
    assert match({"s": pack}, known) == {"s": {"1": icon("drawn as 1"), "2": icon("2")}}


def test_labels_then_names_of_other_packs_where_it_has_none() -> None:
    known = concepts(c1="red apple", c2="hugging", c3="both")
    coded = Pack({"hug": icon("h"), "two": icon("t")}, {"2": "hug", "3": "two"}, {})
    bare = Pack({"redapple": icon("a"), "hug": icon("b"), "two": icon("no"), "both": icon("c")}, {}, {})
    found = match({"coded": coded, "bare": bare}, known)
    assert found["bare"] == {"1": icon("a"), "2": icon("b"), "3": icon("c")}
    assert list(found["coded"]) == ["2", "3"]
