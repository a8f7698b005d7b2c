"""The doctor finds what was put into a spoiled folder, and nothing else; what it writes leaves just that out."""

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from aclip import data
from aclip.data import CaptionTokenizer, RawSample, Source, decode_image, open_source
from aclip.errors import BadSampleError, ConfigError
from aclip.examination import Examination, Finding, Limits, diagnosis, doctor, examine
from aclip.examination.diagnosis import left_out, load_example, write_fix
from aclip.examination.findings import find_all
from aclip.examination.measure import find_duplicates, hash_images, jpeg_size, look_alikes, look_at, measure
from bad_samples import SKIPPED, make_mixed_folder
from made_pictures import WordTokenizer, encode

LIMITS = Limits("tiny", (16, 16), 8)


def smooth(number: int, side: int = 96) -> Image.Image:
    """An image with shapes in it, which survives a JPEG."""
    coarse = np.random.default_rng(number).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)


def write(folder: Path, name: str, content: bytes, caption: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(content)
    (folder / name).with_suffix(".txt").write_text(caption)


@pytest.fixture
def good(tmp_path: Path) -> Path:
    folder = tmp_path / "spoiled"
    for number in range(10):
        write(folder, f"good_{number}.png", encode(smooth(number)), f"thing called {chr(97 + number)}")
    return folder


@pytest.fixture
def spoiled(good: Path) -> Path:
    """Ten good pairs; every kind of trouble once."""
    write(good, "same_file.png", encode(smooth(0)), "thing called a")
    write(good, "same_look.jpg", encode(smooth(1, 64), "JPEG", quality=60), "Thing  called B")
    write(good, "other_words.png", encode(smooth(2)), "quite another thing")
    for number, colour in enumerate(("white", "navy")):
        write(good, f"blank_{number}.png", encode(Image.new("RGB", (40, 40), colour)), f"nothing {colour}")
    write(good, "small.png", encode(smooth(30, 12)), "a small one")
    write(good, "cut.png", encode(smooth(32)), "one two three four five six seven eight")
    write(good, "whole.png", encode(smooth(33)), "one two three four five six seven")
    write(good, "truncated.jpg", encode(smooth(34), "JPEG")[:900], "half an image")
    write(good, "no_words.png", encode(smooth(35)), " \n")
    return good


def run(folder: Path, *against: Path, workers: int = 0) -> Examination:
    # seven words and an end fill a context of 8: a longer one tells what is cut from what just fits
    tokenizer = CaptionTokenizer(WordTokenizer(32))
    return examine(open_source(str(folder)), [open_source(str(one)) for one in against], limits=LIMITS,
                   tokenizer=tokenizer, workers=workers)


def by_name(examined: Examination) -> dict[str, Finding]:
    return {finding.name: finding for finding in examined.findings}


def names(examined: Examination, finding: Finding) -> list[set[str]]:
    return [{load_example(examined, place).key for place in group} for group in finding.examples]


def test_a_good_folder_has_no_findings(good: Path) -> None:
    assert by_name(run(good)) == {}


def test_every_trouble_is_found_and_named(spoiled: Path) -> None:
    examined = run(spoiled)
    found = by_name(examined)
    assert {name: finding.count for name, finding in found.items()} == {
        "unreadable": 1, "no-caption": 1, "blank": 2, "duplicate": 3, "small": 1, "cut": 1, "same-caption": 2}
    assert names(examined, found["unreadable"]) == [{"truncated.jpg"}]
    assert found["unreadable"].details == (("truncated or damaged JPEG image", 1),)
    assert names(examined, found["no-caption"]) == [{"no_words.png"}]
    assert names(examined, found["duplicate"]) == [
        {"good_0.png", "same_file.png"}, {"good_1.png", "same_look.jpg"}, {"good_2.png", "other_words.png"}]
    assert found["duplicate"].details == (("the same file", 2), ("in another size, format or quality", 1))
    assert names(examined, found["small"]) == [{"small.png"}]
    assert [finding.severity for finding in examined.findings] == sorted(
        (finding.severity for finding in examined.findings), key=("error", "warning", "note").index)
    assert all(finding.advice and finding.share <= 1 for finding in examined.findings)


def test_a_caption_that_just_fits_is_not_cut(spoiled: Path) -> None:
    captions = run(spoiled).measured[0].captions
    lengths = {open_source(str(spoiled)).name(int(row)): int(tokens)
               for row, tokens in zip(captions["sample"], captions["tokens"], strict=True)}
    assert (lengths["whole.png"], lengths["cut.png"], lengths["good_0.png"]) == (8, 9, 4)


def test_measurements_do_not_depend_on_workers(spoiled: Path) -> None:
    alone, helped = run(spoiled).measured[0], run(spoiled, workers=2).measured[0]
    assert alone.samples.equals(helped.samples)
    assert alone.captions.equals(helped.captions)
    assert np.array_equal(alone.fingerprints, helped.fingerprints)


def test_bad_samples_are_those_that_training_skips(tmp_path: Path) -> None:
    measured = run(make_mixed_folder(tmp_path / "mixed")).measured[0]
    assert {measured.source.name(int(i)) for i in np.flatnonzero(measured.samples["reason"] != "")} == set(SKIPPED)


def test_images_shared_with_an_evaluation_set_are_found(spoiled: Path, tmp_path: Path) -> None:
    held_out = tmp_path / "held_out"
    write(held_out, "a.png", encode(smooth(5)), "thing called f")
    write(held_out, "b.jpg", encode(smooth(6, 72), "JPEG", quality=60), "something else")
    write(held_out, "c.png", encode(smooth(99)), "new")
    examined = run(spoiled, held_out)
    found = by_name(examined)
    assert names(examined, found["leak"]) == [{"good_5.png", "a.png"}, {"good_6.png", "b.jpg"}]
    assert dict(found["leak"].details) == {"the same file": 1, "another file that looks the same": 1,
                                           "with the same caption": 1}
    assert sum("also in" in reason for reason in left_out(examined).values()) == 2


def test_one_caption_for_all_images_is_an_error(tmp_path: Path) -> None:
    for number in range(5):
        write(tmp_path / "one", f"{number}.png", encode(smooth(number)), "A product.")
    (finding,) = run(tmp_path / "one").findings
    assert (finding.name, finding.severity, finding.count) == ("one-caption", "error", 5)


def test_12_bit_values_in_16_bit_files_are_an_error_and_stretched_ones_are_not(tmp_path: Path) -> None:
    for number in range(5):
        values = np.asarray(smooth(number).convert("L")).astype(np.uint16) * 16
        for ending, image_format in (("png", "PNG"), ("tif", "TIFF")):
            write(tmp_path / "xrays", f"{number}_{ending}.{ending}", encode(Image.fromarray(values), image_format),
                  f"scan {number} {ending}")
    examined = run(tmp_path / "xrays")
    found = by_name(examined)
    assert (found["dark"].severity, found["dark"].count) == ("error", 10)
    assert found.keys() == {"dark"}  # and neither "blank" nor "duplicate"
    assert left_out(examined) == {}
    stretched = by_name(examine(open_source(f"{tmp_path / 'xrays'}?stretch=4095"), limits=LIMITS, workers=0))
    assert "dark" not in stretched


class Failing(Source):
    """Samples that all fail for reasons of their own."""

    spec = "failing"

    def __len__(self) -> int:
        return 40_000

    def name(self, index: int) -> str:
        return str(index)

    def read(self, index: int) -> RawSample:
        raise BadSampleError(f"failed with code {index}")


def test_more_reasons_than_16_bits_count() -> None:
    measured = measure(Failing())
    assert measured.samples["reason"].nunique() == 40_000
    (finding,) = find_all([measured], find_duplicates([measured]), LIMITS)
    assert (finding.count, len(finding.details), len(finding.examples)) == (40_000, 100, 8)


def test_names_that_are_not_utf8(good: Path, tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.png")
    (good / name).write_bytes(encode(smooth(50)))
    (good / name).with_suffix(".txt").write_text("a café")
    (good / os.fsdecode(b"caf\xe9_2.png")).write_bytes(b"damaged")
    examined = run(good)
    assert names(examined, by_name(examined)["unreadable"]) == [{"caf\\udce9_2.png"}]
    write_fix(examined, tmp_path / "names.txt")
    assert (tmp_path / "names.txt").read_text() == "caf\\udce9_2.png\n"
    packed = data.pack(str(good), output=str(tmp_path / "p"), leave_out=str(tmp_path / "names.txt"), workers=0)
    assert len(open_source(str(packed))) == 11


LEFT_OUT = ["blank_0.png", "blank_1.png", "no_words.png", "same_file.png", "same_look.jpg", "truncated.jpg"]


def test_names_to_leave_out_are_what_pack_takes(spoiled: Path, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in spoiled.iterdir()}
    reasons = write_fix(run(spoiled), tmp_path / "names.txt")
    assert {path: path.read_bytes() for path in spoiled.iterdir()} == before
    assert sum(reasons.values()) == len(LEFT_OUT)
    assert reasons["a duplicate without a caption of its own"] == 2
    assert sorted((tmp_path / "names.txt").read_text().splitlines()) == LEFT_OUT
    packed = data.pack(str(spoiled), output=str(tmp_path / "p"), leave_out=str(tmp_path / "names.txt"), workers=0)
    assert by_name(run(packed)).keys() == {"small", "cut", "duplicate"}  # the last with captions of its own


@pytest.fixture
def _light(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a page, which is tested with the other pages, nor a model."""
    monkeypatch.setattr(diagnosis, "_needs", lambda model: (Limits(model, (16, 16), None), None))
    stub = SimpleNamespace(write_data_page=lambda examined, folder: folder / "data.html")
    monkeypatch.setitem(sys.modules, "aclip.report.data_page", stub)


@pytest.mark.usefixtures("_light")
def test_the_verb(spoiled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fix = tmp_path / "names.txt"
    examined = doctor(str(spoiled), output=str(tmp_path / "out"), fix=str(fix), workers=0)
    out = capsys.readouterr().out
    assert "20 of 20 samples examined, 18 usable" in out
    assert "Images that cannot be read" in out
    assert f"{fix}: 14 samples are kept, left out: 2 an image of a single colour" in out
    assert f"next: aclip data pack '{spoiled}' --leave-out {fix}" in out
    assert f"done. page: {tmp_path / 'out' / 'data.html'}" in out
    assert examined.limits.model == "vit-tiny"
    for options, said in (({"fix": str(fix)}, "exists already: name a new file"), ({"limit": 0}, "limit 0"),
                          ({"workers": -1}, "workers -1: give 0 or more"),
                          ({"fix": "a.txt", "limit": 3}, "leave out the limit")):
        with pytest.raises(ConfigError, match=said):
            doctor(str(spoiled), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9, 0.98])
def test_a_reduced_decode_finds_what_a_full_one_finds(share: float, progressive: bool) -> None:
    content = encode(smooth(3, 600), "JPEG", quality=90, progressive=progressive)
    cut = content[: int(share * len(content))]
    with pytest.raises(BadSampleError):
        decode_image(cut)
    with pytest.raises(BadSampleError):
        look_at(cut, {})


def test_the_size_of_a_jpeg_is_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    content = encode(smooth(1).resize((300, 200)), "JPEG", exif=exif)
    assert jpeg_size(content) == decode_image(content).size == (200, 300)


def test_look_alikes_are_confirmed_and_not_only_hashed() -> None:
    images = [smooth(number, 128) for number in range(60)]
    copies = [image.resize((80, 80)) for image in images]
    across, down, _, prints = hash_images(np.stack([look_at(encode(one), {}) for one in (*images, *copies)]))
    assert look_alikes(across, down, prints).tolist() == [*range(60), *range(60)]
    same = np.zeros(120, np.uint64)  # all hashes equal: fingerprints decide
    assert len(set(look_alikes(same, same, prints).tolist())) == 60


@pytest.mark.slow
def test_a_model_says_what_it_takes() -> None:
    limits, tokenizer = diagnosis._needs("vit-tiny")
    assert limits.context_length is not None
    assert tokenizer is not None
    assert tokenizer.context_length == 4 * limits.context_length
