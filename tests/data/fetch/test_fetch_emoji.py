"""The set `emoji` on small made-up packs: splits, samples, resuming, licences."""

import csv
import json
import sys
import tarfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from made_packs import RED, Interrupting, Shelf, emoji_entry, tree

from aclip.data.fetch import emoji, render
from aclip.data.fetch.emoji import COUNTS, LABELS, STYLES, Emoji, Style
from aclip.data.fetch.progress import Silent
from aclip.data.sources import open_source
from aclip.errors import DataError, MissingDependencyError

pytest.importorskip("resvg_py")

# By `printf concept1f607 | sha1sum` and so on: HELD_OUT begin below 1999999a, a tenth of 2^32, KNOWN above.
KNOWN = {"1f600": "grinning face", "2764": "red heart", "1f525": "fire"}
HELD_OUT = {"1f607": "smiling face with halo", "1f60b": "face savoring food"}


def pack(labels: dict[str, str], coded: bool, spdx: str, body: str = RED) -> dict[str, Any]:
    names = {code: label.replace(" ", "-") for code, label in labels.items()}
    return {
        "icons.json": {"icons": {name: {"body": body} for name in names.values()}, "width": 16, "height": 16},
        "chars.json": names if coded else {},
        "info.json": {"name": spdx.lower(), "author": {"name": "Some, One"}, "license": {"spdx": spdx}},
        "README.md": b"how it may be used",
        "package.json": {},
    }


@pytest.fixture
def small(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> Emoji:
    """Five concepts in two styles, the one without codes held out, in shards of two."""
    monkeypatch.setattr(emoji, "SAMPLES_PER_SHARD", 2)
    everything = {**KNOWN, **HELD_OUT}
    entries = [emoji_entry(code.upper(), label, tags=("a tag",)) for code, label in everything.items()]
    entries[1]["hexcode"] = "2764-FE0F"
    labels = shelf.put("labels", "1.0.0", {"en/data.json": entries, "LICENSE": b"MIT"})
    coded = shelf.put("@made/seen", "1.0.0", pack(everything, True, "MIT"))
    other = shelf.put("@made/unseen", "1.0.0", pack(everything, False, "CC-BY-4.0"))
    counts = {"train": 3, "val_vendor": 3, "val_concept": 2, "val_both": 2}
    return Emoji((Style(coded), Style(other, held_out=True)), labels, counts, workers=1)


def test_the_set_is_pinned_as_documented() -> None:
    assert sum(COUNTS.values()) == 12_720
    held_out = {style.name for style in STYLES if style.held_out}
    assert held_out == {"openmoji", "fluent-emoji-flat", "fluent-emoji"}
    pins = [LABELS, *(style.package for style in STYLES)]
    assert len({pin.sha256 for pin in pins}) == len(pins) == 11
    assert all(len(bytes.fromhex(pin.sha256)) == 32 for pin in pins)
    assert all(pin.version.replace(".", "").isdigit() for pin in pins)


def test_every_picture_lands_in_its_split_with_all_that_is_known(small: Emoji, tmp_path: Path) -> None:
    folder = small.fetch(tmp_path, Silent())
    assert folder == tmp_path / "emoji"
    found: Counter[tuple[str, str, str]] = Counter()
    for split in COUNTS:
        source = open_source(str(folder / split))
        for index in range(len(source)):
            sample = source.read(index)
            style, _, code = Path(sample.key).name.partition("-")
            assert sample.label == {**KNOWN, **HELD_OUT}[code]
            assert sample.captions == (sample.label,)
            assert sample.tags == ("a tag",)
            assert sample.image.startswith(b"\x89PNG")
            found[split, style, code] += 1
    assert found == Counter(
        [("train", "seen", code) for code in KNOWN]
        + [("val_vendor", "unseen", code) for code in KNOWN]
        + [("val_concept", "seen", code) for code in HELD_OUT]
        + [("val_both", "unseen", code) for code in HELD_OUT]
    )


def test_the_members_of_a_sample(small: Emoji, tmp_path: Path) -> None:
    folder = small.fetch(tmp_path, Silent())
    members: dict[str, bytes] = {}
    for path in folder.glob("val_vendor/*.tar"):
        with tarfile.open(path) as archive:
            for member in archive:
                stream = archive.extractfile(member)
                assert stream is not None
                members[member.name] = stream.read()
    assert len(members) == 9
    assert members["unseen-2764.txt"] == b"red heart"
    assert json.loads(members["unseen-2764.json"]) == {
        "caption": "red heart",
        "tags": ["a tag"],
        "label": "red heart",
        "concept": "2764",
        "group": 0,
        "style": "unseen",
        "licence": "CC-BY-4.0",
    }


def test_the_summary_counts_what_is_there(small: Emoji, tmp_path: Path) -> None:
    facts = json.loads((small.fetch(tmp_path, Silent()) / "dataset.json").read_bytes())
    assert facts["splits"]["train"] == {"samples": 3, "captions": 3, "styles": ["seen"]}
    assert facts["splits"]["val_both"] == {"samples": 2, "captions": 2, "styles": ["unseen"]}
    assert set(facts["shards"]) == {
        "train/000000.tar", "train/000001.tar", "val_vendor/000000.tar", "val_vendor/000001.tar",
        "val_concept/000000.tar", "val_both/000000.tar",
    }  # fmt: skip


def test_licences_are_kept_beside_the_pictures(small: Emoji, tmp_path: Path) -> None:
    licences = small.fetch(tmp_path, Silent()) / "licences"
    with (licences / "licences.csv").open(newline="") as file:
        rows = {row["style"]: row for row in csv.DictReader(file)}
    assert set(rows) == {"seen", "unseen", "(labels)"}
    assert rows["unseen"]["licence"] == "CC-BY-4.0"
    assert rows["unseen"]["author"] == "Some, One"
    assert (rows["seen"]["package"], rows["seen"]["version"]) == ("@made/seen", "1.0.0")
    assert (licences / "seen" / "README.md").read_bytes() == b"how it may be used"
    assert (licences / "labels" / "LICENSE").read_bytes() == b"MIT"


def test_an_interrupted_fetch_continues_to_the_same_bytes(small: Emoji, tmp_path: Path) -> None:
    whole = tree(small.fetch(tmp_path / "whole", Silent()))
    for unit, at in [("bytes", 1), ("bytes", 3), *(("pictures", at) for at in range(1, 11))]:
        with pytest.raises(KeyboardInterrupt):
            small.fetch(tmp_path / "cut", Interrupting(unit, at))
        assert not (tmp_path / "cut/emoji/dataset.json").exists()
    assert tree(small.fetch(tmp_path / "cut", Silent())) == whole


def test_what_is_done_is_not_done_again(
    small: Emoji, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = [0]
    real = render.render

    def counting(*args: Any) -> bytes:
        drawn[0] += 1
        return real(*args)

    monkeypatch.setattr(render, "render", counting)
    with pytest.raises(KeyboardInterrupt):
        small.fetch(tmp_path, Interrupting("pictures", 5))  # within the third shard
    before = drawn[0]
    small.fetch(tmp_path, Silent())
    # The first two shards (train: two pictures and one) were there.
    assert drawn[0] - before == 10 - 3


def test_a_finished_set_needs_neither_network_nor_renderer(
    small: Emoji, shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = small.fetch(tmp_path, Silent())
    calls = len(shelf.calls)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    assert small.fetch(tmp_path, Silent()) == folder
    assert len(shelf.calls) == calls
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_a_damaged_set_is_mended(small: Emoji, tmp_path: Path) -> None:
    folder = small.fetch(tmp_path, Silent())
    whole = tree(folder)
    (folder / "train/000001.tar").write_bytes(b"damaged")
    assert tree(small.fetch(tmp_path, Silent())) == whole


def test_a_drawing_that_means_harm_is_skipped_and_named(
    small: Emoji, shelf: Shelf, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    evil = pack(KNOWN, True, "MIT")
    evil["icons.json"]["icons"]["fire"] = {"body": '<image href="/etc/hostname"/>'}
    evil["icons.json"]["icons"]["red-heart"] = {"body": RED, "width": 1e300}
    styles = (Style(shelf.put("@made/evil", "1.0.0", evil)),)
    folder = replace(small, styles=styles, counts=None).fetch(tmp_path, Silent())
    facts = json.loads((folder / "dataset.json").read_bytes())
    assert facts["splits"]["train"]["samples"] == 1
    assert facts["skipped"] == {
        "evil-1f525": "element <image> is not allowed",
        "evil-2764": "drawn in a rectangle of 1e+300 x 16.0",
    }
    assert "skipped evil-1f525: element <image> is not allowed" in caplog.text


def test_other_counts_than_pinned_are_an_error(small: Emoji, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"'train': 3.* where .*'train': 4"):
        replace(small, counts={**(small.counts or {}), "train": 4}).fetch(tmp_path, Silent())


def test_a_missing_renderer_is_said_before_the_download(
    small: Emoji, shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    with pytest.raises(MissingDependencyError, match="resvg-py"):
        small.fetch(tmp_path, Silent())
    assert shelf.calls == []
