"""Checkpoints: whole or absent, the newest few, and no pickle."""

import json
import pickle
import re
import shutil
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as torch_checkpoint
from safetensors.torch import load_file
from safetensors.torch import save_file as safetensors_save

from aclip.engine import checkpoint
from aclip.engine.checkpoint import Checkpoint, list_checkpoints, load, load_newest, save
from aclip.errors import CheckpointError
from aclip.tensor_files import StoredTensors, mark_of


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


def test_keeps_the_newest(tmp_path: Path) -> None:
    for step in (5, 100, 20, 99999999):
        save(tmp_path, made(step), keep=2)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-00000100", "step-99999999"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000100", "step-99999999"]
    assert load_newest(tmp_path)[0].step == 99999999


def test_the_same_step_is_replaced(tmp_path: Path) -> None:
    save(tmp_path, made(5), keep=1)
    changed = Checkpoint(5, {"a": torch.zeros(1)}, {"samples_seen": 0})
    save(tmp_path, changed, keep=1)
    assert set(load_newest(tmp_path)[0].tensors) == {"a"}
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
    assert load_newest(tmp_path)[0].step == 10
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
    assert load_newest(tmp_path)[0].step == 30


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
        load_newest(tmp_path)


def cut_tensors(path: Path) -> None:
    file = path / "state.safetensors"
    file.write_bytes(file.read_bytes()[:-5])


def flip(name: str, where: float) -> Callable[[Path], object]:
    """Return what flips a bit of a file, `where` of it from its start."""

    def damage(path: Path) -> None:
        content = bytearray((path / name).read_bytes())
        content[int(where * len(content))] ^= 1
        (path / name).write_bytes(content)

    return damage


def count_more(path: Path) -> None:
    text = (path / "state.json").read_text()
    (path / "state.json").write_text(re.sub(r'"samples_seen": \d+', '"samples_seen": 1', text))


DAMAGES = {
    "tensors cut": cut_tensors,
    "tensors flipped": flip("state.safetensors", 0.999),
    "header flipped": flip("state.safetensors", 0.05),
    "values flipped": flip("state.json", 0.5),
    "values changed": count_more,
    "no tensors": lambda path: (path / "state.safetensors").unlink(),
    "no values": lambda path: (path / "state.json").unlink(),
    "values cut": lambda path: (path / "state.json").write_text('{"step": 1'),
    "values deep": lambda path: (path / "state.json").write_text("[" * 100_000),
    "no step": lambda path: (path / "state.json").write_text("{}"),
    "a list": lambda path: (path / "state.json").write_text("[]"),
    "no folder": lambda path: shutil.rmtree(path),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_damage_is_reported_and_the_one_before_found(tmp_path: Path, damage: Callable[[Path], object]) -> None:
    before = save(tmp_path, made(9), keep=2)
    path = save(tmp_path, made(10), keep=2)
    damage(path)
    with pytest.raises(CheckpointError, match="step-00000010 cannot be read"):
        load(path)
    assert checkpoint.newest_good(tmp_path)[0] == before
    assert load_newest(tmp_path)[0].step == 9
    damage(before)
    with pytest.raises(CheckpointError, match=r"there is no checkpoint in .* to start from"):
        load_newest(tmp_path)


def test_every_nth_is_kept_for_good(tmp_path: Path) -> None:
    for step in range(2, 22, 2):
        save(tmp_path, made(step), keep=2, keep_step=6)
    assert [checkpoint.step_of(p) for p in list_checkpoints(tmp_path)] == [6, 12, 18, 20]


def test_a_later_damaged_one_does_not_push_out_good_ones(tmp_path: Path) -> None:
    for step in (10, 20):
        save(tmp_path, made(step), keep=2)
    cut_tensors(tmp_path / "step-00000020")
    save(tmp_path, made(15), keep=1)  # after a fall back to step 10
    assert load_newest(tmp_path)[0].step == 15
    assert checkpoint.put_away(tmp_path / "step-00000020").name == "step-00000020.damaged"
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-00000015"]


def test_torch_reads_the_tensors(tmp_path: Path) -> None:
    """The layout is that of torch's distributed checkpoints in safetensors files."""
    path = save(tmp_path, made(3), keep=1)
    target = {name: torch.zeros_like(tensor) for name, tensor in made(3).tensors.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is one process
        torch_checkpoint.load(target, storage_reader=torch_checkpoint.HuggingFaceStorageReader(str(path)))
    for name, tensor in made(3).tensors.items():
        assert torch.equal(target[name], tensor), name


def test_no_pickle_on_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("torch.load", "torch.save", "pickle.load", "pickle.loads", "pickle.dumps", "pickle.dump"):
        monkeypatch.setattr(module, fail(AssertionError(f"{module} was called")))
    path = save(tmp_path, made(3), keep=1)
    assert load(path).step == 3
    assert sorted(p.name for p in path.iterdir()) == ["state.json", "state.safetensors"]
    assert load_file(path / "state.safetensors").keys() == made(3).tensors.keys()
    assert json.loads((path / "state.json").read_text())["step"] == 3


class Bomb:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> Any:
        return Path.touch, (Path("exploded"),)


def test_a_malicious_checkpoint_runs_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pickles wherever a file may be, behind checksums that are right, and a file name that leads out of the folder."""
    monkeypatch.chdir(tmp_path)
    secret = tmp_path / "state.safetensors"
    safetensors_save({"a": torch.zeros(1)}, secret)
    payloads = [pickle.dumps(Bomb()), b""]
    torch.save({"a": Bomb()}, tmp_path / "torch.pt")
    payloads.append((tmp_path / "torch.pt").read_bytes())
    # a header that promises what is not there, and one of a size that nobody has
    payloads += [(2**40).to_bytes(8, "little") + b"{}", (64).to_bytes(8, "little")
                 + b'{"a":{"dtype":"F32","shape":[9999999999999],"data_offsets":[0,4]}} ']
    for payload in payloads:
        path = save(tmp_path / "run", made(3), keep=1)
        for extra in (".metadata", "optimizer.pt", "state.pkl"):
            (path / extra).write_bytes(payload)
        (path / "state.safetensors").write_bytes(payload)
        commit_again(path, "state.safetensors")
        with pytest.raises(CheckpointError, match="cannot be read"):
            load(path)
    for name in ("../../state.safetensors", str(secret), "state.json"):
        path = save(tmp_path / "run", made(3), keep=1)
        commit_again(path, name)
        with pytest.raises(CheckpointError, match="names a file"):
            load(path)
    assert not (tmp_path / "exploded").exists()
    pickle.loads(pickle.dumps(Bomb()))
    assert (tmp_path / "exploded").exists()  # it would have


def commit_again(path: Path, name: str) -> None:
    """Write `state.json` for what a checkpoint holds now, as its attacker would."""
    mark = mark_of(path / name)
    shutil.move(path, path.with_name("attack"))
    checkpoint.commit(path.parent, path.with_name("attack"), 3, {}, [replace(mark, name=name)], keep=1)


@pytest.mark.parametrize("places", ["5", "[1]", '{"a": 5}', '{"a": {}}', '{"a": {"saved_offsets": [Infinity]}}',
                                    "[" * 99999], ids=range(6))
def test_places_that_make_no_sense_are_damage(tmp_path: Path, places: str) -> None:
    safetensors_save({"a": torch.zeros(1)}, tmp_path / "state.safetensors", metadata={"DCP_SHARDING_INFO": places})
    with pytest.raises(ValueError, match="make no sense"):
        StoredTensors.of_folder(tmp_path)
