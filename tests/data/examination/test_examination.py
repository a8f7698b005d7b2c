"""A good folder, spoiled in known ways: every spoilt sample is found, and nothing else."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from aclip.data import CaptionTokenizer, open_source
from aclip.data.doctor import Examination, Limits, check_fix, examine, write_clean
from aclip.data.doctor.measure import loose_caption
from aclip.errors import ConfigError
from bad_samples import SKIPPED, check_skipped, make_mixed_folder
from made_pictures import WordTokenizer, encode

CONTEXT = 8


def scene(number: int, side: int = 160) -> Image.Image:
    """Return a picture with structure of its own: soft blobs, as hashes of noise would say nothing."""
    chance = np.random.default_rng(number)
    coarse = Image.fromarray(chance.integers(0, 256, (5, 5, 3), dtype=np.uint8))
    return coarse.resize((side, side), Image.Resampling.BICUBIC)


@pytest.fixture
def good(tmp_path: Path) -> Path:
    folder = tmp_path / "good"
    folder.mkdir()
    for number in range(60):
        (folder / f"{number:02}.png").write_bytes(encode(scene(number)))
        (folder / f"{number:02}.txt").write_text(f"scene {chr(97 + number % 26)}{chr(97 + number // 26)} of many")
    return folder


def examined(spec: Path | str, *against: Path, workers: int = 0, side: int = 16) -> Examination:
    limits = Limits("tiny", (side, side), CONTEXT)
    return examine(
        open_source(str(spec)), [open_source(str(one)) for one in against], limits=limits,
        tokenizer=CaptionTokenizer(WordTokenizer(64)), workers=workers,
    )  # fmt: skip


def found(examination: Examination) -> dict[str, int]:
    return {finding.name: finding.count for finding in examination.findings}


def test_a_good_folder_has_nothing_to_find(good: Path) -> None:
    assert found(examined(good)) == {}


def add(folder: Path, name: str, data: bytes, caption: str | None) -> None:
    (folder / name).write_bytes(data)
    if caption is not None:
        (folder / name).with_suffix(".txt").write_text(caption)


def spoil(good: Path) -> None:
    add(good, "cut.png", encode(scene(99))[:300], "cut off")
    add(good, "text.jpg", b"no picture", "text")
    add(good, "silent.png", encode(scene(98)), None)
    add(good, "blank.png", encode(Image.new("RGB", (50, 50), "white")), "nothing there")
    add(good, "copy.png", encode(scene(3)), "a copy of three")
    add(good, "small.jpg", encode(scene(4, 320).resize((90, 90)), "JPEG", quality=60), "four again")
    add(good, "tiny.png", encode(scene(97, 12)), "a tiny thing")
    add(good, "long.png", encode(scene(96).resize((200, 20))), "a strip")
    add(good, "wordy.png", encode(scene(95)), "word " * 30)
    add(good, "same.png", encode(scene(94)), "SCENE aa of  many")
    add(good, "like.png", encode(scene(93)), "many, of scene ba!")


EXPECTED = {
    "unreadable": 2, "no-caption": 1, "blank": 1, "same-file": 1, "same-look": 1, "small": 1, "long": 1, "cut": 1,
    "same-caption": 1, "similar-caption": 1,
}  # fmt: skip


@pytest.mark.parametrize("workers", [0, 2])
def test_every_spoilt_sample_is_found(good: Path, workers: int) -> None:
    spoil(good)
    examination = examined(good, workers=workers)
    assert found(examination) == EXPECTED
    source = examination.measured[0].source
    names = {
        finding.name: {source.key(row) for group in finding.examples for _, row in group}
        for finding in examination.findings
    }
    assert names["unreadable"] == {"cut.png", "text.jpg"}
    assert names["same-file"] == {"03.png", "copy.png"}
    assert names["same-look"] == {"04.png", "small.jpg"}
    assert names["small"] == {"tiny.png"}
    assert names["cut"] == {"wordy.png"}
    assert [finding.severity for finding in examination.findings][:2] == ["error", "error"]


def test_what_training_skips_is_what_the_doctor_calls_bad(tmp_path: Path) -> None:
    folder = make_mixed_folder(tmp_path / "mixed")
    measured = examined(folder).measured[0]
    bad = np.flatnonzero(measured.samples["reason"] >= 0)
    names = {measured.source.key(int(row)) for row in bad}
    assert names == set(SKIPPED)
    check_skipped({(name, SKIPPED[name]) for name in names})


def test_leaks_into_an_evaluation_set(good: Path, tmp_path: Path) -> None:
    held_out = tmp_path / "held-out"
    held_out.mkdir()
    add(held_out, "x.png", encode(scene(5)), "scene fa of many")
    add(held_out, "y.jpg", encode(scene(6, 240), "JPEG", quality=70), "another caption")
    add(held_out, "z.png", encode(scene(90)), "new")
    examination = examined(good, held_out)
    assert found(examination) == {"leak-file": 1, "leak-look": 1}
    details = {finding.name: dict(finding.details) for finding in examination.findings}
    assert details["leak-file"] == {"with the same caption": 1, "with another caption": 0}
    assert details["leak-look"] == {"with the same caption": 0, "with another caption": 1}


@pytest.mark.parametrize("ending", [".jsonl", ".csv", ".tsv"])
def test_a_clean_manifest_is_clean_and_the_source_stays(good: Path, tmp_path: Path, ending: str) -> None:
    spoil(good)
    before = {path: path.read_bytes() for path in good.iterdir()}
    path = tmp_path / f"clean{ending}"
    check_fix(path, open_source(str(good)))
    cleaned = write_clean(examined(good), path)
    assert {path: path.read_bytes() for path in good.iterdir()} == before
    again = examined(path)
    assert set(found(again)) <= {"small", "long", "cut", "same-caption", "similar-caption", "same-look", "same-file"}
    assert len(again.measured[0].samples) == cleaned.kept
    assert cleaned.kept + sum(cleaned.left_out.values()) == 71
    # copies with captions of their own stay: what they say would be lost
    assert cleaned.left_out == {
        "a picture of a single colour": 1, "missing caption": 1, "not an image in a known format (JPEG, PNG, WEBP, "
        "GIF, BMP, TIFF, AVIF)": 1, "truncated or damaged PNG image": 1,
    }  # fmt: skip


def test_copies_without_a_caption_of_their_own_are_left_out(good: Path, tmp_path: Path) -> None:
    add(good, "copy.png", encode(scene(3)), "scene da of many")
    cleaned = write_clean(examined(good), tmp_path / "clean.jsonl")
    assert cleaned.left_out == {"a copy of another picture, with no caption of its own": 1}
    rows = [json.loads(line) for line in (tmp_path / "clean.jsonl").read_text().splitlines()]
    assert rows[3] == {"image": "good/03.png", "caption": "scene da of many"}
    skip = tmp_path / "skip.txt"
    write_clean(examined(good), skip)
    assert skip.read_text() == "copy.png\n"


def test_clean_lists_that_cannot_be_written(good: Path, tmp_path: Path) -> None:
    source = open_source(str(good))
    with pytest.raises(ConfigError, match="give it the ending"):
        check_fix(tmp_path / "clean.parquet", source)
    (tmp_path / "there.csv").touch()
    with pytest.raises(ConfigError, match="is there already"):
        check_fix(tmp_path / "there.csv", source)


def test_captions_that_differ_in_little() -> None:
    same = ["Two dogs, 1 cat!", "2 cat: Two dogs", "two DOGS 7 cát"]
    assert len({loose_caption(text) for text in same}) == 1
    assert len({loose_caption(text) for text in ["a dog", "a cat", "!!!", "???", "dog"]}) == 5
