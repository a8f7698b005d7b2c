"""Scores that serve for several epochs: which are read, and that neither a resume nor other processes change it."""

import copy
import functools
import logging
import os
import shutil
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import made_training
import pytest
import torch
from made_training import ROWS
from torch import Tensor

from aclip import dist
from aclip.cli.compose import open_batches, open_dataset
from aclip.data import CaptionTokenizer, PairDataset, RawSample
from aclip.engine import checkpoint, score_cache
from aclip.engine.loop import fit, resume
from aclip.engine.score_cache import SETTLED, open_caches
from aclip.errors import ConfigError
from aclip.run_folder import RunFolder
from aclip.structs import Batch
from made_pictures import WordTokenizer, encode, picture
from over_ranks import EOT, run_ranks
from test_method import literal_crop, literal_keep, literal_scores

PICTURES, EPOCH, STEPS = 43, 5, 22  # three of the pictures are left out of every epoch of five batches of eight
BAD = 7
RECIPE = ("attentive-2x50 passes.context.refresh=2 ema_momentum.start=0.5 ema_momentum.end=0.5 "
          "optimization.lr=0.001 optimization.warmup_start_lr=0.001")


class Made:
    """Noisy pictures of different sizes, of which one is bad."""

    name = "made"

    def __len__(self) -> int:
        return PICTURES

    def key(self, index: int) -> str:
        return str(index)

    def read(self, index: int) -> RawSample:
        image = encode(picture(index, 40 + index)) if index != BAD else b""
        return RawSample(str(index), image, (f"picture {index} of noise",))


class FewWords(WordTokenizer):
    """Ids that `vit-nano` knows."""

    def __call__(self, texts: list[str]) -> Tensor:
        rows = super().__call__(texts)
        return torch.where(rows == 999, EOT, rows % EOT)


class Watched:
    """A training, and what was chosen and scored in each of its batches."""

    def __init__(self, folder: Path, recipe: str = RECIPE, fresh: bool = True, **changes: Any) -> None:
        folder.mkdir(exist_ok=True)
        self.folder = folder
        self.trainer = made_training.build(recipe, total_steps=STEPS, masked_steps=STEPS, steps_per_epoch=EPOCH,
                                           save_every=EPOCH, **changes)
        if not fresh:
            resume(self.trainer, RunFolder(folder))
        method = self.trainer.method
        self.trainer.score_caches = open_caches(folder, method.plan, samples=PICTURES, steps_per_epoch=EPOCH,
                                                fresh=fresh)
        self.kept: dict[int, Tensor] = {}
        self.scored: dict[int, int] = defaultdict(int)
        self.batches: dict[int, Batch] = {}
        self.averages: dict[int, dict[str, Tensor]] = {}
        self.grids: dict[int, dict[str, tuple[int, int]]] = {}
        judge, encode_pass = method.judge, method.encode

        def watching(encoded: Any, caption_ids: Tensor) -> Any:
            number, kept = self.trainer.batch_number, encoded.passes["masked"].keep_indices
            self.grids[number] = {name: one.grid_size for name, one in encoded.passes.items()}
            if kept is not None:
                self.kept[number] = kept.clone()
            return judge(encoded, caption_ids)

        def counting(p: Any, views: list[Tensor], keep: Any) -> Any:
            self.scored[self.trainer.batch_number] += len(views[0]) if p.spec.name == "context" else 0
            return encode_pass(p, views, keep)

        method.judge, method.encode = watching, counting  # type: ignore[method-assign]

    def batches_from_here(self) -> Iterator[Batch]:
        dataset: PairDataset = open_dataset(self.trainer, Made(), CaptionTokenizer(FewWords(16)))
        for batch in open_batches(self.trainer, dataset, STEPS, workers=0):
            number = self.trainer.batch_number
            self.batches[number] = batch
            if self.trainer.method.ema_visual is not None:
                self.averages[number] = {k: v.clone() for k, v in self.trainer.method.ema_visual.state_dict().items()}
            yield batch

    def train(self, until: int = STEPS, saving: bool = False) -> "Watched":
        """Take steps, and leave a checkpoint after every epoch if asked to."""
        for batch in self.batches_from_here():
            if self.trainer.step == until:
                break
            self.trainer.train_step(batch)
            if saving and self.trainer.step % EPOCH == 0:
                checkpoint.save(self.folder / "checkpoints", self.trainer.at_rest(), keep=99)
        return self

    def end(self) -> dict[str, Tensor]:
        """Return the state after the last step."""
        return dict(self.trainer.at_rest().tensors)


def known_by_hand(batches: dict[int, Batch], refresh: int) -> dict[int, dict[int, int]]:
    """Return, batch by batch, the pictures whose scores are known, and the batch that they are from."""
    scored: dict[int, int] = {}
    found = {}
    for number in sorted(batches):
        start = number // (refresh * EPOCH) * refresh * EPOCH
        known = {one: scored[one] for one in batches[number].numbers
                 if start <= scored.get(one, -1) <= number - SETTLED}
        scored |= {one: number for one in batches[number].numbers if one not in known}
        found[number] = known
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Watched:
    """An undisturbed run."""
    return Watched(tmp_path_factory.mktemp("whole") / "run").train()


def same(one: Watched, other: Watched) -> bool:
    """Return whether two runs have chosen the same patches, as far as the first went, and ended alike."""
    end, others = one.end(), other.end()
    return (all(torch.equal(kept, other.kept[number]) for number, kept in one.kept.items())
            and all(torch.equal(tensor, others[name]) for name, tensor in end.items()))


def test_what_is_not_known_is_scored_and_nothing_else(whole: Watched) -> None:
    known = known_by_hand(whole.batches, refresh=2)
    expected = {number: sum(one not in known[number] for one in batch.numbers)
                for number, batch in whole.batches.items()}
    assert {number: whole.scored[number] for number in expected} == expected
    assert [expected[number] for number in range(EPOCH)] == [8] * EPOCH
    again = [expected[number] for number in range(EPOCH, 2 * EPOCH)]
    assert 0 in again
    assert any(0 < count < 8 for count in again)  # left out or in the place of a bad one before, or too fresh
    assert BAD not in {one for batch in whole.batches.values() for one in batch.numbers}


def test_masks_are_those_of_the_stored_scores(whole: Watched) -> None:
    """Scored anew with the weights of the step that scored, rounded to bytes, resampled and chosen, slowly."""
    known, checked = known_by_hand(whole.batches, refresh=2), 0
    visual = copy.deepcopy(whole.trainer.method.ema_visual)
    assert visual is not None
    for number in (EPOCH + 1, 3 * EPOCH + 3):
        batch = whole.batches[number]
        context = batch.views["context"]
        assert context.boxes[:, :2].eq(0).all()
        for row, one in enumerate(batch.numbers):
            assert context.boxes[row, 2:].tolist() == [40 + one] * 2
            visual.load_state_dict(whole.averages[known[number].get(one, number)])
            with torch.no_grad():
                scores = literal_scores(visual, (context.pixels[row] / 255.0 - 0.5) / 0.25)
            stored = ((scores / scores.max()).sqrt() * 255).round() / 255
            for view in (0, 1):
                of = batch.views["ab"[view]]
                cropped = literal_crop(stored**2, 8, context.boxes[row], of.boxes[row], bool(of.flipped[row]))
                assert whole.kept[number][view, row].tolist() == literal_keep(cropped, 8, 0.5)
                checked += one in known[number]
    assert checked > 16


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was stopped in its second period."""
    return Watched(tmp_path_factory.mktemp("killed") / "run").train(17, saving=True).folder


@pytest.mark.parametrize("step", [5, 10, 15])
def test_a_resume_reads_what_the_run_had_read(tmp_path: Path, whole: Watched, killed: Path, step: int) -> None:
    """From a checkpoint of the period in which the run was stopped, or of the one before."""
    shutil.copytree(killed, tmp_path / "resumed")
    for path in checkpoint.list_checkpoints(tmp_path / "resumed" / "checkpoints"):
        if checkpoint.step_of(path) > step:
            shutil.rmtree(path)
    resumed = Watched(tmp_path / "resumed", fresh=False)
    assert resumed.trainer.step == step
    assert same(resumed.train(), whole)


def test_without_its_file_a_run_goes_on_otherwise_and_says_so(
    tmp_path: Path, whole: Watched, killed: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(killed, tmp_path / "resumed")
    path = tmp_path / "resumed" / "scores-context.rows"
    assert path.stat().st_size == 2 * PICTURES * (64 + 8)
    path.unlink()
    resumed = Watched(path.parent, fresh=False).train()
    assert "scores-context.rows is gone: scores are computed anew" in caplog.text
    assert not same(resumed, whole)
    with path.open("ab") as file:
        file.write(b"more")
    Watched(path.parent, fresh=False)
    assert "bytes, not 6,192: scores are computed anew" in caplog.text


def test_a_run_that_went_back_resumes_to_the_same_numbers(tmp_path: Path) -> None:
    """Batches go on where the tried ones end, and so does the count by which rows are known."""

    def run(folder: Path, fresh: bool) -> Watched:
        one = Watched(folder, fresh=fresh, most_skipped=2, keep_checkpoints=9)

        def opened() -> Iterator[Batch]:
            for batch in one.batches_from_here():
                yield made_training.poisoned(batch) if 7 <= one.trainer.batch_number <= 9 else batch

        fit(one.trainer, opened, RunFolder(folder), (), lambda step: None)
        return one

    first = run(tmp_path / "first", fresh=True)
    assert first.trainer.skipped_batches == 5  # back from step 10 to step 5
    (tmp_path / "again").mkdir()
    shutil.copytree(first.folder, tmp_path / "again", dirs_exist_ok=True)
    for path in checkpoint.list_checkpoints(tmp_path / "again" / "checkpoints"):
        if checkpoint.step_of(path) > 15:
            shutil.rmtree(path)
    again = run(tmp_path / "again", fresh=False)
    assert same(again, first)
    assert made_training.numbers(again.folder) == made_training.numbers(first.folder)


@pytest.mark.parametrize("changes", ["passes.context.encoder=online", "passes.context.resolution=0.5",
                                     "passes.context.score_layers=1"])
def test_other_passes_are_kept_as_well(tmp_path: Path, changes: str) -> None:
    recipe = f"{RECIPE} {changes}"
    stopped = Watched(tmp_path / "run", recipe).train(EPOCH + 2, saving=True)
    shutil.copytree(stopped.folder, tmp_path / "resumed")
    assert sum(stopped.scored[number] for number in range(EPOCH, EPOCH + 2)) < 16
    assert same(Watched(tmp_path / "resumed", recipe, fresh=False).train(2 * EPOCH), stopped.train(2 * EPOCH))


SLOW = f"{RECIPE} optimization.lr=1e-7 optimization.warmup_start_lr=1e-7"  # so that rounding does not grow


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Watched:
    """A slow run on one process, of two epochs."""
    return Watched(tmp_path_factory.mktemp("alone") / "run", SLOW).train(2 * EPOCH)


def test_parts_of_a_batch_choose_what_the_whole_does(tmp_path: Path, alone: Watched) -> None:
    parts = Watched(tmp_path / "parts", SLOW, micro_batch=3).train(2 * EPOCH)
    assert all(torch.equal(kept, alone.kept[number]) for number, kept in parts.kept.items())
    assert parts.scored == alone.scored


def of_this_rank(folder: Path) -> tuple[dict[int, Tensor], list[str]]:
    """Return what this rank's samples keep, and what is said of processes that cannot share scores."""
    kept, said = Watched(folder / "together", SLOW).train(2 * EPOCH).kept, []
    for parallel, machines in (("fsdp", ["one", "one"]), ("ddp", ["one", "another"])):
        score_cache._machine = functools.partial(machines.__getitem__, dist.rank())
        with pytest.raises(ConfigError) as caught:
            made_training.build(RECIPE, parallel=parallel)
        said.append(str(caught.value))
    return kept, said


def test_two_ranks_choose_what_one_process_does(tmp_path: Path, alone: Watched) -> None:
    ranks = run_ranks(2, tmp_path, of_this_rank)
    for number, kept in alone.kept.items():
        assert torch.equal(torch.cat([others[number] for others, _ in ranks], dim=1), kept)
    for _, said in ranks:
        assert "--parallel fsdp cannot do" in said[0]
        assert "cannot do from 2 machines: use one, or refresh=1" in said[1]


def test_unmasked_steps_and_small_pictures_need_no_other_scores(tmp_path: Path) -> None:
    one = Watched(tmp_path / "run")
    one.trainer.timetable = replace(one.trainer.timetable, masked_steps=2 * EPOCH, resolutions=((EPOCH + 2, 0.5),))
    one.train(2 * EPOCH + 2)
    grids = [one.grids[number] for number in range(2 * EPOCH + 2)]
    assert [grid["masked"] for grid in grids] == [(4, 4)] * 7 + [(8, 8)] * 5
    assert all(grid["context"] == (8, 8) for grid in grids[: 2 * EPOCH])
    assert sum(one.scored[number] for number in range(EPOCH + 2, 2 * EPOCH)) < 24  # small steps have scored the others
    assert all("context" not in grid for grid in grids[2 * EPOCH :])


def test_a_full_disk_is_told_once_and_training_goes_on(
    tmp_path: Path, whole: Watched, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(os, "pwrite", lambda file, data, place: len(data) - 1)
    one = Watched(tmp_path / "run").train(EPOCH + 3)
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "scores cannot be kept (No space left on device)" in caplog.text
    assert [one.scored[number] for number in range(EPOCH + 3)] == [8] * (EPOCH + 3)


@pytest.mark.parametrize("change", ["passes.masked.mask_ratio=0", "passes.masked.mask_ratio=0.01"])
def test_where_nothing_is_removed_nothing_is_scored(tmp_path: Path, change: str) -> None:
    run = Watched(tmp_path, f"{RECIPE} {change}").train(until=2)
    assert run.trainer.step == 2
    assert not any(run.scored.values())
    assert not run.kept


def test_scores_begin_with_the_resolution_at_which_they_choose(tmp_path: Path) -> None:
    run = Watched(tmp_path)
    assert run.trainer.method.plan_at(0.25).passes[1].grid_size == (2, 2)  # one block of 2 x 2, which stays
    run.trainer.timetable = replace(run.trainer.timetable, resolutions=((2, 0.25),))
    run.train(until=4)
    assert dict(run.scored) == {0: 0, 1: 0, 2: ROWS, 3: ROWS}
    assert sorted(run.kept) == [2, 3]
