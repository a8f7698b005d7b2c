"""What happens around the steps of a run: trouble with numbers, with the disk, with requests to stop."""

import math
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from made_training import batches, build, numbers, poisoned, train

from aclip.engine import checkpoint, saving
from aclip.engine.checkpoint import list_checkpoints
from aclip.engine.health import MOST_ROLLBACKS
from aclip.engine.loop import fit, resume
from aclip.engine.stop import Interrupted, StopRequest
from aclip.engine.trainer import Trainer
from aclip.errors import CheckpointError, TrainingError
from aclip.recipes import RECIPES
from aclip.run_folder import RunFolder
from aclip.structs import Batch
from over_ranks import a_batch


def state(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Return a copy of everything that a step may change."""
    return {name: tensor.clone() for name, tensor in trainer.at_rest().tensors.items()}


def steps_saved(run: Path) -> list[int]:
    return [checkpoint.step_of(path) for path in list_checkpoints(run / "checkpoints")]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """An undisturbed run, and its state at the end."""
    run = tmp_path_factory.mktemp("whole") / "run"
    return run, state(train(run))


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_step_that_is_not_finite_changes_nothing_but_the_count(recipe: str) -> None:
    trainer = build(recipe)
    batch = a_batch(trainer.method, 8)
    trainer.train_step(batch)
    before = state(trainer)
    output = trainer.train_step(poisoned(batch))
    assert not torch.isfinite(output.loss)
    after = state(trainer)
    assert recipe != "a-clip" or all(any(part in name for name in before) for part in ("running_mean", "ema_visual"))
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    assert trainer.step == 2
    assert all(torch.isfinite(tensor).all() for tensor in after.values() if tensor.is_floating_point())
    trainer.train_step(batch)
    assert any(not torch.equal(tensor, after[name]) for name, tensor in state(trainer).items())


@pytest.mark.parametrize("micro_batch", [None, 3])
def test_chance_is_that_of_the_captions_of_the_step(micro_batch: int | None) -> None:
    trainer = build(micro_batch=micro_batch)
    batch = replace(a_batch(trainer.method, 8), caption_ids=torch.tensor([5, 5, 5, 5, 5, 5, 1, 2]))
    record = trainer.record(trainer.train_step(batch), 0.1, None)
    assert record["chance_loss"] == pytest.approx((6 * math.log(3) + 2 * math.log(8)) / 8)
    assert record["loss"] == pytest.approx(sum(
        objective.weight * record["parts"][objective.name] for objective in trainer.config.recipe.objectives), rel=1e-5)


def test_a_frozen_scale_stays_where_it_came_from() -> None:
    """SigLIP's released weights hold one above the largest that training allows."""
    trainer = build("clip")
    scale = trainer.method.model.logit_scale
    with torch.no_grad():
        scale.fill_(5.0)
    scale.requires_grad_(False)
    trainer.train_step(a_batch(trainer.method, 8))
    assert scale == 5.0


@pytest.mark.parametrize(("recipe", "highest"), [("clip", 100.0), ("a-clip", 100.0), ("siglip", 118.0)])
def test_only_the_softmax_limits_the_multiplier(recipe: str, highest: float) -> None:
    trainer = build(recipe)
    scale = trainer.method.model.logit_scale
    scale.data.fill_(math.log(118.0))
    trainer.train_step(a_batch(trainer.method, 8))
    assert scale.exp().item() == pytest.approx(highest, rel=1e-3)


def test_bad_steps_are_skipped_counted_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = tmp_path / "run"
    train(run, is_bad=lambda number, rank: number in (3, 4, 9))
    incidents = numbers(run, "incidents")
    assert [(i["kind"], i["step"], i["skipped_in_a_row"]) for i in incidents] == [
        ("non_finite", 3, 1), ("non_finite", 4, 2), ("non_finite", 9, 1)]
    assert incidents[0]["keys"] == [[f"3/{row}" for row in range(8)]]
    assert incidents[0]["loss"] == "nan"
    assert numbers(run)[-1]["skipped_steps"] == 3
    assert "step 9 was skipped" in caplog.text


def test_steps_that_the_scaler_skips_are_counted_and_not_logged(tmp_path: Path) -> None:
    """It starts so high that the first gradients overflow in fp16."""
    run = tmp_path / "run"
    trainer = train(run, build(precision="fp16"))
    logged = numbers(run)
    assert trainer.skipped_steps > 0
    assert len(logged) == 12 - trainer.skipped_steps
    assert all(math.isfinite(record["grad_norm"]) for record in logged)
    assert not numbers(run, "incidents")


def test_after_too_many_the_run_goes_back_and_on_with_other_batches(tmp_path: Path) -> None:
    run = tmp_path / "run"
    trainer = train(run, build(most_skipped=2), is_bad=lambda number, rank: 5 <= number <= 7)
    assert trainer.step == 12
    assert trainer.skipped_batches == 3  # steps 5, 6, 7 took batches 8, 9, 10
    assert [i["kind"] for i in numbers(run, "incidents")] == ["non_finite"] * 3 + ["rolled_back"]
    assert [r["step"] for r in numbers(run)] == list(range(1, 13))
    assert RunFolder(run).last("metrics")["step"] == 12

    # a resume goes on with the same batches
    again = tmp_path / "again"
    shutil.copytree(run, again)
    for path in list_checkpoints(again / "checkpoints")[1:]:
        shutil.rmtree(path)
    assert steps_saved(again) == [8]
    train(again, build(most_skipped=2))
    assert numbers(again)[7:] == numbers(run)[7:]


def test_a_bad_sample_of_steps_taken_back_is_journalled_when_it_is_met_again(tmp_path: Path) -> None:
    trainer = build(most_skipped=2)
    opened = batches(trainer, is_bad=lambda number, rank: 6 <= number <= 8)

    def open_batches() -> Iterator[Batch]:
        for batch in opened():
            number = batch.keys[0].partition("/")[0]
            yield replace(batch, skipped=(("torn.jpg", "cut off"),)) if number in ("5", "10") else batch

    tmp_path.joinpath("run").mkdir()
    fit(trainer, open_batches, RunFolder(tmp_path / "run"), (), lambda step: None)
    assert [(r["step"], r["key"]) for r in numbers(tmp_path / "run", "skipped")] == [(6, "torn.jpg")]


def test_trouble_that_stays_stops_the_run_with_a_state(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(TrainingError, match="the loss is no longer finite at step 7") as caught:
        train(run, build(most_skipped=2), is_bad=lambda number, rank: number >= 5)
    assert "incidents.jsonl, the newest checkpoint is of step 4" in str(caught.value)
    kinds = [i["kind"] for i in numbers(run, "incidents")]
    assert kinds.count("rolled_back") == MOST_ROLLBACKS
    assert steps_saved(run)[-1] == 4

    with pytest.raises(TrainingError, match="checkpoint is of step 3"):  # none was there to go back to
        train(tmp_path / "early", build(most_skipped=2), is_bad=lambda number, rank: True)
    assert steps_saved(tmp_path / "early") == [3]


def test_a_resumed_run_is_the_same_run(tmp_path: Path, whole: tuple[Path, dict[str, torch.Tensor]]) -> None:
    run = tmp_path / "run"
    with pytest.raises(Interrupted, match="stopped after step 5 of 12"):
        train(run, before=lambda number: os.kill(os.getpid(), signal.SIGTERM) if number == 5 else None)
    assert steps_saved(run) == [2, 4, 5]
    end = state(train(run))
    assert numbers(run) == numbers(whole[0])
    assert all(torch.equal(tensor, end[name]) for name, tensor in whole[1].items())


def test_a_damaged_checkpoint_is_told_and_the_one_before_used(
    tmp_path: Path, whole: tuple[Path, dict[str, torch.Tensor]], caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole[0], run)
    for number, path in enumerate(list_checkpoints(run / "checkpoints")[1:]):
        file = path / "state.safetensors"
        content = bytearray(file.read_bytes())
        content[-5 - number] ^= 1
        file.write_bytes(content)
    end = state(train(run))
    assert "the checkpoint step-00000012 is damaged (state.safetensors has changed since it was written)" in caplog.text
    assert [i["name"] for i in numbers(run, "incidents")] == ["step-00000012", "step-00000010"]
    assert numbers(run) == numbers(whole[0])
    assert all(torch.equal(tensor, end[name]) for name, tensor in whole[1].items())
    assert steps_saved(run) == [8, 10, 12]

    for path in list_checkpoints(run / "checkpoints"):
        (path / "state.json").unlink()
    with pytest.raises(CheckpointError, match="no whole one among them: step-00000012"):
        resume(build(), RunFolder(run))


def test_a_checkpoint_that_cannot_be_written_is_told_and_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write = saving.write_shard

    def failing(path: Path, pieces: Any) -> Any:
        if "00000004" in str(path):
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        return write(path, pieces)

    monkeypatch.setattr(saving, "write_shard", failing)
    run = tmp_path / "run"
    train(run, build(keep_checkpoints=9))
    assert steps_saved(run) == [2, 6, 8, 10, 12]
    assert [i["reason"] for i in numbers(run, "incidents")] == ["[Errno 28] No space left on device"]
    assert "the checkpoint of step 4 could not be written, training goes on" in caplog.text
    assert not list((run / "checkpoints").glob(".*"))


def test_an_evaluation_is_given_up_for_a_request_to_stop_and_made_up_for(
    tmp_path: Path, whole: tuple[Path, dict[str, torch.Tensor]]
) -> None:
    run, evaluated = tmp_path / "run", []

    def long_evaluation(step: int) -> None:
        RunFolder(run).append("evaluations", {"step": step, "set": "half"})
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(20)

    def evaluate(step: int) -> None:
        evaluated.append(step)
        RunFolder(run).append("evaluations", {"step": step, "set": "whole"})

    trainer = build()
    trainer.timetable = replace(trainer.timetable, evaluate_every=5)
    begun = time.monotonic()
    with pytest.raises(Interrupted, match="stopped after step 5"):
        train(run, trainer, evaluate=long_evaluation)
    assert time.monotonic() - begun < 15
    trainer = build()
    trainer.timetable = replace(trainer.timetable, evaluate_every=5)
    train(run, trainer, evaluate=evaluate)
    assert evaluated == [5, 10, 12]
    assert [(r["step"], r["set"]) for r in numbers(run, "evaluations")] == [(s, "whole") for s in (5, 10, 12)]
    assert numbers(run) == numbers(whole[0])


def test_a_request_to_stop_in_an_evaluation_of_skipped_steps_names_the_checkpoint_that_there_is(tmp_path: Path) -> None:
    """A state of skipped steps is not saved before it is evaluated."""
    trainer = build()
    trainer.timetable = replace(trainer.timetable, evaluate_every=5)
    with pytest.raises(Interrupted, match="after step 5 of 12 without a checkpoint of it, the newest is of step 4; "):
        train(tmp_path / "run", trainer, is_bad=lambda number, rank: number == 5,
              evaluate=lambda step: os.kill(os.getpid(), signal.SIGTERM))
    assert steps_saved(tmp_path / "run") == [2, 4]


def test_the_last_evaluation_of_a_finished_run_outlives_a_resume(tmp_path: Path) -> None:
    run, evaluated = tmp_path / "run", []

    def evaluate(step: int) -> None:
        evaluated.append(step)
        RunFolder(run).append("evaluations", {"step": step})

    train(run, evaluate=evaluate)
    RunFolder(run).final.mkdir()  # what comes after the training
    train(run, evaluate=evaluate)
    assert evaluated == [12]
    assert [record["step"] for record in numbers(run, "evaluations")] == [12]


def test_what_a_launcher_repeats_is_one_request() -> None:
    with StopRequest(below_launcher=True) as stop:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested


def test_a_second_request_is_not_waited_for() -> None:
    # jobs that a shell has put into the background ignore SIGINT from the start
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    signal.signal(signal.SIGINT, before)


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The writing of step 2 ends only after a step that comes after it."""
    write, later_step = saving.write_shard, threading.Event()

    def waiting(path: Path, pieces: Any) -> Any:
        assert later_step.wait(timeout=60)
        return write(path, pieces)

    monkeypatch.setattr(saving, "write_shard", waiting)
    run = tmp_path / "run"
    train(run, before=lambda number: later_step.set() if number == 4 else None)
    assert steps_saved(run) == [8, 10, 12]
