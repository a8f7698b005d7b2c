import base64
import hashlib
import os
import re
import subprocess
import sys

import pytest
from html_page import Page
from jinja2 import UndefinedError
from markupsafe import Markup

from aclip.report import page as pages
from aclip.report.page import MISSING, compact, count, duration, percent, render, write_page


def macro(name, *arguments):
    return getattr(pages._environment().get_template("macros.html.j2").module, name)(*arguments)


@pytest.mark.parametrize(("fraction", "text"), [
    (0.0, "0 %"), (1.0, "100 %"), (0.4213, "42.1 %"), (0.000576, "0.06 %"), (0.0000021, "0.0002 %"),
    (-0.5, "-50.0 %"), (None, MISSING), (float("nan"), MISSING),
])
def test_percent(fraction, text):
    assert percent(fraction) == text


@pytest.mark.parametrize(("value", "text"), [
    (0.0, "0"), (5.53718, "5.54"), (153_600, "154k"), (9_999, "9999"), (2_500_000, "2.5M"), (999_999, "1M"),
    (0.0005, "5×10⁻⁴"), (1.01e-6, "1.01×10⁻⁶"), (-0.25, "-0.25"), (100.0, "100"), (None, MISSING),  # noqa: RUF001
])
def test_compact(value, text):
    assert compact(value) == text


def test_count_and_duration():
    assert [count(12720), count(None)] == ["12,720", MISSING]
    assert [duration(s) for s in (0.4, 59.6, 725, 3659.0, 90_061, None)] == [
        "0 s", "1 min 00 s", "12 min 05 s", "1 h 00 min", "25 h 01 min", MISSING]


def test_text_is_escaped_and_markup_is_not():
    page = render("chart", title="<b>", note=Markup("<i>note</i>"), legend=[], readout='"',
                  y_ticks=[], x_ticks=[], size=1, summary="", grid="", paths=[], x_label="")
    assert "&lt;b&gt;<small><i>note</i></small>" in page
    assert 'data-chart="&#34;"' in page
    with pytest.raises(UndefinedError):
        render("chart", title="without the rest")


def test_table_dims_what_repeats_the_row_above():
    cells = [["a", "x", "1"], ["a", "y", "1"], ["b", "y", "1"]]
    made = macro("table", ["set", "weights", "value"], cells, 2)
    rows = made.split("<tr>")[2:]
    assert [row.count("again") for row in rows] == [0, 1, 0]
    assert made.count('class="num"') == 4


def test_undecodable_bytes_of_names_are_written_as_escapes(tmp_path):
    name = os.fsdecode(b"caf\xe9.jpg")
    path = write_page(tmp_path / "page.html", "look", name=name, sections=[("samples", "Samples")], folder=name,
                      title=name, facts_shown=[("file", name)], samples=[], advice=[])
    assert path.read_text(encoding="utf-8").count("caf\\udce9.jpg") == 4


def test_the_content_policy_allows_the_script_of_the_page_alone(tmp_path):
    page = Page(write_page(tmp_path / "page.html", "look", name="a", sections=[], folder="a", title="a",
                           facts_shown=[], samples=[], advice=[]))
    policy = next(str(a["content"]) for a in page.named("meta") if "http-equiv" in a)
    script = re.search(r"<script>(.*?)</script>", page.source, re.S).group(1)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy
    assert "fetch(" not in script
    assert "XMLHttpRequest" not in script


@pytest.mark.parametrize("name", ["run", "snapshots", "figures", "data_page", "comparison", "journals"])
def test_pandas_is_imported_for_comparisons_alone(name):
    done = subprocess.run([sys.executable, "-c", f"import aclip.report.{name}, sys; print('pandas' in sys.modules)"],
                          capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_help_needs_neither_torch_nor_jinja2():
    code = "import sys; from aclip.report.run import write_report; print({*sys.modules})"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert all(f"'{name}'" not in loaded for name in ("torch", "jinja2", "numpy", "pandas"))
