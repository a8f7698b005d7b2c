"""`look` says in seconds how a source is understood, and what is wrong with it as far as a few samples tell."""

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from aclip import data
from aclip.data import RawSample, Source, open_source
from aclip.data.examination import advise
from aclip.errors import ConfigError
from made_pictures import encode, picture


def test_a_source_is_summed_up_with_some_samples(pair_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = data.look(str(pair_folder), samples=3)
    assert found.count == 40
    assert [sample.name for sample in found.samples] == ["000.png", "020.png", "039.png"]
    assert found.advice == ()
    out = capsys.readouterr().out
    assert out.startswith(found.summary)
    assert "40 images" in out
    assert "020.png, 24 x 24" in out
    assert "picture 20" in out


def test_a_page_with_the_images(pair_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[tuple[object, ...]] = []

    def write_look_page(path: Path, *content: object) -> Path:
        written.append(content)
        return path

    monkeypatch.setitem(sys.modules, "aclip.report.data_page", SimpleNamespace(write_look_page=write_look_page))
    found = data.look(str(pair_folder), output=str(tmp_path / "look.html"))
    assert found.page == tmp_path / "look.html"
    ((title, facts, samples, advice),) = written
    assert title == str(pair_folder)
    assert ("samples", "40") in facts  # type: ignore[operator]
    image, name, captions = samples[0]  # type: ignore[index]
    assert (image.size, name, captions) == ((24, 24), "000.png", ("picture 0",))
    assert advice == []


def test_one_caption_for_all_is_said(tmp_path: Path) -> None:
    for number in range(4):
        (tmp_path / f"{number}.png").write_bytes(encode(picture(number)))
        (tmp_path / f"{number}.txt").write_text("Product")
    (sentence,) = data.look(str(tmp_path)).advice
    assert "one caption for every image, 'Product'" in sentence


def test_12_bit_images_are_said(tmp_path: Path) -> None:
    for number in range(4):
        values = np.random.default_rng(number).integers(0, 4096, (24, 24), dtype=np.uint16)
        (tmp_path / f"{number}.png").write_bytes(encode(Image.fromarray(values)))
        (tmp_path / f"{number}.txt").write_text(f"scan {number}")
    (sentence,) = advise(open_source(str(tmp_path)))
    assert "4 of 4 images looked at have more than 8 bits and come out nearly black" in sentence
    assert "?stretch=4095" in sentence
    assert advise(open_source(f"{tmp_path}?stretch=4095")) == []


def test_damaged_images_are_said(pair_folder: Path) -> None:
    (pair_folder / "007.png").write_bytes(b"")
    (sentence,) = advise(open_source(str(pair_folder)))
    assert sentence.startswith("1 of 40 samples looked at cannot be read, e.g. 007.png: empty file")


class Grouped(Source):
    """A source of three shards that remembers what was read."""

    spec = "grouped"
    groups = (10, 10, 10)

    def __init__(self) -> None:
        self.indices: list[int] = []

    def __len__(self) -> int:
        return 30

    def name(self, index: int) -> str:
        return str(index)

    def read(self, index: int) -> RawSample:
        self.indices.append(index)
        return RawSample(str(index), encode(picture(index)), (f"picture {index}",))


def test_only_the_first_shard_is_read() -> None:
    source = Grouped()
    assert advise(source) == []
    assert max(source.indices) < 10


def test_every_part_of_a_mixture_is_read(pair_folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "a.png").write_bytes(b"damaged")
    (other / "a.txt").write_text("one")
    (sentence,) = advise(data.open_training([str(pair_folder), str(other)]))
    assert "a.png: not an image in a known format" in sentence


def test_no_samples_are_refused(pair_folder: Path) -> None:
    with pytest.raises(ConfigError, match="samples 0: give 1 or more"):
        data.look(str(pair_folder), samples=0)
