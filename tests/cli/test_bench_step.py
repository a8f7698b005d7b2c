"""`aclip bench step`: what is timed, and what is told of it."""

import json

import pytest

from aclip.cli import main
from aclip.errors import OutOfMemoryError
from aclip.structs import Batch, StepOutput
from aclip.trainer import Trainer

BRIEFLY = ["bench", "step", "--model", "vit-micro", "--rounds", "2", "--device", "cpu"]


def test_times_memory_and_hours_of_each_batch_size(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*BRIEFLY, "--batch-sizes", "4", "2", "--pairs", "3600", "--epochs", "10", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["recipe"], found["model"]) == ("a-clip-muon", "vit-micro")
    assert [one["batch_size"] for one in found["speeds"]] == [2, 4]
    for one in found["speeds"]:
        low, high = one["quartiles"]
        assert 0 < low <= one["seconds"] <= high
        assert one["pairs_per_second"] == pytest.approx(one["batch_size"] / one["seconds"])
        assert one["hours"] == pytest.approx(10 / one["pairs_per_second"])
        assert one["peak_memory"] > 2**26
    assert found["best_batch_size"] == max(found["speeds"], key=lambda one: one["pairs_per_second"])["batch_size"]


def test_the_table_says_what_was_measured(capsys: pytest.CaptureFixture[str]) -> None:
    changed = ["--recipe", "flip", "--passes.masked.mask_ratio", "0.75", "--batch-sizes", "2"]
    assert main([*BRIEFLY, *changed, "--precision", "fp32"]) == 0
    out = capsys.readouterr().out
    assert "flip on vit-micro, fp32 on cpu" in out
    assert "most pairs a second: batch 2;" in out
    assert "hours" not in out


def test_a_batch_that_does_not_fit_ends_the_search(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    take = Trainer.train_step

    def fits(trainer: Trainer, batch: Batch) -> StepOutput:
        if batch.size > 2:
            raise OutOfMemoryError("out of memory")
        return take(trainer, batch)

    monkeypatch.setattr(Trainer, "train_step", fits)
    assert main([*BRIEFLY, "--batch-sizes", "2", "4", "8"]) == 0
    found = capsys.readouterr()
    assert "batch 4 and larger do not fit" in found.err
    assert "most pairs a second: batch 2;" in found.out


@pytest.mark.parametrize(("more", "sentence"), [
    (["--batch-sizes", "1"], "batch_sizes are 2 or more"),
    (["--rounds", "0"], "rounds 1 or more"),
    (["--text-tokens", "2"], "text_tokens 3 or more"),
    (["--recipe", "a-clipp"], "did you mean 'a-clip'"),
])
def test_wrong_usage(more: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*BRIEFLY, *more]) == 2
    assert sentence in capsys.readouterr().err
