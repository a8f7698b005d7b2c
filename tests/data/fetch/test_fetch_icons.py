"""The set `icons` on a small made-up collection: captions, families, splits."""

import csv
import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_packs import RED, Interrupting, Shelf, samples, tree
from PIL import Image

from aclip.data.fetch import icons
from aclip.data.fetch.icons import HELD_OUT, PACKAGE, Icons, caption_of, is_used
from aclip.data.fetch.progress import Silent
from aclip.errors import DataError, MissingDependencyError

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
    "two": {"icons": {"home-24px": {"body": RED, "width": 32}, "evil": {"body": '<image href="/etc/hostname"/>'}}},
    "seen-not": {"icons": {"home-line-duotone": {"body": RED}, "monkey-wrench": {"body": RED}}, "suffixes": None},
    **{family: {"icons": {"home": {"body": RED}}} for family in ("nc", "smileys", "brands", "old")},
}


def collection() -> dict[str, Any]:
    members = {f"json/{family}.json": {"prefix": family, **data} for family, data in FAMILIES.items()}
    return {"collections.json": COLLECTIONS, **members, "lib/license.txt": b"MIT", "readme.md": b"read me"}


@pytest.fixture
def small(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> Icons:
    monkeypatch.setattr(icons, "SAMPLES_PER_SHARD", 2)
    return Icons(shelf.put("@made/json", "1.0.0", collection()), held_out=("seen-not",), workers=1)


def test_the_set_is_pinned_as_documented() -> None:
    assert HELD_OUT == ("ph", "iconoir", "solar", "game-icons", "healthicons", "meteocons")
    assert (PACKAGE.spec, len(bytes.fromhex(PACKAGE.sha256))) == ("@iconify/json@2.2.535", 32)


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


def test_every_icon_lands_in_its_split(small: Icons, tmp_path: Path) -> None:
    folder = small.fetch(tmp_path, Silent())
    splits = ("train", "val_vendor", "val_both")
    found = {split: {key: facts for key, (facts, _) in samples(folder, split).items()} for split in splits}
    assert set(found["train"]) == {"one--bell-off", "one--home", "one--turns", "two--home"}
    assert set(found["val_vendor"]) == {"seen-not--home"}
    assert set(found["val_both"]) == {"seen-not--monkey-wrench"}
    assert found["val_both"]["seen-not--monkey-wrench"] == {
        "caption": "monkey wrench", "label": "monkey wrench", "style": "seen-not", "licence": "Apache-2.0"
    }  # fmt: skip


def test_a_caption_belongs_to_the_icon_with_the_shortest_name(small: Icons, tmp_path: Path) -> None:
    found = samples(small.fetch(tmp_path, Silent()), "train")
    image = np.asarray(Image.open(io.BytesIO(found["one--bell-off"][1])))
    assert image.shape == (128, 128, 4)
    assert (image == [255, 0, 0, 255]).all()
    wide = np.asarray(Image.open(io.BytesIO(found["two--home"][1])))[..., 3] == 255
    assert wide[32:96, :64].all()  # 32 x 16 units, of which the left half is drawn
    assert wide.sum() == 64 * 64


def test_what_cannot_be_drawn_is_skipped_and_named(small: Icons, tmp_path: Path) -> None:
    facts = json.loads((small.fetch(tmp_path, Silent()) / "dataset.json").read_bytes())
    assert facts["skipped"] == {
        "one--starts-empty": "nothing is drawn",
        "two--evil": "element <image> is not allowed",
    }
    assert facts["splits"]["train"] == {"samples": 4, "captions": 3, "styles": ["one", "two"]}
    assert facts["splits"]["val_vendor"] == {"samples": 1, "captions": 1, "styles": ["seen-not"]}


def test_licences_are_kept_by_family(small: Icons, tmp_path: Path) -> None:
    licences = small.fetch(tmp_path, Silent()) / "licences"
    with (licences / "licences.csv").open(newline="") as file:
        rows = {row["style"]: row["licence"] for row in csv.DictReader(file)}
    assert rows == {"one": "MIT", "two": "CC-BY-4.0", "seen-not": "Apache-2.0"}
    assert (licences / "package/lib/license.txt").read_bytes() == b"MIT"


def test_an_interrupted_fetch_continues_to_the_same_bytes(small: Icons, tmp_path: Path) -> None:
    whole = tree(small.fetch(tmp_path / "whole", Silent()))
    for unit, at in (("bytes", 1), *(("pictures", at) for at in range(1, 9))):
        with pytest.raises(KeyboardInterrupt):
            small.fetch(tmp_path / "cut", Interrupting(unit, at))
        assert not (tmp_path / "cut/icons/dataset.json").exists()
    assert tree(small.fetch(tmp_path / "cut", Silent())) == whole


def test_a_finished_set_needs_neither_network_nor_renderer(
    small: Icons, shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = small.fetch(tmp_path, Silent())
    before = tree(folder)
    (tmp_path / "packages" / small.package.filename).unlink()
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    small.fetch(tmp_path, Silent())
    assert tree(folder) == before
    assert len(shelf.calls) == 1


@pytest.mark.usefixtures("shelf")
def test_a_missing_renderer_is_said_before_the_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    with pytest.raises(MissingDependencyError, match="resvg-py"):
        Icons().fetch(tmp_path, Silent())


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"collections.json": b"no json"}, r"collections\.json has an unexpected form"),
        ({"collections.json": [1]}, r"collections\.json has an unexpected form"),
        ({"json/one.json": {"icons": {"home": {}}}}, r"json/one\.json has an unexpected form"),
        ({"json/one.json": {"icons": {"home": {"body": RED, "width": "wide"}}}}, r"json/one\.json has an unexpected"),
        ({"json/one.json": b"{"}, r"json/one\.json has an unexpected form"),
    ],
)
def test_a_collection_of_another_form_is_named(
    changed: dict[str, Any], said: str, shelf: Shelf, tmp_path: Path
) -> None:
    package = shelf.put("@made/json", "2.0.0", {**collection(), **changed})
    with pytest.raises(DataError, match=said):
        Icons(package, workers=1).fetch(tmp_path, Silent())


def test_another_package_is_named(shelf: Shelf, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has no collections\.json"):
        Icons(shelf.put("else", "1.0.0", {"a": b""}), workers=1).fetch(tmp_path, Silent())
