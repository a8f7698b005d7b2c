"""`aclip bench step`: what is timed, and what is told of it."""

import json
import re

import pytest
import torch

from aclip.cli import main
from aclip.engine import memory, timing
from aclip.engine.trainer import Trainer
from aclip.structs import Batch, StepOutput

BRIEFLY = ["bench", "step", "--model", "vit-micro", "--rounds", "2", "--device", "cpu"]


def test_times_memory_and_hours_of_each_batch_size(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*BRIEFLY, "--batch-sizes", "4", "2", "--pairs", "3600", "--epochs", "10", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["recipe"], found["model"]) == ("a-clip", "vit-micro")
    assert [one["batch_size"] for one in found["speeds"]] == [2, 4]
    for one in found["speeds"]:
        low, high = one["quartiles"]
        assert 0 < low <= one["seconds"] <= high
        assert one["pairs_per_second"] == pytest.approx(one["batch_size"] / one["seconds"])
        assert one["hours"] == pytest.approx(10 / one["pairs_per_second"])
        assert one["peak_memory"] > 2**26
    assert found["best_batch_size"] == max(found["speeds"], key=lambda one: one["pairs_per_second"])["batch_size"]


def test_the_table_says_what_was_measured(capsys: pytest.CaptureFixture[str]) -> None:
    changed = ["--recipe", "flip", "--set", "passes.masked.mask_ratio=0.75", "--batch-sizes", "2"]
    assert main([*BRIEFLY, *changed, "--precision", "fp32"]) == 0
    out = capsys.readouterr().out
    assert "flip on vit-micro, fp32 on cpu" in out
    assert "most pairs a second: batch 2." in out
    assert "hours" not in out


def test_steps_that_know_their_scores_count_for_the_epochs_in_which_they_do(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = {"2": [8.0, 8.0], "2, scores known": [4.0, 4.0]}
    monkeypatch.setattr(timing, "time_in_turns", lambda steps, **_: {name: seconds[name] for name in steps})
    reused = ["--recipe", "attentive-1x50", "--set", "passes.context.refresh=4", "--batch-sizes", "2", "--json"]
    assert main([*BRIEFLY, *reused]) == 0
    assert json.loads(capsys.readouterr().out)["speeds"][0]["seconds"] == 5.0


def test_a_batch_that_does_not_fit_ends_the_search_and_what_came_before_was_told(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    take, told = Trainer._take_step, []

    def fits(trainer: Trainer, batch: Batch) -> StepOutput:
        if batch.size > 2:
            told.append(capsys.readouterr().err)
            raise torch.OutOfMemoryError
        return take(trainer, batch)

    monkeypatch.setattr(Trainer, "_take_step", fits)
    assert main([*BRIEFLY, "--batch-sizes", "2", "4", "8"]) == 0
    assert re.search(r"batch 2: [\d,]+ ms in its first steps, [\d,.]+ pairs/s, peak memory ", told[0])
    found = capsys.readouterr()
    assert "batch 4 and larger do not fit" in found.err
    assert "most pairs a second: batch 2." in found.out


def test_batches_that_are_estimated_not_to_fit_are_left_out(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    take = Trainer._take_step

    def fits(trainer: Trainer, batch: Batch) -> StepOutput:
        assert batch.size == 2
        return take(trainer, batch)

    monkeypatch.setattr(Trainer, "_take_step", fits)
    monkeypatch.setattr(memory, "available_memory", lambda device: 2**30)
    assert main([*BRIEFLY, "--batch-sizes", "2", "65536", "131072"]) == 0
    found = capsys.readouterr()
    assert re.search(r"batch 65536 and larger are left out: a step is estimated to take [\d.]+ GiB of memory beside "
                     r"the model, and 1\.0 GiB are free", found.err)
    assert "most pairs a second: batch 2." in found.out


@pytest.mark.parametrize(("more", "sentence"), [
    (["--batch-sizes", "1"], "--batch-sizes takes numbers of 2 or more"),
    (["--rounds", "0"], "--rounds must be positive"),
    (["--pairs", "-1"], "--pairs must be positive"),
    (["--text-tokens", "2"], "at least 3, not 2"),
    (["--recipe", "a-clipp"], "did you mean 'a-clip'"),
])
def test_wrong_usage(more: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*BRIEFLY, *more]) == 2
    assert sentence in capsys.readouterr().err
