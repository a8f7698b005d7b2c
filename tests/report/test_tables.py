"""The statistics of a comparison against numbers computed by hand, and its tables."""

import csv
import io
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from synthetic_comparison import write_comparison_folder

from aclip.report.comparison import read_comparison, summary_table
from aclip.report.tables import Tables, exceeds_spread, pooled_spread


def test_pooled_spread_by_hand() -> None:
    # sums of squares 2 (mean 2) and 8 (mean 6), 3 + 2 - 2 = 3 degrees of freedom
    assert pooled_spread([1.0, 2.0, 3.0], [4.0, 8.0]) == pytest.approx(math.sqrt((2 + 8) / 3))
    assert pooled_spread([1.0, 2.0], [4.0]) is None
    assert pooled_spread([], [4.0, 5.0]) is None


@pytest.mark.parametrize(("second", "verdict"), [
    ([4.1, 5.1, 6.1], True),    # s = 1, the difference 2.1
    ([3.9, 4.9, 5.9], False),   # 1.9
    ([4.0, 5.0, 6.0], False),   # 2.0, exactly twice the spread
    ([9.0], None),
])
def test_a_difference_must_exceed_twice_the_spread(second: list[float], verdict: bool | None) -> None:
    assert exceeds_spread([2.0, 3.0, 4.0], second) is verdict


@given(st.lists(st.floats(0, 1), min_size=2, max_size=6), st.lists(st.floats(0, 1), min_size=2, max_size=6))
def test_the_verdict_has_no_direction(first: list[float], second: list[float]) -> None:
    assert exceeds_spread(first, second) == exceeds_spread(second, first)
    assert pooled_spread(first, second) == pytest.approx(pooled_spread(second, first))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_comparison_folder(tmp_path / "synthetic")


@pytest.fixture
def tables(folder: Path) -> Tables:
    return read_comparison(folder)


def of_one_recipe(values: list[float], metric: str) -> Tables:
    runs: list[Any] = [{"recipe": "clip", "seed": seed, "counts": True, "finished": True,
                        "metrics": {"val": {"zero_shot": {metric: value}}}} for seed, value in enumerate(values)]
    return Tables({"recipes": {"clip": {}}, "sets": ["val"], "runs": runs})


def test_the_deviation_is_that_of_the_sample() -> None:
    values = [2.0, 4.0, 4.0, 4.0, 5.0, 5.0, 7.0, 9.0]  # squares add up to 32
    row = of_one_recipe(values, "median_rank").frame.iloc[0]
    assert row["mean"] == 5.0
    assert row["standard_deviation"] == pytest.approx((32 / 7) ** 0.5)
    assert (row["n"], row["max"], row["values"]) == (8, 9.0, values)


@pytest.mark.parametrize(("metric", "values", "text"), [
    ("top1", [0.2, 0.3], "25.0 ± 7.1 %"), ("top1", [0.2], "20.0 %"), ("nll", [2.25, 2.25], "2.2 ± 0.0")])
def test_fractions_are_in_per_cent_and_nats_are_not(metric: str, values: list[float], text: str) -> None:
    assert of_one_recipe(values, metric).cell("clip", ("val", "zero_shot", metric)) == text


def test_a_row_has_mean_and_spread_over_the_seeds_that_count(tables: Tables) -> None:
    table = tables.summary()
    assert list(table.columns) == ["recipe", "R@1 to caption", "knn top-1", "samples", "training", "step",
                                   "time / clip", "GMAC a pair", "MACs / clip", "memory", "lr", "seeds"]
    assert table.to_numpy().tolist() == [
        # standard deviation of (0.2, 0.3) is 0.1 / sqrt 2
        ["clip", "25.0 ± 7.1 %", "12.5 ± 3.5 %", "64", "1 min 00 s", "1000 ms", "1.00", "0.1", "1.00", "1.50 GB",
         "0.0005", "2"],
        ["flip", "52.0 ± 2.8 %", "26.0 ± 1.4 %", "64", "1 min 00 s", "500 ms", "0.50", "0.055", "0.55", "1.50 GB",
         "0.001", "2"],
        # no text, no retrieval; one seed, no spread
        ["mae", "–", "30.0 %", "64", "1 min 00 s", "750 ms", "0.75", "0.08", "0.80", "1.00 GB",  # noqa: RUF001
         "0.0005", "1"],
    ]


def test_all_metrics_are_listed_for_recipes_that_have_them(tables: Tables) -> None:
    assert list(tables.metrics) == [("val", "retrieval"), ("val", "knn")]
    table = tables.details()["val, retrieval"]
    assert list(table.columns) == ["recipe", "R@1 to caption", "median rank to caption"]
    assert table.to_numpy().tolist() == [["clip", "25.0 ± 7.1 %", "2.5 ± 0.7"], ["flip", "52.0 ± 2.8 %", "5.2 ± 0.3"]]


def test_the_files_hold_the_same_numbers(folder: Path, tables: Tables) -> None:
    tables.write(folder)
    assert "| flip | 52.0 ± 2.8 % |" in (folder / "table.md").read_text(encoding="utf-8")
    lines = list(csv.DictReader(io.StringIO((folder / "table.csv").read_text(encoding="utf-8"))))
    one = next(line for line in lines if line["recipe"] == "flip" and line["metric"] == "image_to_text_r1")
    assert float(one["mean"]) == pytest.approx(0.52)
    assert float(one["standard_deviation"]) == pytest.approx(0.04 / 2**0.5)
    assert (one["n"], one["values"]) == ("2", "0.5 0.54")
    assert next(line for line in lines if line["metric"] == "lr")["standard_deviation"] == ""
    assert [line["metric"] for line in lines if line["recipe"] == "mae"] == [
        "top1", "samples_seen", "training_seconds", "peak_memory", "step_seconds", "relative_time", "macs",
        "relative_cost", "lr"]


def test_a_pipe_in_a_name_does_not_end_a_cell(folder: Path) -> None:
    text = (folder / "comparison.json").read_text().replace('"val"', '"a|b"')
    (folder / "comparison.json").write_text(text)
    tables = read_comparison(folder)
    tables.write(folder)
    assert {len(re.split(r"(?<!\\)\|", line)) for line in (folder / "table.md").read_text().splitlines()[:5]} == {14}


def test_sets_come_in_their_order(folder: Path) -> None:
    values = json.loads((folder / "comparison.json").read_text())
    values["sets"] = ["second", "val"]
    values["runs"][0]["metrics"]["second"] = {"knn": {"top1": 0.5}}
    (folder / "comparison.json").write_text(json.dumps(values))
    tables = read_comparison(folder)
    assert next(iter(tables.metrics)) == ("second", "knn")
    assert "val R@1 to caption" in tables.summary().columns


def test_the_terminal_gets_the_table(folder: Path) -> None:
    console = Console(file=io.StringIO(), width=100)
    console.print(summary_table(folder))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert re.search(r"flip +52.0\s±\s2.8\s% +26.0\s±\s1.4\s% +0.50 +0.55 +1.50\sGB +0.001 +2", text)
