"""`aclip bench model`: what is timed, and how it is told."""

import json

import pytest

from aclip.cli import main


def speeds(capsys: pytest.CaptureFixture[str], *more: str) -> list[dict[str, float]]:
    assert main(["bench", "model", "vit-micro", "--rounds", "2", "--device", "cpu", "--json", *more]) == 0
    found: list[dict[str, float]] = json.loads(capsys.readouterr().out)["speeds"]
    return found


def test_whole_and_dropped_images_and_cut_and_whole_texts_are_timed(capsys: pytest.CaptureFixture[str]) -> None:
    rows = speeds(capsys, "--keep", "0.5", "1", "--batch-sizes", "4", "2")
    assert [(r["what"], r["keep"], r["tokens"], r["batch_size"]) for r in rows] == [
        ("images", 1.0, 65, 2), ("images", 0.5, 33, 2), ("texts", 1.0, 77, 2), ("texts", 1.0, 18, 2),
        ("images", 1.0, 65, 4), ("images", 0.5, 33, 4), ("texts", 1.0, 77, 4), ("texts", 1.0, 18, 4)]
    for row in rows:
        low, high = row["per_second_quartiles"]
        assert 0 < low <= row["per_second"] <= high
    assert [r["relative"] for r in rows if r["tokens"] in (65, 77)] == [1.0] * 4
    half = rows[1]
    assert half["relative"] == pytest.approx(half["per_second"] / rows[0]["per_second"])


def test_the_table_names_model_and_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "model", "vit-micro", "--rounds", "1", "--batch-sizes", "1", "--device", "cpu"]) == 0
    assert "vit-micro, fp32 on cpu, 1 threads, median of 1 calls" in capsys.readouterr().out


@pytest.mark.parametrize(("more", "sentence"), [
    (["--keep", "0"], "keep takes fractions"),
    (["--batch-sizes", "0"], "batch_sizes and rounds are 1 or more"),
    (["--rounds", "0"], "batch_sizes and rounds are 1 or more"),
])
def test_wrong_usage(more: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "model", "vit-micro", *more]) == 2
    assert sentence in capsys.readouterr().err
