"""Checkpoints: whole or absent, the newest few, and no pickle."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from aclip.engine import checkpoint
from aclip.engine.checkpoint import Checkpoint, list_checkpoints, load, load_latest, save
from aclip.errors import CheckpointError


def made(step: int) -> Checkpoint:
    shared = torch.arange(6.0).reshape(2, 3) + step
    tensors = {
        "method/model.a": shared,
        "method/model.tied": shared,  # the same memory twice
        "method/model.t": shared.T,  # not contiguous
        "optimizer/a/step": torch.tensor(float(step)),
        "count": torch.tensor([step], dtype=torch.int64),
        "half": torch.ones(2, dtype=torch.bfloat16),
    }
    return Checkpoint(step, tensors, {"samples_seen": step * 7, "scaler": {}, "text": "é"})


def test_comes_back_bit_for_bit(tmp_path: Path) -> None:
    path = save(tmp_path / "checkpoints", made(12), keep=2)
    assert path.name == "step-00000012"
    loaded = load(path)
    assert loaded.step == 12
    assert loaded.values == made(12).values
    assert loaded.tensors.keys() == made(12).tensors.keys()
    for name, tensor in made(12).tensors.items():
        assert torch.equal(loaded.tensors[name], tensor)
        assert loaded.tensors[name].dtype == tensor.dtype


def test_parts_are_cut_by_prefix() -> None:
    saved = made(1)
    assert set(saved.part("method")) == {"model.a", "model.tied", "model.t"}
    assert set(saved.part("optimizer")) == {"a/step"}
    assert saved.part("meth") == {}


def test_keeps_the_newest(tmp_path: Path) -> None:
    for step in (5, 100, 20, 99999999):
        save(tmp_path, made(step), keep=2)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-00000100", "step-99999999"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000100", "step-99999999"]
    assert load_latest(tmp_path).step == 99999999


def test_the_same_step_is_replaced(tmp_path: Path) -> None:
    save(tmp_path, made(5), keep=1)
    changed = Checkpoint(5, {"a": torch.zeros(1)}, {"samples_seen": 0})
    save(tmp_path, changed, keep=1)
    assert set(load_latest(tmp_path).tensors) == {"a"}
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000005"]


class Killed(BaseException):
    """The process ends here."""


def fail(error: BaseException) -> Callable[..., Any]:
    def raising(*_: object, **__: object) -> None:
        raise error

    return raising


WRITING = [("write_shard", checkpoint), ("_sync", checkpoint), ("rename", Path), ("write_text", Path)]


@pytest.mark.parametrize(("name", "owner"), WRITING, ids=[name for name, _ in WRITING])
def test_a_killed_write_leaves_the_older_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, owner: object
) -> None:
    save(tmp_path, made(10), keep=1)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, fail(Killed()))
        with pytest.raises(Killed):
            save(tmp_path, made(20), keep=1)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-00000010"]
    assert load_latest(tmp_path).step == 10
    save(tmp_path, made(20), keep=1)  # what the killed write left is no obstacle
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000020"]


def test_removing_is_all_or_nothing_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, made(10), keep=1)
    remove_tree = shutil.rmtree

    def killed_in_the_middle(path: Path, **options: Any) -> None:
        if (Path(path) / "state.json").exists():
            (Path(path) / "state.json").unlink()
            raise Killed
        remove_tree(path, **options)

    for step in (10, 20):  # the same step written again; an older one removed
        with monkeypatch.context() as patch:
            patch.setattr(shutil, "rmtree", killed_in_the_middle)
            with pytest.raises(Killed):
                save(tmp_path, made(step), keep=1)
        assert [load(path).step for path in list_checkpoints(tmp_path)] == [step]
    save(tmp_path, made(30), keep=1)
    assert load_latest(tmp_path).step == 30


def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, made(10), keep=1)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_shard", fail(OSError(28, "No space left on device")))
        with pytest.raises(CheckpointError, match=r"cannot write the checkpoint of step 20 in .*: .*No space left"):
            save(tmp_path, made(20), keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000010"]


def test_only_whole_names_count(tmp_path: Path) -> None:
    for name in (".step-00000030.tmp", "step-30", "step-000000300", "step-00000030.bak", "other"):
        (tmp_path / name).mkdir()
    assert list_checkpoints(tmp_path) == []
    assert list_checkpoints(tmp_path / "missing") == []
    with pytest.raises(CheckpointError, match="there is no checkpoint in"):
        load_latest(tmp_path)


def cut_tensors(path: Path) -> None:
    file = path / "state.safetensors"
    file.write_bytes(file.read_bytes()[:-5])


@pytest.mark.parametrize(
    "damage",
    [
        cut_tensors,
        lambda path: (path / "state.safetensors").unlink(),
        lambda path: (path / "state.json").unlink(),
        lambda path: (path / "state.json").write_text('{"step": 1'),
        lambda path: (path / "state.json").write_text("{}"),
        lambda path: (path / "state.json").write_text("[]"),
        lambda path: shutil.rmtree(path),
    ],
    ids=["tensors cut", "no tensors", "no values", "values cut", "no step", "a list", "no folder"],
)
def test_damage_is_reported(tmp_path: Path, damage: Callable[[Path], object]) -> None:
    path = save(tmp_path, made(10), keep=1)
    damage(path)
    with pytest.raises(CheckpointError, match="step-00000010 cannot be read"):
        load(path)


def test_no_pickle_on_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("torch.load", "torch.save", "pickle.load", "pickle.loads", "pickle.dumps", "pickle.dump"):
        monkeypatch.setattr(module, fail(AssertionError(f"{module} was called")))
    path = save(tmp_path, made(3), keep=1)
    assert load(path).step == 3
    assert sorted(p.name for p in path.iterdir()) == ["state.json", "state.safetensors"]
    assert load_file(path / "state.safetensors").keys() == made(3).tensors.keys()
    assert json.loads((path / "state.json").read_text())["step"] == 3


def test_a_pickle_in_the_place_of_tensors_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, made(3), keep=1)
    torch.save({"a": torch.zeros(1)}, path / "state.safetensors")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load(path)
