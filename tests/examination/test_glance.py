"""`look` says in seconds how a source is understood, with a few samples."""

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from aclip import data
from aclip.data import RawSample, Source
from aclip.errors import ConfigError
from aclip.examination import look
from aclip.examination.glance import _evenly
from made_pictures import encode, picture


def test_a_source_is_summed_up_with_some_samples(pair_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (pair_folder / "020.png").write_bytes(b"")
    found = look(str(pair_folder), samples=3)
    assert [sample.name for sample in found.samples] == ["000.png", "039.png"]
    assert found.advice == ()
    out = capsys.readouterr().out
    assert out.startswith(found.summary)
    assert "40 images" in out
    assert "000.png: 24 x 24" in out
    assert "picture 39" in out
    assert "020.png: cannot be used, empty file" in out


def test_a_page_with_the_images(pair_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[tuple[object, ...]] = []

    def write_look_page(path: Path, *content: object) -> Path:
        written.append(content)
        return path

    monkeypatch.setitem(sys.modules, "aclip.report.data_page", SimpleNamespace(write_look_page=write_look_page))
    found = look(str(pair_folder), output=str(tmp_path / "look.html"))
    assert found.page == tmp_path / "look.html"
    ((title, facts, samples, advice),) = written
    assert title == str(pair_folder)
    assert ("samples", "40") in facts  # type: ignore[operator]
    image, name, captions = samples[0]  # type: ignore[index]
    assert (image.size, name, captions) == ((24, 24), "000.png", ("picture 0",))
    assert advice == []


def test_what_is_wrong_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(4):
        values = np.random.default_rng(number).integers(0, 4096, (24, 24), dtype=np.uint16)
        (tmp_path / f"{number}.png").write_bytes(encode(Image.fromarray(values)))
        (tmp_path / f"{number}.txt").write_text("Product")
    dark, same = look(str(tmp_path)).advice
    assert "nearly black" in dark
    assert "one caption for every image, 'Product'" in same
    assert capsys.readouterr().out.count("advice: ") == 2
    assert len(look(f"{tmp_path}?stretch=4095").advice) == 1


class Grouped(Source):
    """A source of three shards that remembers what was read."""

    spec = "grouped"
    groups = (10, 10, 10)

    def __init__(self) -> None:
        self.indices: set[int] = set()

    def __len__(self) -> int:
        return 30

    def name(self, index: int) -> str:
        return str(index)

    def read(self, index: int) -> RawSample:
        self.indices.add(index)
        return RawSample(str(index), encode(picture(index)), (f"picture {index}",))


def test_only_the_first_shard_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    source = Grouped()
    monkeypatch.setattr("aclip.data.sources.open_training", lambda _: source)
    assert len(look("grouped").samples) == 5
    assert max(source.indices) < 10


def test_every_part_of_a_mixture_is_shown(pair_folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "a.png").write_bytes(encode(picture(99)))
    (other / "a.txt").write_text("one")
    mixed = data.open_training([str(pair_folder), str(other)])
    assert _evenly(mixed, 4) == [0, 39, 40]


def test_no_samples_are_refused(pair_folder: Path) -> None:
    with pytest.raises(ConfigError, match="samples 0: give 1 or more"):
        look(str(pair_folder), samples=0)
