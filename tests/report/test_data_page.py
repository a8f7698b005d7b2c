"""The pages of `aclip data doctor` and `aclip data look`."""

import json
import os
from pathlib import Path

import pytest
from html_page import EVIL, Page
from PIL import Image

from aclip.data import open_source
from aclip.examination import Limits, examine
from aclip.report.data_page import write_data_page, write_look_page
from made_pictures import encode, picture


def test_findings_are_shown_with_images_and_captions_as_text(tmp_path: Path) -> None:
    folder = tmp_path / "pairs"
    folder.mkdir()
    pictures = {"a.png": encode(picture(0)), "b.png": encode(picture(0)), "c.png": b"no picture",
                "white.png": encode(Image.new("RGB", (24, 24), "white"))}
    for name, data in pictures.items():
        (folder / name).write_bytes(data)
        (folder / name).with_suffix(".txt").write_text(EVIL)
    examined = examine(open_source(str(folder)), limits=Limits("tiny", (16, 16), None))
    page = write_data_page(examined, tmp_path / "out")
    assert EVIL in Page(page).words("findings")
    text = page.read_text(encoding="utf-8")
    assert text.count("data:image/jpeg;base64,") == 6  # the copies, the blank one, three that share a caption
    for finding in examined.findings:
        assert f'id="{finding.name}"' in text
    record = json.loads((tmp_path / "out" / "data.json").read_text())
    assert {one["name"]: one["count"] for one in record["findings"]} == {
        finding.name: finding.count for finding in examined.findings}
    assert (record["samples"], record["usable"]) == (4, 3)
    assert record["findings"][0]["examples"][0][0]["key"] == "c.png"


def test_a_source_without_problems_says_so(tmp_path: Path) -> None:
    folder = tmp_path / "pairs"
    folder.mkdir()
    (folder / "a.png").write_bytes(encode(picture(1)))
    (folder / "a.txt").write_text("one")
    examined = examine(open_source(str(folder)), limits=Limits("tiny", (16, 16), None))
    assert "No problems found." in write_data_page(examined, tmp_path).read_text()


def test_undecodable_names_are_shown_escaped(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    try:
        folder.mkdir()
    except OSError:
        pytest.skip("this file system takes UTF-8 names alone")
    (folder / os.fsdecode(b"\xe9.png")).write_bytes(encode(Image.new("RGB", (24, 24), "white")))
    (folder / os.fsdecode(b"\xe9.txt")).write_text("blank")
    examined = examine(open_source(str(folder)), limits=Limits("tiny", (16, 16), None))
    page = Page(write_data_page(examined, tmp_path / "out"))
    assert "caf\\udce9" in page.words("")
    assert "\\udce9.png" in page.words("findings")
    assert json.loads((tmp_path / "out" / "data.json").read_text())["source"].endswith("caf\udce9")


def test_look_shows_images_captions_facts_and_advice(tmp_path: Path) -> None:
    samples = [(Image.new("RGBA", (640, 20), "red"), "a.png", ("one", EVIL)), (Image.new("L", (5, 5)), "b.png", ())]
    page = Page(write_look_page(tmp_path / "look.html", "pairs", [("samples", "2")], samples, [f"Beware of {EVIL}"]))
    assert "pairs samples 2 Samples Advice" in page.words("")
    for words in ("640x20", "a.png", f"one {EVIL}", "b.png", "no caption"):
        assert words in page.words("samples")
    assert f"Beware of {EVIL}" in page.words("advice")
    assert page.source.count("data:image/jpeg;base64,") == 2
    assert "advice" not in Page(write_look_page(tmp_path / "look.html", "pairs", [], [], [])).text
