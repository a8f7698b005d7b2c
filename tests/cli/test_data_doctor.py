"""`aclip data doctor` as a user runs it: table, page, numbers, clean list, and errors in a sentence."""

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest

from aclip.cli import main
from bad_samples import SKIPPED, make_mixed_folder


class Checked(HTMLParser):
    """Collects the tags and the words of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.words = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.words += data


def test_a_spoiled_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_mixed_folder(tmp_path / "mixed")
    (folder / "good_000.txt").write_text("<script>alert(1)</script>")
    (folder / "good_000.png").write_bytes((folder / "good_001.png").read_bytes())
    clean, out = tmp_path / "clean.jsonl", tmp_path / "out"
    command = ["data", "doctor", str(folder), "--output", str(out), "--fix", str(clean), "--workers", "1"]
    assert main(command) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "112 of 112 samples examined, 106 usable" in said
    numbers = json.loads((out / "data.json").read_text())
    assert (numbers["samples"], numbers["usable"]) == (112, 106)
    counts = {finding["name"]: finding["count"] for finding in numbers["findings"]}
    assert counts["unreadable"] + counts["no-caption"] == len(SKIPPED)
    decodable = [path for path in folder.iterdir() if path.suffix in (".png", ".jpg", ".gif")]
    undecodable = {"truncated.jpg", "zero_bytes.jpg", "text.jpg", "giant.png"}
    files = [path.read_bytes() for path in decodable if path.name not in undecodable]
    assert counts["same-file"] == len(files) - len(set(files)) >= 1
    page = Checked((out / "data.html").read_text())
    assert page.tags.count("script") == 1  # the page's own
    assert "<script>alert(1)</script>" in page.words
    assert "Pictures that cannot be read" in page.words
    assert page.tags.count("img") >= 3
    assert len(clean.read_text().splitlines()) <= 106
    assert main(command) == 2  # the clean list is there already
    assert "is there already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "sentence", "code"),
    [
        (["--limit", "0"], "--limit 0: give 1 or more", 2),
        (["--limit", "5", "--fix", "x.csv"], "--fix needs to see the whole source", 2),
        (["--model", "vit-tinny"], "vit-tinny", 2),
        (["--against", "nowhere"], "'nowhere' does not exist", 1),
    ],
)
def test_errors_are_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], sentence: str, code: int
) -> None:
    folder = make_mixed_folder(tmp_path / "mixed")
    assert main(["data", "doctor", str(folder), "--output", str(tmp_path / "out"), *options]) == code
    error = capsys.readouterr().err
    assert sentence in error
    assert "Traceback" not in error
