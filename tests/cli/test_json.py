"""`--json`: every verb prints what its function returns as JSON, and nothing else, on standard output."""

import json
from pathlib import Path
from typing import Any

import pytest

import aclip
from aclip.cli import main
from made_pictures import captioned_noise


def found(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> Any:
    capsys.readouterr()
    assert main([*map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    assert found(capsys, "recipes") == {name: recipe.title for name, recipe in aclip.RECIPES.items()}
    shown = found(capsys, "recipes", "show", "a-clip")
    assert shown["passes"]["masked"] == {"patches": 196, "kept": 100, "tokens": 101, "image_size": [224, 224]}
    assert shown["recipe"]["objectives"]["byol"]["weight"] == 2.0
    assert [one["cost"] for one in found(capsys, "recipes", "cost", "clip", "a-clip")] == [1.0, shown["cost"]]


def test_an_error_prints_no_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "show", "a_clip", "--json"]) == 2
    assert capsys.readouterr().out == ""


@pytest.mark.slow
def test_from_data_to_search(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "images").mkdir()
    images = captioned_noise(tmp_path / "images", 8 * [(40, 40)])
    run, index = tmp_path / "run", tmp_path / "index"
    looked = found(capsys, "data", "look", images)
    assert looked["samples"][0]["captions"]
    checked = found(capsys, "data", "doctor", images, "--output", tmp_path / "doctor", "--workers", "0")
    assert (checked["samples"], checked["usable"]) == (8, 8)
    assert Path(found(capsys, "data", "pack", images, "--output", tmp_path / "shards", "--workers", "1")).is_dir()
    trained = found(capsys, "train", "--recipe", "clip", "--model", "vit-micro", "--data", images, "--validation",
                    f"held={images}", "--epochs", "1", "--batch-size", "4", "--workers", "0", "--output", run)
    assert trained["last"] == json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert 0 <= trained["evaluations"]["held"]["image_to_text_r1"] <= 1
    measured = found(capsys, "evaluate", run, "--data", f"held={images}", "--workers", "0")
    assert {one["metric"]: one["value"] for one in measured} == pytest.approx(trained["evaluations"]["held"])
    assert Path(found(capsys, "export", run)) == run / "export" / "open_clip"
    (drawn,) = found(capsys, "explain", run, images / "00.png", "--text", "noise", "--output", tmp_path / "seen.jpg")
    assert Path(drawn["output"]).is_file()
    assert -1 <= drawn["similarity"]["noise"] <= 1
    assert found(capsys, "index", run, images, "--output", index, "--workers", "0")["images"] == 8
    assert len(found(capsys, "search", index, "noise", "--top", "3")) == 3
    assert Path(found(capsys, "report", run)).is_file()
