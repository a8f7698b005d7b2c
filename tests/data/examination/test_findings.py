"""The doctor finds what was put into a spoiled folder, and nothing else."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from aclip.data import CaptionTokenizer, decode_image, open_source
from aclip.data.examination import Examination, Finding, Limits, examine
from aclip.data.examination.doctor import left_out
from aclip.data.examination.duplicates import look_alikes
from aclip.data.examination.measure import hash_images, jpeg_size, look_at, measure
from aclip.errors import BadSampleError, ConfigError
from bad_samples import SKIPPED, make_mixed_folder
from made_pictures import WordTokenizer, encode

LIMITS = Limits("tiny", (16, 16), 8)


def smooth(number: int, side: int = 96) -> Image.Image:
    """A picture with shapes in it, which survives a JPEG."""
    coarse = np.random.default_rng(number).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)


def write(folder: Path, name: str, data: bytes, caption: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(data)
    (folder / name).with_suffix(".txt").write_text(caption)


@pytest.fixture
def spoiled(tmp_path: Path) -> Path:
    """Ten good pairs; every kind of trouble once."""
    folder = tmp_path / "spoiled"
    for number in range(10):
        write(folder, f"good_{number}.png", encode(smooth(number)), f"thing called {chr(97 + number)}")
    write(folder, "same_file.png", encode(smooth(0)), "thing called a")
    write(folder, "same_look.jpg", encode(smooth(1, 64), "JPEG", quality=60), "Thing  called B")
    write(folder, "other_words.png", encode(smooth(2)), "quite another thing")
    for number, colour in enumerate(("white", "navy")):
        write(folder, f"blank_{number}.png", encode(Image.new("RGB", (40, 40), colour)), f"nothing {colour}")
    write(folder, "small.png", encode(smooth(30, 12)), "a small one")
    write(folder, "long.png", encode(smooth(31).resize((400, 40))), "a long one")
    write(folder, "cut.png", encode(smooth(32)), "one two three four five six seven eight")
    write(folder, "whole.png", encode(smooth(33)), "one two three four five six seven")
    write(folder, "truncated.jpg", encode(smooth(34), "JPEG")[:900], "half a picture")
    write(folder, "no_words.png", encode(smooth(35)), " \n")
    return folder


def run(folder: Path, *against: Path, workers: int = 0) -> Examination:
    # seven words and an end fill a context of 8: a longer one tells what is cut from what just fits
    tokenizer = CaptionTokenizer(WordTokenizer(32))
    return examine(open_source(str(folder)), [open_source(str(one)) for one in against], limits=LIMITS,
                   tokenizer=tokenizer, workers=workers)


def by_name(examined: Examination) -> dict[str, Finding]:
    return {finding.name: finding for finding in examined.findings}


def keys(examined: Examination, finding: Finding) -> list[set[str]]:
    places = [[(examined.measured[source], row) for source, row in group] for group in finding.examples]
    return [{one.source.key(int(one.samples["index"][row])) for one, row in group} for group in places]


def test_every_trouble_is_found_and_named(spoiled: Path) -> None:
    examined = run(spoiled)
    found = by_name(examined)
    assert {name: finding.count for name, finding in found.items()} == {
        "unreadable": 1, "no-caption": 1, "blank": 2, "same-file": 2, "same-look": 1, "small": 1, "long": 1,
        "cut": 1, "same-caption": 2,
    }
    assert keys(examined, found["unreadable"]) == [{"truncated.jpg"}]
    assert found["unreadable"].details == (("truncated or damaged JPEG image", 1),)
    assert keys(examined, found["no-caption"]) == [{"no_words.png"}]
    assert {"good_0.png", "same_file.png"} in keys(examined, found["same-file"])
    assert keys(examined, found["same-look"]) == [{"good_1.png", "same_look.jpg"}]
    assert keys(examined, found["small"]) == [{"small.png"}]
    assert keys(examined, found["long"]) == [{"long.png"}]
    assert [finding.severity for finding in examined.findings] == sorted(
        (finding.severity for finding in examined.findings), key=("error", "warning", "note").index)
    assert all(finding.advice and finding.share <= 1 for finding in examined.findings)


def test_a_caption_that_just_fits_is_not_cut(spoiled: Path) -> None:
    examined = run(spoiled)
    captions = examined.measured[0].captions
    lengths = {open_source(str(spoiled)).key(int(row)): int(tokens)
               for row, tokens in zip(captions["sample"], captions["tokens"], strict=True)}
    assert lengths["whole.png"] == 8
    assert lengths["cut.png"] == 9
    assert lengths["good_0.png"] == 4


def test_measurements_do_not_depend_on_workers(spoiled: Path) -> None:
    alone, helped = run(spoiled).measured[0], run(spoiled, workers=2).measured[0]
    assert np.array_equal(alone.samples, helped.samples)
    assert np.array_equal(alone.captions, helped.captions)
    assert np.array_equal(alone.fingerprints, helped.fingerprints)


def test_bad_samples_are_those_that_training_skips(tmp_path: Path) -> None:
    examined = run(make_mixed_folder(tmp_path / "mixed"))
    source = examined.measured[0]
    bad = np.flatnonzero(source.samples["reason"] >= 0)
    assert {source.source.key(int(i)) for i in bad} == set(SKIPPED)


def test_pictures_shared_with_an_evaluation_set_are_found(spoiled: Path, tmp_path: Path) -> None:
    held_out = tmp_path / "held_out"
    write(held_out, "a.png", encode(smooth(5)), "thing called f")
    write(held_out, "b.jpg", encode(smooth(6, 72), "JPEG", quality=60), "something else")
    write(held_out, "c.png", encode(smooth(99)), "new")
    examined = run(spoiled, held_out)
    found = by_name(examined)
    assert keys(examined, found["leak-file"]) == [{"good_5.png", "a.png"}]
    assert dict(found["leak-file"].details) == {"with the same caption": 1, "with another caption": 0}
    assert keys(examined, found["leak-look"]) == [{"good_6.png", "b.jpg"}]
    assert dict(found["leak-look"].details) == {"with the same caption": 0, "with another caption": 1}
    assert sum("also in" in reason for reason in left_out(examined).values()) == 2


def test_a_clean_manifest_holds_the_rest_and_reads_clean(spoiled: Path, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in spoiled.iterdir()}
    cleaned = write_clean(run(spoiled), tmp_path / "clean.jsonl")
    rows = [json.loads(line) for line in cleaned.path.read_text().splitlines()]
    assert {Path(row["image"]).name for row in rows} == {
        *(f"good_{number}.png" for number in range(10)), "other_words.png", "small.png", "long.png", "cut.png",
        "whole.png"}
    assert rows[0]["image"] == "spoiled/cut.png"
    assert cleaned.kept == len(rows) == 15
    assert sum(cleaned.left_out.values()) == 6
    again = by_name(run(cleaned.path))
    assert not {"unreadable", "no-caption", "blank", "same-look"} & again.keys()
    assert {path: path.read_bytes() for path in spoiled.iterdir()} == before


def test_a_table_and_a_skip_list(spoiled: Path, tmp_path: Path) -> None:
    examined = run(spoiled)
    assert len(open_source(str(write_clean(examined, tmp_path / "clean.csv").path))) == 15
    names = write_clean(examined, tmp_path / "skip.txt").path.read_text().splitlines()
    assert sorted(names) == ["blank_0.png", "blank_1.png", "no_words.png", "same_file.png", "same_look.jpg",
                             "truncated.jpg"]


def test_a_table_holds_several_captions_in_as_many_rows(spoiled: Path, tmp_path: Path) -> None:
    (spoiled / "good_3.txt").write_text("one\ntwo\n")
    table = open_source(str(write_clean(run(spoiled), tmp_path / "clean.csv").path))
    captions = {table.key(index).rpartition("/")[2]: table.read(index).captions for index in range(len(table))}
    assert len(captions) == 15
    assert captions["good_3.png"] == ("one", "two")


def test_what_cannot_be_written_is_refused_at_once(spoiled: Path, tmp_path: Path) -> None:
    source = open_source(str(spoiled))
    with pytest.raises(ConfigError, match=r"the ending \.jsonl, \.csv, \.tsv"):
        check_fix(tmp_path / "clean.xlsx", source)
    (tmp_path / "there.csv").touch()
    with pytest.raises(ConfigError, match="is there already"):
        check_fix(tmp_path / "there.csv", source)


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9, 0.98])
def test_a_reduced_decode_finds_what_a_full_one_finds(share: float, progressive: bool) -> None:
    data = encode(smooth(3, 600), "JPEG", quality=90, progressive=progressive)
    cut = data[: int(share * len(data))]
    with pytest.raises(BadSampleError):
        decode_image(cut)
    with pytest.raises(BadSampleError):
        look_at(cut)


def test_the_size_of_a_jpeg_is_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(smooth(1).resize((300, 200)), "JPEG", exif=exif)
    assert jpeg_size(data) == decode_image(data).size == (200, 300)


def test_look_alikes_are_confirmed_and_not_only_hashed() -> None:
    pictures = [smooth(number, 128) for number in range(60)]
    copies = [picture.resize((80, 80)) for picture in pictures]
    hashes = hash_pictures(np.stack([shrink(one) for one in (*pictures, *copies)]))
    assert look_alikes(hashes.across, hashes.down, hashes.fingerprints).tolist() == [*range(60), *range(60)]
    same = np.zeros(120, np.uint64)  # all hashes equal: fingerprints decide
    assert len(set(look_alikes(same, same, hashes.fingerprints).tolist())) == 60


def test_captions_alike_share_their_loose_form() -> None:
    assert loose_caption("Two dogs, 1 cat!") == loose_caption("2 CAT: twó dogs")
    assert loose_caption("two dogs") != loose_caption("two cats")
    assert loose_caption("!!!") != loose_caption("???")
