"""The set `emoji` on small packs: concepts, which icon shows which, splits."""

import json
from pathlib import Path
from typing import Any

import pytest
from synthetic_packages import RED, Shelf, tarball

from aclip.data.sets.drawings import Icon
from aclip.data.sets.emoji import (
    EMOJI,
    HELD_OUT_STYLES,
    LABELS,
    Concept,
    Pack,
    concept_code,
    letters,
    licences,
    match,
    open_emoji,
    read_concepts,
    read_pack,
)
from aclip.data.sets.packages import download

pytest.importorskip("resvg_py")

# By `printf concept1f607 | sha1sum` and so on: HELD_OUT begin below 1999999a, a tenth of 2^32, KNOWN above.
KNOWN = {"1f600": "grinning face", "2764": "red heart", "1f525": "fire"}
HELD_OUT = {"1f607": "smiling face with halo", "1f60b": "face savoring food"}


def entry(hexcode: str, label: str, group: int | None = 0, tags: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return an entry of emojibase's `en/data.json`."""
    one: dict[str, Any] = {"hexcode": hexcode, "label": label, "tags": list(tags)}
    return one if group is None else {**one, "group": group}


def write(path: Path, members: dict[str, Any]) -> Path:
    path.write_bytes(tarball(members))
    return path


def icon(body: str) -> Icon:
    return Icon(body, 0, 0, 16, 16)


def concepts(**labels: str) -> dict[str, Concept]:
    """Concepts by code; `c` stands before codes so that they are Python names."""
    return {name[1:]: Concept(label, ()) for name, label in labels.items()}


def test_the_set_is_the_documented_one() -> None:
    assert HELD_OUT_STYLES == ("openmoji", "fluent-emoji-flat", "fluent-emoji")
    assert [package.name.rpartition("/")[2] for package in EMOJI.packages] == [
        LABELS, "noto", "twemoji", "openmoji", "fluent-emoji-flat", "fluent-emoji", "noto-v1", "fxemoji", "emojione",
        "emojione-v1", "streamline-emojis"]


def pack(labels: dict[str, str], coded: bool) -> dict[str, Any]:
    names = {code: label.replace(" ", "-") for code, label in labels.items()}
    return {
        "icons.json": {"icons": {name: {"body": RED} for name in names.values()}, "width": 16, "height": 16},
        "chars.json": names if coded else {},
        "info.json": {"name": "pack", "author": {"name": "Some, One"}, "license": {"spdx": "CC-BY-4.0"}},
        "LICENSE": b"how it may be used",
    }


def test_every_image_is_in_its_split_with_its_words(shelf: Shelf, tmp_path: Path) -> None:
    everything = {**KNOWN, **HELD_OUT}
    entries = [entry(code.upper(), label, tags=("a tag",)) for code, label in everything.items()]
    entries[1]["hexcode"] = "2764-FE0F"
    packages = [shelf.put(LABELS, {"en/data.json": entries, "LICENSE": b"MIT"}),
                shelf.put("@iconify-json/noto", pack(everything, True)),
                shelf.put("@iconify-json/openmoji", pack(everything, False))]
    files = download(packages, tmp_path)
    splits = open_emoji(files)
    found = {split: {source.name(index) for index in range(len(source))} for split, source in splits.items()}
    assert found == {
        "train": {f"noto-{code}" for code in KNOWN}, "val_vendor": {f"openmoji-{code}" for code in KNOWN},
        "val_concept": {f"noto-{code}" for code in HELD_OUT}, "val_both": {f"openmoji-{code}" for code in HELD_OUT}}
    source = splits["val_vendor"]
    samples = {sample.name: sample for sample in map(source.read, range(len(source)))}
    heart = samples["openmoji-2764"]
    assert (heart.captions, heart.tags, heart.label, heart.concept) == (("red heart",), ("a tag",), "red heart", "2764")
    assert heart.image.startswith(b"\x89PNG")
    texts = licences(files)
    assert json.loads(texts["noto/info.json"])["license"] == {"spdx": "CC-BY-4.0"}
    assert (texts["noto/LICENSE"], texts["labels/LICENSE"]) == (b"how it may be used", b"MIT")


def test_concept_code_is_lower_case_without_the_variation_selector() -> None:
    assert concept_code("2764-FE0F") == "2764"
    assert concept_code("0023-FE0F-20E3") == "0023-20e3"
    assert concept_code("1F468-200D-2764-FE0F-200D-1F468") == "1f468-200d-2764-200d-1f468"


def test_skin_tones_and_bare_letters_are_no_concepts(tmp_path: Path) -> None:
    entries = [entry("1F1E6", "regional indicator A", group=None), entry("1F3FB", "light skin tone", group=2),
               entry("2764-FE0F", "red heart", group=8, tags=("love", "emotion"))]
    # A variant in a skin tone is listed inside its entry, never on its own.
    entries[2]["skins"] = [entry("2764-1F3FB", "red heart: light skin tone", group=8)]
    path = write(tmp_path / "labels.tgz", {"en/data.json": entries})
    assert read_concepts(path) == {"2764": Concept("red heart", ("love", "emotion"))}


def test_a_pack_gives_sizes_their_defaults_and_takes_plain_renames_only(tmp_path: Path) -> None:
    icons = {
        "width": 32, "height": 24,
        "icons": {"hand-left": {"body": "<g/>"}, "wide": {"body": "<b/>", "width": 48, "left": -8}},
        "aliases": {"palm-left": {"parent": "hand-left"}, "hand-right": {"parent": "hand-left", "hFlip": True},
                    "lost": {"parent": "nothing"}},
    }  # fmt: skip
    members = {"icons.json": icons, "chars.json": {"1": "wide"}}
    read = read_pack(write(tmp_path / "p.tgz", members))
    hand = Icon("<g/>", 0, 0, 32, 24)
    assert read == Pack({"hand-left": hand, "palm-left": hand, "wide": Icon("<b/>", -8, 0, 48, 24)}, {"1": "wide"})
    bare = read_pack(write(tmp_path / "q.tgz", {"icons.json": {"icons": {"a": {"body": "<g/>"}}}}))
    assert bare == Pack({"a": icon("<g/>")}, {})


def test_labels_and_names_agree_on_their_letters() -> None:
    assert letters("twelve o\u2019clock") == letters("twelve-oclock") == letters("TwelveOClock")
    assert letters("piñata") == "pinata"
    assert letters("keycap: *") == "keycap"


def test_code_points_decide_where_a_pack_has_them() -> None:
    known = concepts(c1="apple", c2="pear", c3="plum")
    # The label would say otherwise for "pear"; the spelling with fe0f comes second; 9 is no concept.
    coded = Pack(
        {"pear": icon("drawn as 1"), "x": icon("2"), "y": icon("2 again"), "plum": icon("unlisted")},
        {"1": "pear", "2": "x", "2-fe0f": "y", "9": "x"})
    assert match({"s": coded}, known) == {"s": {"1": icon("drawn as 1"), "2": icon("2")}}


def test_labels_then_names_of_other_packs_where_it_has_none() -> None:
    known = concepts(c1="red apple", c2="hugging", c3="both")
    coded = Pack({"hug": icon("h"), "two": icon("t")}, {"2": "hug", "3": "two"})
    bare = Pack({"redapple": icon("a"), "hug": icon("b"), "two": icon("no"), "both": icon("c")}, {})
    found = match({"coded": coded, "bare": bare}, known)
    assert found["bare"] == {"1": icon("a"), "2": icon("b"), "3": icon("c")}
    assert list(found["coded"]) == ["2", "3"]
