"""The site: built strictly, nothing loaded from elsewhere, code that is quoted exists, every public name is there."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import aclip

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_site_is_built_without_a_warning_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", tmp_path],
                          cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True,
                          check=False)
    assert done.returncode == 0, done.stderr
    assert not done.stderr.strip()
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) > 20
    for file in (*pages, *tmp_path.rglob("*.css")):
        text = file.read_text(encoding="utf-8")
        loads = re.findall(r"<(?:script|img|iframe|source)\b[^>]*\bsrc=[\"']?((?:https?:)?//[^\"' >]+)", text)
        loads += re.findall(r"<link\b(?![^>]*rel=[\"']?canonical)[^>]*\bhref=[\"']?((?:https?:)?//[^\"' >]+)", text)
        loads += re.findall(r"(?:url\(|@import )[\"']?((?:https?:)?//[^\"')]+)", text)
        assert not loads, (file, loads)


def test_the_lines_beside_the_equations_are_those_of_the_source() -> None:
    source = " ".join(path.read_text(encoding="utf-8") for path in (ROOT / "src" / "aclip").rglob("*.py"))
    source = re.sub(r"\s+", "", source)
    page = (ROOT / "docs" / "method.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| [^|]+ \| [^|]+ \| (`.*`) \|$", page, re.MULTILINE)
    assert len(rows) > 10
    for line in (line for row in rows for line in re.findall(r"`([^`]+)`", row)):
        assert re.sub(r"\s+", "", line) in source, line


def test_every_public_name_is_in_the_reference() -> None:
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    assert set(aclip.__all__) == set(re.findall(r"^::: aclip\.(\w+)$", page, re.MULTILINE))
