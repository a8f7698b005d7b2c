"""The page of `aclip data doctor`."""

import json
from pathlib import Path

from PIL import Image

from aclip.data import open_source
from aclip.data.doctor import Limits, examine
from aclip.report.data_page import write_data_page
from made_pictures import encode, picture


def test_the_page_shows_findings_with_pictures_and_escapes_captions(tmp_path: Path) -> None:
    folder = tmp_path / "pairs"
    folder.mkdir()
    pictures = {"a.png": encode(picture(0)), "b.png": encode(picture(0)), "c.png": b"no picture",
                "white.png": encode(Image.new("RGB", (24, 24), "white"))}
    for name, data in pictures.items():
        (folder / name).write_bytes(data)
        (folder / name).with_suffix(".txt").write_text("<script>alert(1)</script>")
    examined = examine(open_source(str(folder)), limits=Limits("tiny", (16, 16), None))
    page = write_data_page(examined, tmp_path / "out")
    text = page.read_text()
    assert "<script>alert" not in text
    assert "&lt;script&gt;alert" in text
    assert text.count("data:image/jpeg;base64,") == 6  # the copies, the blank one, three that share a caption
    for finding in examined.findings:
        assert f'id="{finding.name}"' in text
    record = json.loads((tmp_path / "out" / "data.json").read_text())
    assert {one["name"]: one["count"] for one in record["findings"]} == {
        "unreadable": 1, "blank": 1, "same-file": 1, "same-caption": 3}
    assert (record["samples"], record["usable"]) == (4, 3)
    assert record["findings"][0]["examples"][0][0]["key"] == "c.png"


def test_a_source_without_fault_says_so(tmp_path: Path) -> None:
    folder = tmp_path / "pairs"
    folder.mkdir()
    (folder / "a.png").write_bytes(encode(picture(1)))
    (folder / "a.txt").write_text("one")
    examined = examine(open_source(str(folder)), limits=Limits("tiny", (16, 16), None))
    assert "Nothing to complain about." in write_data_page(examined, tmp_path).read_text()
