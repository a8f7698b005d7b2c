"""The page of a comparison, from synthetic files."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from html_page import EVIL, Page
from synthetic_comparison import write_comparison_folder

from aclip.errors import ConfigError
from aclip.report.comparison import clock, read_comparison, write_comparison


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_comparison_folder(tmp_path / "synthetic")


def page_of(folder: Path) -> Page:
    return Page(write_comparison(folder))


def change(folder: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    values = json.loads((folder / "comparison.json").read_text())
    edit(values)
    (folder / "comparison.json").write_text(json.dumps(values))


def run_named(values: dict[str, Any], name: str) -> dict[str, Any]:
    return next(run for run in values["runs"] if run["name"] == name)


def test_everything_is_on_the_page(folder: Path) -> None:
    page = page_of(folder)
    assert list(page.text)[1:] == ["results", "differences", "curves", "kept", "cost", "lr", "runs", "recipe"]
    expected = {
        "": ("clip · flip · mae", "vit-tiny on pairs.csv", "2 epochs", "0, 1", "25.0 %", "± 7.1",
             "time 0.50 · MACs 0.55", "Failed, and left out: mae-lr0.0005-s1."),
        "results": ("flip 52.0 ± 2.8 %", "median rank to caption"),
        "differences": ("no spread is known",),
        "curves": ("val R@1 to caption by pairs seen", "by time in training steps", "seconds", "chance"),
        "kept": ("a cat", "flip 4 of 8", "clip sees all of them"),
        "cost": ("flip, unmasked 1000 ms 900 ms to 1200 ms 10", "12.5 tokens", "1 thread"),
        "lr": ("clip 20.0 % ✓ 10.0 %", "flip 40.0 % 50.0 % ✓", "by val R@1 to caption", "slightly optimistic"),
        "runs": ("mae-lr0.0005-s1 failed: it broke",),
    }
    for section, words in expected.items():
        assert all(one in page.words(section) for one in words), section
    assert ("a", {"href": "runs/clip-lr0.0005-s0/report.html"}) in page.elements
    assert page.charts() == 2
    assert (folder / "table.md").exists()
    assert (folder / "table.csv").exists()


def test_text_from_data_is_never_markup(tmp_path: Path) -> None:
    page = page_of(write_comparison_folder(tmp_path / "evil", EVIL))
    assert "".join(page.text.values()).count(EVIL) == 4  # data, caption, error, command
    assert "evil" not in (tmp_path / "evil" / "table.md").read_text()


def test_sources_are_listed_as_they_were_given(folder: Path) -> None:
    assert re.search(r"vit-tiny on pairs\.csv .*, b\.tar=1<", page_of(folder).source)


def test_differences_are_bold_where_they_exceed_twice_the_spread(folder: Path) -> None:
    source = page_of(folder).source.split('id="differences"')[1].split("</section>")[0]
    # R@1: 52 - 25 = 27 points, s = sqrt((50 + 8) / 2) = 5.4 points; kNN: 13.5 against 2 x 2.7
    assert source.count("<b>+27.0</b>") == source.count("<b>-27.0</b>") == 1
    assert source.count("<b>+13.5</b>") == 1
    # clip's 12.5 from mae's 30 is further, but mae has one seed
    assert '<span class="within">-17.5</span>' in source
    assert source.count("<b>") == 4


def test_a_small_difference_is_not_bold(folder: Path) -> None:
    def smaller(values: dict[str, Any]) -> None:  # mean 0.33, s = 0.18
        run_named(values, "flip-lr0.001-s1")["metrics"]["val"]["retrieval"]["image_to_text_r1"] = 0.16

    change(folder, smaller)
    assert '<span class="within">+8.0</span>' in page_of(folder).source


def test_time_follows_the_stages_of_a_run(folder: Path) -> None:
    tables = read_comparison(folder)
    clip, flip = clock(tables, "clip"), clock(tables, "flip")
    assert [clip(fraction) for fraction in (0.0, 0.5, 1.0)] == [0.0, 4.0, 8.0]
    # 8 steps, the first half at 0.25 s, the second at 0.75 s
    assert [flip(fraction) for fraction in (0.25, 0.5, 0.75, 1.0)] == [0.5, 1.0, 2.5, 4.0]


def test_a_comparison_that_has_just_begun_has_a_page(folder: Path) -> None:
    run = {"name": "clip-lr0.0005-s0", "recipe": "clip", "lr": 5e-4, "seed": 0, "counts": False, "finished": False,
           "error": None}
    change(folder, lambda values: values.update(runs=[run], chosen_lr={}))
    (folder / "timing.json").unlink()
    page = page_of(folder)
    assert "Nothing has been measured yet" in page.words("curves")
    assert "have not been timed" in page.words("cost")
    assert "Not finished yet, and left out: clip-lr0.0005-s0." in page.words("")
    assert "does not name, not shown: clip-lr0.0005-s1, clip-lr0.001-s0, flip-" in page.words("")


def test_runs_whose_folders_are_gone_stay_in_the_table(folder: Path) -> None:
    for path in sorted((folder / "runs").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    page = page_of(folder)
    assert "52.0" in page.words("results")
    assert "None of the finished runs removes patches" in page.words("kept")


def test_a_damaged_snapshot_is_left_out(folder: Path) -> None:
    (folder / "runs" / "flip-lr0.001-s0" / "snapshots" / "step-00000008.safetensors").write_bytes(b"cut")
    assert "None of the finished runs removes patches" in page_of(folder).words("kept")


def test_no_comparison_is_an_error(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(ConfigError, match="there is no comparison in"):
        write_comparison(tmp_path)
    (folder / "comparison.json").write_text("{")
    with pytest.raises(ConfigError, match="is damaged"):
        write_comparison(folder)


def test_a_run_that_was_measured_in_part_counts_for_what_there_is(folder: Path) -> None:
    def in_part(values: dict[str, Any]) -> None:
        run = run_named(values, "flip-lr0.001-s1")
        run |= {"complete": False, "error": "the probe broke"}
        del run["metrics"]["val"]["knn"]

    change(folder, in_part)
    page = page_of(folder)
    assert "Failed, and left out: mae-lr0.0005-s1." in page.words("")
    assert "not measured with every evaluator; what was measured counts: flip-lr0.001-s1." in page.words("")
    assert "flip 52.0 ± 2.8 % 25.0 % (n = 1)" in page.words("results")


def test_rates_of_the_recipes_own_are_no_search(folder: Path) -> None:
    change(folder, lambda values: values["settings"].update(lr=None))
    assert "Each recipe was trained at its own rate: none was searched for." in page_of(folder).words("lr")


def test_rates_chosen_on_a_set_of_its_own_are_shown_with_it(folder: Path) -> None:
    def chosen(values: dict[str, Any]) -> None:
        values["chosen_lr"] = {name: one | {"set": "held"} for name, one in values["chosen_lr"].items()}
        for run in values["runs"]:
            if run["finished"]:
                run["metrics"]["held"] = {"retrieval": {"image_to_text_r1": 0.125}}

    change(folder, chosen)
    page = page_of(folder)
    assert "12.5 % ✓" in page.words("lr")
    assert "The rates were chosen on held, on which no result is reported." in page.words("lr")
    assert "held" not in page.words("results")


def test_of_many_recipes_columns_are_numbered_and_the_page_stays_whole(folder: Path) -> None:
    assert "clip flip clip" in page_of(folder).words("differences")

    def many(values: dict[str, Any]) -> None:
        for i in range(19):
            values["recipes"][f"recipe-{i}"] = values["recipes"]["flip"]
            values["runs"].append(run_named(values, "flip-lr0.001-s0") | {"recipe": f"recipe-{i}"})

    change(folder, many)
    page = page_of(folder)
    assert "22 recipes" in page.words("")
    assert "time 0.50" not in page.words("")
    assert "1 2 3" in page.words("differences")
    assert "21 recipe-18" in page.words("differences")
    assert page.words("kept").count("4 of 8") == 2 * 20
