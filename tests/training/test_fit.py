"""What happens around the steps of a run: trouble with numbers, with the disk, with requests to stop."""

import math
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import synthetic_training
import torch
from synthetic_training import batches, build, numbers, poisoned, train

from aclip import checkpoint
from aclip.checkpoint import list_checkpoints
from aclip.errors import CheckpointError, DataError, TrainingError
from aclip.recipes import RECIPES
from aclip.run_folder import RunFolder
from aclip.structs import Batch
from aclip.trainer import Best, Trainer
from aclip.training.guard import Interrupted, StopRequest
from over_ranks import a_batch

MUON = "a-clip optimization.optimizer=muon"


def state(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Return a copy of everything that a step may change."""
    return {name: tensor.clone() for name, tensor in trainer.state_dict()[0].items()}


def steps_saved(run: Path) -> list[int]:
    return [checkpoint.step_of(path) for path in list_checkpoints(run / "checkpoints")]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """An undisturbed run, and its state at the end."""
    run = tmp_path_factory.mktemp("whole") / "run"
    return run, state(train(run))


@pytest.mark.parametrize("recipe", [*RECIPES, MUON])
def test_a_step_that_is_not_finite_changes_nothing_but_the_count(recipe: str) -> None:
    trainer = build(recipe)
    batch = a_batch(trainer.method, 8)
    trainer.train_step(batch)
    before = state(trainer)
    output = trainer.train_step(poisoned(batch))
    assert not torch.isfinite(output.loss)
    after = state(trainer)
    stateful = [any(part in name for name in before) for part in ("running_mean", "ema_visual")]
    assert recipe not in ("a-clip", MUON) or all(stateful)
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    assert trainer.step == 2
    assert all(torch.isfinite(tensor).all() for tensor in after.values() if tensor.is_floating_point())
    trainer.train_step(batch)
    assert any(not torch.equal(tensor, after[name]) for name, tensor in state(trainer).items())


@pytest.mark.parametrize("micro_batch", [None, 3])
def test_chance_is_that_of_the_captions_of_the_step(micro_batch: int | None) -> None:
    trainer = build(micro_batch=micro_batch)
    batch = replace(a_batch(trainer.method, 8), caption_ids=torch.tensor([5, 5, 5, 5, 5, 5, 1, 2]))
    record = trainer.record(trainer.train_step(batch))
    assert record["chance_loss"] == pytest.approx((6 * math.log(3) + 2 * math.log(8)) / 8)
    weights = {name: objective.weight for name, objective in trainer.config.recipe.objectives.items()}
    assert record["loss"] == pytest.approx(sum(weight * record["parts"][name] for name, weight in weights.items()),
                                           rel=1e-5)


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


@pytest.mark.parametrize("recipe", ["a-clip", MUON])
def test_steps_that_the_scaler_skips_are_counted_and_not_logged(tmp_path: Path, recipe: str) -> None:
    """It starts so high that the first gradients overflow in fp16."""
    run = tmp_path / "run"
    trainer = train(run, build(recipe, precision="fp16"))
    logged = numbers(run)
    assert trainer.guard.skipped > 0
    assert len(logged) == 12 - trainer.guard.skipped
    assert all(math.isfinite(record["grad_norm"]) for record in logged)
    assert not numbers(run, "incidents")


def test_bad_samples_are_journalled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = build()

    def with_bad_samples() -> Iterator[Batch]:
        for batch in batches(trainer):
            yield replace(batch, skipped=(("torn.jpg", "cut off"),)) if trainer.step in (4, 9) else batch

    monkeypatch.setattr(synthetic_training, "batches", lambda *_: with_bad_samples())
    train(tmp_path / "run", trainer)
    assert [(r["step"], r["key"]) for r in numbers(tmp_path / "run", "skipped")] == [(5, "torn.jpg")]
    assert numbers(tmp_path / "run")[-1]["skipped_samples"] == 1


def test_a_loss_that_stays_non_finite_stops_the_run_with_its_last_finite_weights(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(TrainingError, match=r"the loss became NaN or inf at step 7 .*3 steps in a row were skipped"):
        train(run, build(max_skipped=2), is_bad=lambda number, rank: number >= 5)
    assert [i["step"] for i in numbers(run, "incidents")] == [5, 6, 7]
    assert steps_saved(run)[-1] == 7
    stored = checkpoint.open_newest(run / "checkpoints").tensors()
    whole = train(tmp_path / "short", build(total_steps=4)).state_dict()[0]
    assert all(t.isfinite().all() for t in stored.values() if t.is_floating_point())
    assert set(stored) == set(whole)
    trainer = train(run, build(max_skipped=2))  # with other batches, or a lower rate, it goes on
    assert trainer.step == 12


def test_a_failing_evaluation_does_not_end_the_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def evaluate(step: int) -> None:
        if step == 5:
            raise DataError("all captions of 'val' are empty")

    train(tmp_path / "run", build(evaluate_every=5), evaluate=evaluate)
    assert [(i["kind"], i["step"]) for i in numbers(tmp_path / "run", "incidents")] == [("evaluation_failed", 5)]
    assert "the evaluation after step 5 failed: all captions of 'val' are empty" in caplog.text


def test_training_outside_the_main_thread_leaves_signals_alone(
    tmp_path: Path, whole: tuple[Path, dict[str, torch.Tensor]]
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(train, tmp_path / "run").result()
    assert signal.getsignal(signal.SIGTERM) is before
    assert numbers(tmp_path / "run") == numbers(whole[0])


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_low_rank_updates_resume_and_leave_the_weights_as_they_were(tmp_path: Path, optimizer: str) -> None:
    words = f"a-clip optimization.optimizer={optimizer} lora=4"
    base = state(build(words))
    whole = state(train(tmp_path / "whole", build(words)))
    with pytest.raises(Interrupted):
        train(tmp_path / "run", build(words),
              before=lambda number: os.kill(os.getpid(), signal.SIGTERM) if number == 5 else None)
    end = state(train(tmp_path / "run", build(words)))
    assert numbers(tmp_path / "run") == numbers(tmp_path / "whole")
    assert all(torch.equal(tensor, end[name]) for name, tensor in whole.items())
    changed = [name for name in base if name.startswith("method/model.") and not torch.equal(base[name], end[name])]
    assert changed
    assert set(changed) == {name for name in base if name.startswith("method/model.") and ".low_rank." in name}


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
        file = path / "rank-00000-of-00001.safetensors"
        content = bytearray(file.read_bytes())
        content[-5 - number] ^= 1
        file.write_bytes(content)
    end = state(train(run))
    assert "step-00000012 is damaged: rank-00000-of-00001.safetensors has changed" in caplog.text
    assert [i["name"] for i in numbers(run, "incidents")] == ["step-00000012", "step-00000010"]
    assert numbers(run) == numbers(whole[0])
    assert all(torch.equal(tensor, end[name]) for name, tensor in whole[1].items())
    assert steps_saved(run) == [8, 10, 12]

    for path in list_checkpoints(run / "checkpoints"):
        (path / "state.json").unlink()
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* is undamaged: .*step-00000012"):
        build().resume(RunFolder(run))


def test_a_checkpoint_that_cannot_be_written_is_told_and_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write = checkpoint.write_rank_file

    def failing(path: Path, pieces: Any) -> Any:
        if "00000004" in str(path):
            (path / "rank-00000-of-00001.safetensors").write_bytes(b"half")
            raise OSError(28, "No space left on device")
        return write(path, pieces)

    monkeypatch.setattr(checkpoint, "write_rank_file", failing)
    run = tmp_path / "run"
    train(run, build(keep_checkpoints=9))
    assert steps_saved(run) == [2, 6, 8, 10, 12]
    assert [i["reason"] for i in numbers(run, "incidents")] == ["[Errno 28] No space left on device"]
    assert "the checkpoint of step 4 could not be written" in caplog.text
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

    trainer = build(evaluate_every=5)
    begun = time.monotonic()
    with pytest.raises(Interrupted, match="stopped after step 5"):
        train(run, trainer, evaluate=long_evaluation)
    assert time.monotonic() - begun < 15
    trainer = build(evaluate_every=5)
    train(run, trainer, evaluate=evaluate)
    assert evaluated == [5, 10, 12]
    assert [(r["step"], r["set"]) for r in numbers(run, "evaluations")] == [(s, "whole") for s in (5, 10, 12)]
    assert numbers(run) == numbers(whole[0])


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


VALUES = {2: 0.2, 4: 0.5, 6: 0.5, 8: 0.4, 10: 0.6, 12: 0.1}
"""What is measured after every second step."""


@pytest.mark.parametrize(("patience", "end", "best"), [(0, 12, Best(10, 0.6, 1)), (2, 8, Best(4, 0.5, 2))])
@pytest.mark.parametrize("killed_at", [None, 3, 6, 8])
def test_the_best_evaluation_is_known_and_patience_ends_across_kills(
    tmp_path: Path, patience: int, end: int, best: Best, killed_at: int | None
) -> None:
    run = tmp_path / "run"
    settings = {"evaluate_every": 2, "keep_best": "held", "early_stop": patience, "keep_checkpoints": 2}

    def killed(step: int) -> float:
        if step == killed_at:
            raise MemoryError  # ends the process, after the save and before the note
        return VALUES[step]

    def stop(number: int) -> None:
        if number == killed_at:
            raise MemoryError

    if killed_at is not None:
        with pytest.raises(MemoryError):
            train(run, build(**settings), evaluate=killed, before=stop if killed_at % 2 else lambda number: None)
    trainer = train(run, build(**settings), evaluate=VALUES.__getitem__)
    assert (trainer.step, trainer.best, trainer.stops_early) == (end, best, patience > 0)
    (run / "final").mkdir()  # what comes after the training
    again = build(**settings)
    again.resume(RunFolder(run))
    if patience:
        assert (again.step, again.best, again.stops_early) == (end, best, True)
        assert train(run, build(**settings), evaluate=VALUES.__getitem__).step == end


def test_an_evaluation_that_fails_is_no_sign_of_anything(tmp_path: Path) -> None:
    def failing(step: int) -> float:
        if step in (6, 8):
            raise DataError("gone")
        return VALUES[step]

    trainer = train(tmp_path / "run", build(evaluate_every=2, keep_best="held", early_stop=2), evaluate=failing)
    assert (trainer.step, trainer.best) == (12, Best(10, 0.6, 1))


def test_a_signal_repeated_by_torchrun_is_one_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "run")
    with StopRequest() as stop:
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
    write, later_step = checkpoint.write_rank_file, threading.Event()

    def waiting(path: Path, pieces: Any) -> Any:
        assert later_step.wait(timeout=60)
        return write(path, pieces)

    monkeypatch.setattr(checkpoint, "write_rank_file", waiting)
    run = tmp_path / "run"
    train(run, before=lambda number: later_step.set() if number == 4 else None)
    assert steps_saved(run) == [8, 10, 12]
