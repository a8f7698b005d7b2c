"""Confusions, reliability diagrams and robustness curves in the report."""

import json
from pathlib import Path

import pytest

from aclip.report import write_report


def write(folder: Path, name: str, **content: object) -> None:
    (folder / "details").mkdir(exist_ok=True)
    about = {"set": "val", "evaluator": "zero_shot", "weights": "online", "step": 20}
    (folder / "details" / f"{name}.json").write_text(json.dumps(about | content))


def test_confusions_are_drawn_and_listed(run_folder: Path, evil: str) -> None:
    write(run_folder, "val-zero_shot", classes=["cat", evil, "cow"], pictures=[10, 4, 0], right=[7, 1, 0],
          confusions=[[0, 1, 3], [1, 2, 3]])
    page = write_report(run_folder).read_text()
    assert "Class by class" in page
    assert page.count('class="right"') >= 2
    assert '<rect x="1" y="0" width="1" height="1" class="wrong" opacity="0.300">' in page
    assert "cat taken for &lt;script&gt;" in page
    assert evil not in page
    assert page.index("25.0 %") < page.index("70.0 %")  # the worst class comes first
    assert "With fewer patches" not in page


def test_of_many_classes_those_with_errors_are_drawn(run_folder: Path) -> None:
    wrong = {3, 50, 99}
    write(run_folder, "val-knn", evaluator="knn", classes=[f"class {i}" for i in range(100)], pictures=[5] * 100,
          right=[4 if i in wrong else 5 for i in range(100)], confusions=[[3, 50, 1], [50, 99, 1], [99, 3, 1]])
    page = write_report(run_folder).read_text()
    assert "the 30 of 100 classes with the most errors" in page
    assert all(f"<li>class {i}</li>" in page for i in wrong)


def test_reliability_is_drawn(run_folder: Path) -> None:
    bins = [{"from": 0.4, "to": 0.6, "pictures": 4, "confidence": 0.5, "accuracy": 0.25}]
    write(run_folder, "val-calibration", evaluator="calibration", reliability=bins, logit_scale=100.0)
    page = write_report(run_folder).read_text()
    assert "as sure as right</li>" in page  # without the value at which the line ends
    assert "logit_scale 100" in page


@pytest.mark.parametrize("content", ["[]", "{", '{"classes": ["a"], "pictures": "x"}', '{"reliability": [1, {}]}',
                                     '{"classes": ["a", "b"], "pictures": [1, 1], "right": [1, 1], '
                                     '"confusions": [[0, 7, 1], "x", [0, 1]]}'])
def test_damaged_details_do_not_break_the_page(run_folder: Path, content: str) -> None:
    (run_folder / "details").mkdir()
    (run_folder / "details" / "val-zero_shot.json").write_text(content)
    assert "</html>" in write_report(run_folder).read_text()


def test_robustness_is_a_curve_with_speeds(run_folder: Path) -> None:
    records = [{"set": "val", "evaluator": "retrieval", "weights": "online", "keep": keep, "kept_by": way,
                "num_keep": round(64 * keep), "num_patches": 64, "pictures_per_second": 100 / keep,
                "metrics": {"image_to_text_r1": value}}
               for keep, way, value in ((1.0, "attentive", 0.5), (0.5, "attentive", 0.45), (0.5, "uniform", 0.31))]
    (run_folder / "robustness.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    page = write_report(run_folder).read_text()
    assert "With fewer patches" in page
    assert "32 of 64" in page
    assert "31.0 %" in page
    assert page.count("% of the patches kept") == 1
