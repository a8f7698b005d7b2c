"""The set `icons` on a small synthetic collection: captions, families, splits."""

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from synthetic_packages import RED, Shelf, samples

from aclip.data.sets import SETS, fetch
from aclip.data.sets import icons as module
from aclip.data.sets.icons import HELD_OUT, PACKAGE, caption_of, is_used

pytest.importorskip("resvg_py")

BLUE = '<path fill="#00f" d="M0 0h16v16H0z"/>'


def info(spdx: str = "MIT", category: str | None = "UI 24px", **more: Any) -> dict[str, Any]:
    found = {"name": spdx.lower(), "author": {"name": "Some One"}, "license": {"spdx": spdx}, **more}
    return found if category is None else {**found, "category": category}


COLLECTIONS = {
    "one": info(),
    "two": info("CC-BY-4.0", None),
    "seen-not": info("Apache-2.0"),
    "nc": info("CC-BY-NC-4.0"),
    "smileys": info(category="Emoji"),
    "brands": info(category="Logos"),
    "old": info(hidden=True),
}
FAMILIES: dict[str, dict[str, Any]] = {
    "one": {
        "icons": {
            "bell-off-outline": {"body": BLUE},
            "bell-off": {"body": RED},
            "baseline-home": {"body": RED},
            "cat": {"body": RED, "hidden": True},
            "turns": {"body": f'{RED}<animate attributeName="x" values="1;2" repeatCount="indefinite"/>'},
            "starts-empty": {"body": '<path d="M0 0h9v9z" opacity="0"><animate attributeName="opacity"/></path>'},
            "c2": {"body": RED},
        },
        "prefixes": {"baseline": "Baseline"},
        "aliases": {"alarm": {"parent": "bell-off"}},
        "width": 16,
        "height": 16,
    },
    "two": {"icons": {"home-24px": {"body": RED, "width": 32}}},
    "seen-not": {"icons": {"home-line-duotone": {"body": RED}, "monkey-wrench": {"body": RED}}, "suffixes": None},
    **{family: {"icons": {"home": {"body": RED}}} for family in ("nc", "smileys", "brands", "old")},
}


def collection() -> dict[str, Any]:
    members = {f"json/{family}.json": {"prefix": family, **data} for family, data in FAMILIES.items()}
    return {"collections.json": COLLECTIONS, **members, "lib/license.txt": b"MIT", "readme.md": b"read me"}


@pytest.fixture
def folder(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> Path:
    package = shelf.put("@iconify/json", collection())
    monkeypatch.setattr(module, "HELD_OUT", ("seen-not",))
    monkeypatch.setitem(SETS, "icons", replace(SETS["icons"], packages=(package,), shard_size=2))
    return fetch("icons", workers=0)


def test_the_set_is_pinned_as_documented() -> None:
    assert HELD_OUT == ("ph", "iconoir", "solar", "game-icons", "healthicons", "meteocons")
    assert PACKAGE.spec == "@iconify/json@2.2.535"


@pytest.mark.parametrize(
    ("name", "caption"),
    [
        ("home", "home"),
        ("monkey-wrench", "monkey wrench"),
        ("file-text-lock", "file text lock"),
        ("file-text-lock-open", None),  # four words
        ("arrow-down-24px", "arrow down"),
        ("arrow-down-20-filled", "arrow down"),
        ("star-outline-rounded", "star"),
        ("outline", "outline"),  # nothing would be left
        ("outline-star", "outline star"),
        ("4k", None),
        ("dice-4-fill", "dice"),
        ("tv", None),
        ("line-chart", "line chart"),
        ("mañana", None),
        ("x-", None),
        ("", None),
    ],
)
def test_a_caption_is_the_name_without_its_variant(name: str, caption: str | None) -> None:
    assert caption_of(name) == caption


def test_variants_that_a_family_declares_are_taken_off_first_the_longest_one() -> None:
    assert caption_of("sharp-home", ["", "sharp"]) == "home"
    assert caption_of("cat-mono", [], ["", "mono"]) == "cat"
    assert caption_of("cat-big-mono", [], ["mono", "big-mono"]) == "cat"
    assert caption_of("mono", ["mono"], ["mono"]) == "mono"


def test_families_that_are_left_out() -> None:
    assert [name for name, one in COLLECTIONS.items() if is_used(one)] == ["one", "two", "seen-not"]
    assert not is_used(info("CC-BY-NC-SA-4.0"))
    assert is_used({})


def test_every_icon_is_in_its_split(folder: Path) -> None:
    splits = ("train", "val_vendor", "val_both")
    found = {split: {key: fields for key, (fields, _) in samples(folder, split).items()} for split in splits}
    assert set(found["train"]) == {"one--bell-off", "one--home", "one--turns", "two--home"}
    assert set(found["val_vendor"]) == {"seen-not--home"}
    assert found["val_both"] == {"seen-not--monkey-wrench": {"captions": ["monkey wrench"], "label": "monkey wrench"}}


def test_a_caption_belongs_to_the_icon_with_the_shortest_name(folder: Path) -> None:
    found = samples(folder, "train")
    image = np.asarray(Image.open(io.BytesIO(found["one--bell-off"][1])))
    assert image.shape == (128, 128, 4)
    assert (image == [255, 0, 0, 255]).all()
    wide = np.asarray(Image.open(io.BytesIO(found["two--home"][1])))[..., 3] == 255
    assert wide[32:96, :64].all()  # 32 x 16 units, of which the left half is drawn
    assert wide.sum() == 64 * 64


def test_what_shows_nothing_is_skipped_and_named(folder: Path) -> None:
    (skipped,) = (folder / "train/skipped.jsonl").read_text().splitlines()
    assert json.loads(skipped) == {"shard": "000002.tar", "key": "one--starts-empty", "reason": "nothing is drawn"}
    sizes = json.loads((folder / "dataset.json").read_text())["splits"]
    assert sizes == {"train": {"samples": 4}, "val_vendor": {"samples": 1}, "val_both": {"samples": 1}}


def test_licences_are_kept(folder: Path) -> None:
    assert json.loads((folder / "licences/collections.json").read_text()) == COLLECTIONS
    assert (folder / "licences/lib/license.txt").read_bytes() == b"MIT"
