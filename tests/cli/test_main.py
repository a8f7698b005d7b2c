"""The command line outside of training: help, recipes, errors."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from aclip.cli import VERBS, join_repeated, main
from aclip.recipes import RECIPES
from made_pictures import picture


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(arguments) == 0
    return " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("verb", ["train", "compare", *VERBS])
def test_every_verb_explains_itself(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*verb.split(), "--help"]) == 0
    assert f"usage: aclip {verb}" in capsys.readouterr().out


def test_help_names_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(word in shown for verb in VERBS for word in verb.split())
    assert main([]) == 2


def test_wrong_usage_exits_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trane"]) == 2
    assert "unknown verb 'trane': did you mean 'train'" in capsys.readouterr().err
    assert main(["data"]) == 2
    assert "aclip data needs an action: look, list, fetch, pack, encode, doctor" in capsys.readouterr().err


def test_recipes_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    listed = run(capsys, "recipes")
    assert all(name in listed for name in RECIPES)


def test_the_dataflow_of_a_clip_is_shown(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    shown = run(capsys, "recipes", "show", "a-clip", "--model", "ViT-B-16")
    for fact in ("100 of 196 patches kept, 101 tokens -> online encoder", "196 of 196 patches kept", "scores from "
                 "'context'", "weight 2, reads masked -> context", "0.996 -> 1.0", "1.29 of CLIP"):
        assert fact in shown, (fact, shown)


def test_blocks_that_do_not_fit_are_said_aloud(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    shown = run(capsys, "recipes", "show", "a-clip", "--model", "ViT-B-32")
    assert "blocks of 2 x 2 do not tile the 7 x 7 grid, single patches are chosen" in shown
    assert "25 of 49 patches kept" in shown


def test_a_recipe_can_be_changed_before_it_is_shown(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    arguments = ("recipes", "show", "flip", "--passes.masked.mask_ratio", "0.75")
    assert "49 of 196 patches kept" in run(capsys, *arguments)


@pytest.mark.parametrize(("arguments", "sentence"), [
    (["recipes", "show", "a_clip"], "did you mean 'a-clip'"),
    (["recipes", "show", "flip", "--passes.mask.mask_ratio", "0.5"], "did you mean 'masked'"),
    (["recipes", "show", "flip", "--passes.masked.mask_ratio", "half"], "mask_ratio should be a valid number"),
    (["report", "/nowhere"], "/nowhere"),
    (["evaluate", "/nowhere", "--data", "x.csv"], "/nowhere"),
    (["evaluate", "vit-tiny", "--data", "x.csv", "--evaluators", "retrival"], "did you mean 'retrieval'"),
    (["evaluate", "--data", "x.csv"], "or the model is missing: aclip evaluate MODEL --data SOURCE"),
    (["recipes", "show", "a-clip", "--recipe.passes.masked.masking", "uniform"],
     "unknown option 'keep'; there are: block_size; the options of the pass are "),
])
def test_errors_are_one_sentence_that_says_what_exists(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) in (1, 2)
    error = capsys.readouterr().err
    assert sentence in error
    assert "Traceback" not in error
    assert error.strip().count("\n") == 0


def test_an_option_of_several_values_may_be_repeated() -> None:
    lists = ["data", "not"]
    twice = ["--data", "a", "--seed", "1", "--data=b", "c"]
    assert join_repeated(twice, lists) == ["--data", "a", "b", "c", "--seed", "1"]
    assert join_repeated(["x", "--data=a", "--not=-b", "--seed=1"], lists) == ["x", "--data=a", "--not=-b", "--seed=1"]
    assert join_repeated(["--not=a", "--not", "b"], lists) == ["--not", "a", "b"]


def test_debug_shows_the_traceback() -> None:
    with pytest.raises(Exception, match="a-clip"):
        main(["--debug", "recipes", "show", "a_clip"])




def test_what_costs_nothing_to_find_is_found_before_torch_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "photos.csv").write_text("image,caption\n")
    program = ("import sys; from aclip.cli import main\n"
               "code = main(['train', '--data', 'photo.csv', '--output', 'run'])\n"
               "print(code, 'torch' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.split() == ["1", "False"]
    assert done.stderr == "aclip: 'photo.csv' does not exist: did you mean 'photos.csv'?\n"


def test_a_path_of_the_recipe_does_not_swallow_the_next_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--data", "a.csv", "--recipe.passes.masked.fill", "--output", "run"]) == 2
    assert "--recipe.passes.masked.fill needs a value" in capsys.readouterr().err


def test_a_number_of_steps_that_is_none_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--data", "a.csv", "--overfit-one-batch", "many"]) == 2
    assert "takes a number of steps, not 'many'" in capsys.readouterr().err


def test_printing_in_a_terminal_that_is_not_utf8(tmp_path: Path) -> None:
    picture(1).save(tmp_path / "1.png")
    (tmp_path / "1.txt").write_text("un café 🐱", encoding="utf-8")
    done = subprocess.run([sys.executable, "-m", "aclip", "data", "look", str(tmp_path)], capture_output=True,
                          env=os.environ | {"PYTHONIOENCODING": "ascii", "LC_ALL": "C"}, check=False)
    assert done.returncode == 0, done.stderr
    assert rb"un caf\xe9 \U0001f431" in done.stdout
