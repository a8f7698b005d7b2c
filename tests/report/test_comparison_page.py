"""The tables and the page of a comparison, from made files."""

import csv
import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from made_comparison import make_comparison
from rich.console import Console

from aclip.errors import ConfigError
from aclip.report.comparison import write_comparison
from aclip.report.comparison_curves import clock
from aclip.report.comparison_files import ComparisonFiles, read_comparison
from aclip.report.comparison_table import detail_rows, groups, leading, metric_cell, summary_rows, to_rich

VOID = {"meta", "link", "img", "br", "hr"}
EVIL = "<script>alert('x')</script>\"><img src=http://evil.example/x.png> | & </style>"


class Reader(HTMLParser):
    """Collects elements and text by section, and checks that every element is closed."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.section = ""
        self.text: dict[str, str] = {}
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag == "section":
            self.section = str(dict(attrs)["id"])
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("script", "style"):
            self.text[self.section] = self.text.get(self.section, "") + " " + data


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_comparison(tmp_path / "made")


@pytest.fixture
def comparison(folder: Path) -> ComparisonFiles:
    return read_comparison(folder)


def page_of(folder: Path) -> tuple[str, Reader]:
    page = write_comparison(read_comparison(folder)).read_text()
    return page, Reader(page)


def test_a_row_has_mean_and_spread_over_the_seeds_that_count(comparison: ComparisonFiles) -> None:
    head, rows = summary_rows(comparison)
    assert head == ["recipe", "R@1 to caption", "knn top-1", "samples", "training", "step", "time / clip",
                    "GMAC a pair", "MACs / clip", "memory", "lr", "seeds"]
    assert rows == [
        # standard deviation of (0.2, 0.3) is 0.1 / sqrt 2
        ["clip", "25.0 ± 7.1 %", "12.5 ± 3.5 %", "64", "1 min 00 s", "1000 ms", "1.00", "0.1", "1.00", "1.50 GB",
         "0.0005", "2"],
        ["flip", "52.0 ± 2.8 %", "26.0 ± 1.4 %", "64", "1 min 00 s", "500 ms", "0.50", "0.055", "0.55", "1.50 GB",
         "0.001", "2"],
        # no text, no retrieval; one seed, no spread
        ["mae", "–", "30.0 %", "64", "1 min 00 s", "750 ms", "0.75", "0.08", "0.80", "1.00 GB",  # noqa: RUF001
         "0.0005", "1"],
    ]


def test_all_metrics_are_listed_for_those_that_have_them(comparison: ComparisonFiles) -> None:
    assert list(groups(comparison)) == [("val", "retrieval"), ("val", "knn")]
    head, rows = detail_rows(comparison, groups(comparison)["val", "retrieval"])
    assert head == ["recipe", "R@1 to caption", "median rank to caption"]
    assert rows == [["clip", "25.0 ± 7.1 %", "2.5 ± 0.7"], ["flip", "52.0 ± 2.8 %", "5.2 ± 0.3"]]
    assert [metric[2] for metric in leading(comparison)] == ["image_to_text_r1", "top1"]


def test_the_files_hold_the_same_numbers(folder: Path) -> None:
    page = write_comparison(read_comparison(folder))
    assert page == folder / "index.html"
    assert "| flip | 52.0 ± 2.8 % |" in (folder / "table.md").read_text()
    lines = list(csv.DictReader(io.StringIO((folder / "table.csv").read_text())))
    one = next(line for line in lines if line["recipe"] == "flip" and line["metric"] == "image_to_text_r1")
    assert float(one["mean"]) == pytest.approx(0.52)
    assert float(one["standard_deviation"]) == pytest.approx(0.04 / 2**0.5)
    assert (one["n"], one["values"]) == ("2", "0.5 0.54")
    assert {line["metric"] for line in lines if line["recipe"] == "mae"} == {
        "top1", "samples_seen", "training_seconds", "peak_memory", "step_seconds", "relative_time", "macs",
        "relative_cost", "lr"}


def test_the_terminal_gets_the_table(comparison: ComparisonFiles) -> None:
    console = Console(file=io.StringIO(), width=100)
    console.print(to_rich(comparison))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert re.search(r"flip +52.0\s±\s2.8\s% +26.0\s±\s1.4\s% +0.50 +0.55 +1.50\sGB +0.001 +2", text)


def test_everything_is_on_the_page(folder: Path) -> None:
    page, reader = page_of(folder)
    text = {name: " ".join(words.split()) for name, words in reader.text.items()}
    assert list(text)[1:] == ["results", "differences", "curves", "kept", "cost", "lr", "runs", "recipe"]
    for words in ("vit-tiny on pairs.csv", "2 epochs", "0, 1", "25.0 %", "± 7.1", "time 0.50 · MACs 0.55",
                  "Failed, and left out: mae-lr0.0005-s1."):
        assert words in text[""], words
    for words in ("flip 52.0 ± 2.8 %", "median rank to caption"):
        assert words in text["results"], words
    assert "no spread is known" in text["differences"]  # mae has one seed
    for words in ("val R@1 to caption by pairs seen", "by time in training steps", "seconds", "chance"):
        assert words in text["curves"], words
    for words in ("a cat", "flip 4 of 8", "clip sees all of them"):
        assert words in text["kept"], words
    for words in ("flip, unmasked 1000 ms 900 ms to 1200 ms 10", "12.5 tokens", "1 thread"):
        assert words in text["cost"], words
    for words in ("clip 20.0 % ✓ 10.0 %", "flip 40.0 % 50.0 % ✓", "by val R@1 to caption"):
        assert words in text["lr"], words
    assert "mae-lr0.0005-s1 failed: it broke" in text["runs"]
    assert ("a", {"href": "runs/clip-lr0.0005-s0/report.html"}) in reader.elements
    assert len([a for tag, a in reader.elements if tag == "figure" and a.get("class") == "chart"]) == 2
    assert not re.search(r"\$\{?[a-z]", page.split("<script>")[0].split("</style>")[1])


def test_sources_are_listed_as_they_were_given(folder: Path) -> None:
    page, _ = page_of(folder)
    assert re.search(r"vit-tiny on pairs\.csv .*, b\.tar=1<", page)


def test_differences_are_bold_where_they_exceed_twice_the_spread(folder: Path) -> None:
    page = page_of(folder)[0].split('id="differences"')[1].split("</section>")[0]
    # R@1: 52 - 25 = 27 points, s = sqrt((50 + 8) / 2) = 5.4 points; kNN: 13.5 against 2 x 2.7
    assert page.count("<b>+27.0</b>") == page.count("<b>-27.0</b>") == 1
    assert page.count("<b>+13.5</b>") == 1
    # clip's 12.5 from mae's 30 is further, but mae has one seed
    assert '<span class="within">-17.5</span>' in page
    assert page.count("<b>") == 4


def test_a_small_difference_is_not_bold(folder: Path) -> None:
    values = json.loads((folder / "comparison.json").read_text())
    for run in values["runs"]:
        if run["name"] == "flip-lr0.001-s1":
            run["metrics"]["val"]["retrieval"]["image_to_text_r1"] = 0.16  # mean 0.33, s = 0.18
    (folder / "comparison.json").write_text(json.dumps(values))
    assert '<span class="within">+8.0</span>' in page_of(folder)[0]


def test_time_follows_the_stages_of_a_run(comparison: ComparisonFiles) -> None:
    by_name = {one.name: clock(comparison, one) for one in comparison.results}
    assert [by_name["clip"](share) for share in (0.0, 0.5, 1.0)] == [0.0, 4.0, 8.0]
    # 8 steps, the first half at 0.25 s, the second at 0.75 s
    assert [by_name["flip"](share) for share in (0.25, 0.5, 0.75, 1.0)] == [0.5, 1.0, 2.5, 4.0]


def test_text_is_never_markup_and_nothing_is_loaded(tmp_path: Path) -> None:
    page, reader = page_of(make_comparison(tmp_path / "evil", EVIL))
    assert EVIL not in page
    assert "<script>alert" not in page
    assert "".join(reader.text.values()).count("<script>alert") == 4  # data, caption, error, command: as text
    assert "default-src 'none'" in page
    for _, attributes in reader.elements:
        for name in ("src", "href"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:", "#", "runs/")), value
    for line in (tmp_path / "evil" / "table.md").read_text().splitlines():
        assert "evil" not in line


def test_a_comparison_that_has_just_begun_has_a_page(folder: Path) -> None:
    values = json.loads((folder / "comparison.json").read_text())
    values["runs"] = [{"name": "clip-lr0.0005-s0", "recipe": "clip", "lr": 5e-4, "seed": 0, "counts": False,
                       "finished": False, "error": None}]
    values["chosen_lr"] = {}
    (folder / "comparison.json").write_text(json.dumps(values))
    (folder / "timing.json").unlink()
    text = page_of(folder)[1].text
    assert "Nothing has been measured yet" in text["curves"]
    assert "have not been timed" in text["cost"]
    assert "Not finished yet, and left out: clip-lr0.0005-s0." in " ".join(text[""].split())
    assert "does not name them: clip-lr0.0005-s1, clip-lr0.001-s0, flip-" in " ".join(text[""].split())


def test_runs_that_are_gone_leave_the_table(folder: Path) -> None:
    for path in sorted((folder / "runs").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    text = page_of(folder)[1].text
    assert "52.0" in text["results"]
    assert "None of the finished runs removes patches" in text["kept"]


def test_no_comparison_is_an_error(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(ConfigError, match="there is no comparison in"):
        read_comparison(tmp_path)
    (folder / "comparison.json").write_text("{")
    with pytest.raises(ConfigError, match="is damaged"):
        read_comparison(folder)


def test_a_run_that_was_measured_in_part_counts_for_what_there_is(folder: Path) -> None:
    values = json.loads((folder / "comparison.json").read_text())
    (run,) = [run for run in values["runs"] if run["name"] == "flip-lr0.001-s1"]
    run |= {"complete": False, "error": "the probe broke"}
    del run["metrics"]["val"]["knn"]
    (folder / "comparison.json").write_text(json.dumps(values))
    text = {name: " ".join(words.split()) for name, words in page_of(folder)[1].text.items()}
    assert "Failed, and left out: mae-lr0.0005-s1." in text[""]
    assert "not measured with every evaluator; what was measured counts: flip-lr0.001-s1." in text[""]
    assert "flip 52.0 ± 2.8 % 25.0 % (n = 1)" in text["results"]


def test_rates_of_the_recipes_own_are_no_search(folder: Path) -> None:
    values = json.loads((folder / "comparison.json").read_text())
    values["settings"]["lr"] = None
    (folder / "comparison.json").write_text(json.dumps(values))
    text = " ".join(page_of(folder)[1].text["lr"].split())
    assert "Each recipe was trained at its own rate: none was searched for." in text
    assert "✓" not in text


def test_nats_are_no_share(comparison: ComparisonFiles) -> None:
    metric = ("val", "calibration", "nll")
    one = replace(comparison.results[0], metrics={metric: [2.25, 2.25]})
    assert metric_cell(one, metric) == "2.2 ± 0.0"


def test_of_many_recipes_columns_are_numbered(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert re.search(r"clip flip clip", " ".join(page_of(folder)[1].text["differences"].split()))
    assert "time 0.50 · MACs 0.55" in page_of(folder)[0]
    monkeypatch.setattr("aclip.report.comparison.MANY", 1)
    assert "1 2 1 clip – -27.0 2 flip +27.0 –" in " ".join(page_of(folder)[1].text["differences"].split())  # noqa: RUF001
    assert "time 0.50 · MACs 0.55" not in page_of(folder)[0]
