"""What makes a run of a comparison finished, or another one; and the folder's lock."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from aclip.config import to_dict
from aclip.engine.comparison import ComparisonFolder, Measured, PlannedRun, flat, run_name
from aclip.engine.run_config import RunConfig
from aclip.errors import ConfigError
from aclip.recipes import RECIPES


@pytest.fixture
def run(tmp_path: Path) -> PlannedRun:
    config = RunConfig(recipe=RECIPES["flip"], model="vit-tiny", data="pairs.csv", output=str(tmp_path / "run"))
    return PlannedRun((), config, total_steps=4, num_pairs=24, trained=Measured(("retrieval",), ("a", "b")),
                      added=Measured(("knn",), ("c",)))


def evaluated(run: PlannedRun, evaluator: str, name: str, step: int = 4, weights: str = "online") -> None:
    run.folder.append("evaluations", {"evaluator": evaluator, "set": name, "step": step, "weights": weights})


def test_a_run_is_finished_when_its_model_and_all_evaluations_are_there(run: PlannedRun) -> None:
    run.folder.path.mkdir()
    assert not run.is_trained()
    evaluated(run, "retrieval", "a")
    evaluated(run, "retrieval", "b", step=2)
    evaluated(run, "retrieval", "b", weights="ema")
    run.folder.final.mkdir()
    assert not run.is_trained()
    evaluated(run, "retrieval", "b")
    assert run.is_trained()
    assert not run.is_finished()
    assert run.missing(run.added) == ["knn"]
    evaluated(run, "knn", "c")
    assert run.is_finished()
    (run.folder.final).rmdir()
    assert not run.is_finished()


def test_what_was_measured_besides_is_left_out(run: PlannedRun) -> None:
    results = {"a": {"retrieval": 1, "zero_shot": 2}, "c": {"knn": 3}, "mine": {"retrieval": 4}, "b": {"knn": 5}}
    assert run.only_planned(results) == {"a": {"retrieval": 1}, "c": {"knn": 3}}


def test_data_that_have_grown_are_another_run(run: PlannedRun) -> None:
    run.folder.path.mkdir()
    run.folder.write_json("config.json", to_dict(run.config) | {"num_pairs": 24})
    run.check_same()
    run.folder.write_json("config.json", to_dict(run.config) | {"num_pairs": 23})
    with pytest.raises(ConfigError, match="num_pairs is 23 there and 24 here"):
        run.check_same()


def test_rates_that_differ_have_folders_that_differ() -> None:
    assert run_name("clip", 1e-3, 0) != run_name("clip", 0.00100000001, 0)


def test_a_recipe_without_text_needs_no_retrieval(run: PlannedRun) -> None:
    run.folder.final.mkdir(parents=True)
    assert replace(run, trained=Measured((), ("a", "b"))).is_trained()


def test_another_run_in_its_place_is_refused_with_every_difference(run: PlannedRun) -> None:
    run.check_same()  # nothing there
    other = replace(run.config, epochs=7.0, recipe=replace(
        run.config.recipe, title="in other words", passes=(replace(run.config.recipe.passes[0], mask_ratio=0.75),)))
    run.folder.path.mkdir()
    run.folder.write_json("config.json", to_dict(run.config) | {
        "output": "elsewhere", "command": "aclip train", "micro_batch": 4, "workers": 1})  # resumed by hand with less
    run.check_same()
    run.folder.write_json("config.json", to_dict(other))
    with pytest.raises(ConfigError) as error:
        run.check_same()
    for difference in ("epochs is 7.0 there and 25.0 here",
                       "recipe.passes.masked.mask_ratio is 0.75 there and 0.5 here"):
        assert difference in str(error.value)
    assert str(error.value).count(" there and ") == 2


def test_flat_names_every_leaf() -> None:
    value = {"a": {"b": [1, 2], "c": {}}, "list": [{"name": "x", "k": None}], "empty": []}
    assert flat(value) == {"a.b": [1, 2], "list.x.name": "x", "list.x.k": None, "empty": []}
    assert flat(json.loads(json.dumps(to_dict(RECIPES["a-clip"])))).keys() == flat(to_dict(RECIPES["a-clip"])).keys()


def test_names_of_runs_tell_them_apart() -> None:
    names = {run_name(recipe, lr, seed) for recipe in RECIPES for lr in (5e-4, 1e-3, 1e-4) for seed in (0, 1)}
    assert len(names) == 6 * len(RECIPES)
    assert run_name("a-clip", 5e-4, 0) == "a-clip-lr0.0005-s0"


def test_a_second_comparison_is_kept_out_while_a_child_of_the_first_lives(tmp_path: Path) -> None:
    folder = ComparisonFolder(tmp_path / "new" / "folder")
    with folder.lock() as descriptor:
        with pytest.raises(ConfigError, match="another comparison works in"), folder.lock():
            pass
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=(descriptor,))
    with pytest.raises(ConfigError, match="left behind"), folder.lock():
        pass
    child.communicate(b"\n")
    with folder.lock():
        pass


def test_a_folder_that_cannot_be_made_is_the_users_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot make the comparison's folder"), ComparisonFolder(
            tmp_path / "file" / "x").lock():
        pass
