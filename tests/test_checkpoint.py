"""Checkpoints: whole or absent, verified on every read, readable by torch, and no pickle."""

import json
import pickle
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from safetensors.torch import save_file as safetensors_save
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.state_dict_loader import load

from aclip import checkpoint
from aclip.checkpoint import list_checkpoints, open_checkpoint, open_newest, prune
from aclip.errors import CheckpointError

FILE = "rank-00000-of-00001.safetensors"


def tensors(step: int) -> dict[str, torch.Tensor]:
    shared = torch.arange(6.0).reshape(2, 3) + step
    return {
        "method/model.a": shared,
        "method/model.t": shared.T.clone(),
        "optimizer/a/step": torch.tensor(float(step)),
        "count": torch.tensor([step], dtype=torch.int64),
        "half": torch.ones(2, dtype=torch.bfloat16),
        "empty": torch.empty(0),
    }


VALUES = {"samples_seen": 84, "scaler": {}, "text": "é"}


def save(folder: Path, step: int) -> Path:
    temporary = folder / f".step-{step}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    checkpoint.write_rank_file(temporary, checkpoint.own_part(tensors(step)))
    return checkpoint.commit(folder, temporary, step, VALUES)


def test_comes_back_bit_for_bit(tmp_path: Path) -> None:
    path = save(tmp_path / "checkpoints", 12)
    assert path.name == "step-00000012"
    stored = open_checkpoint(path)
    assert stored.step == 12
    assert stored.values == VALUES
    found = stored.tensors()
    assert found.keys() == tensors(12).keys()
    for name, tensor in tensors(12).items():
        assert torch.equal(found[name], tensor)
        assert found[name].dtype == tensor.dtype
    assert stored.tensors("method/model.").keys() == {"a", "t"}


def test_loads_in_place_and_names_what_does_not_fit(tmp_path: Path) -> None:
    stored = open_checkpoint(save(tmp_path, 3))
    target = torch.zeros(2, 3)
    stored.load_into({"method/model.a": target})
    assert torch.equal(target, tensors(3)["method/model.a"])
    with pytest.raises(CheckpointError, match=r"has no tensor 'method/model\.b'"):
        stored.load_into({"method/model.b": target})
    with pytest.raises(CheckpointError, match=r"'method/model.a' has shape \[2, 3\] in the checkpoint .* and \[3\]"):
        stored.load_into({"method/model.a": torch.zeros(3)})


def test_keeps_the_newest_and_every_nth(tmp_path: Path) -> None:
    for step in range(2, 22, 2):
        save(tmp_path, step)
        prune(tmp_path, keep=2, keep_every=6)
    assert [checkpoint.step_of(p) for p in list_checkpoints(tmp_path)] == [6, 12, 18, 20]
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"step-000000{n}" for n in ("06", "12", "18", "20")]
    assert open_newest(tmp_path).step == 20


def test_the_same_step_is_replaced(tmp_path: Path) -> None:
    save(tmp_path, 5)
    save(tmp_path, 5)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000005"]


class Killed(BaseException):
    """The process ends here."""


def fail(error: BaseException) -> Callable[..., Any]:
    def raising(*_: object, **__: object) -> None:
        raise error

    return raising


WRITING = [("write_rank_file", checkpoint), ("_sync", checkpoint), ("rename", Path), ("write_text", Path)]


@pytest.mark.parametrize(("name", "owner"), WRITING, ids=[name for name, _ in WRITING])
def test_a_killed_write_leaves_the_older_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, owner: object
) -> None:
    save(tmp_path, 10)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, fail(Killed()))
        with pytest.raises(Killed):
            save(tmp_path, 20)
    assert open_newest(tmp_path).step == 10


def test_removing_is_all_or_nothing_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 10)
    save(tmp_path, 20)
    remove_tree = shutil.rmtree

    def killed_half_way(path: Path, **options: Any) -> None:
        if (Path(path) / "state.json").exists():
            (Path(path) / "state.json").unlink()
            raise Killed
        remove_tree(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed_half_way)
        with pytest.raises(Killed):
            prune(tmp_path, keep=1)
    assert [open_checkpoint(path).step for path in list_checkpoints(tmp_path)] == [20]


def test_only_whole_names_count(tmp_path: Path) -> None:
    for name in (".step-00000030.tmp", "step-30", "step-00000030.bak", "other"):
        (tmp_path / name).mkdir()
    assert list_checkpoints(tmp_path) == list_checkpoints(tmp_path / "missing") == []
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* is undamaged"):
        open_newest(tmp_path)


def flip(name: str, where: float) -> Callable[[Path], object]:
    """Return what flips a bit of a file, `where` of it from its start."""

    def damage(path: Path) -> None:
        content = bytearray((path / name).read_bytes())
        content[int(where * len(content))] ^= 1
        (path / name).write_bytes(content)

    return damage


DAMAGES: dict[str, Callable[[Path], object]] = {
    "tensors truncated": lambda path: (path / FILE).write_bytes((path / FILE).read_bytes()[:-5]),
    "tensors flipped": flip(FILE, 0.999),
    "header flipped": flip(FILE, 0.05),
    "values flipped": flip("state.json", 0.5),
    "no tensors": lambda path: (path / FILE).unlink(),
    "one file more": lambda path: shutil.copy(path / FILE, path / "other.safetensors"),
    "no values": lambda path: (path / "state.json").unlink(),
    "values truncated": lambda path: (path / "state.json").write_text('{"step": 1'),
    "values deep": lambda path: (path / "state.json").write_text("[" * 100_000),
    "no step": lambda path: (path / "state.json").write_text("{}"),
    "a list": lambda path: (path / "state.json").write_text("[]"),
    "no folder": lambda path: shutil.rmtree(path),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_damage_is_noticed_and_the_one_before_found(tmp_path: Path, damage: Callable[[Path], object]) -> None:
    save(tmp_path, 9)
    path = save(tmp_path, 10)
    damage(path)
    with pytest.raises(CheckpointError, match="step-00000010 is damaged"):
        open_checkpoint(path)
    assert open_newest(tmp_path).step == 9


def test_torch_reads_the_tensors(tmp_path: Path) -> None:
    """The layout is that of torch's distributed checkpoints in safetensors files."""
    path = save(tmp_path, 3)
    target = {name: torch.zeros_like(tensor) for name, tensor in tensors(3).items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is one process
        load(target, storage_reader=HuggingFaceStorageReader(str(path)))
    for name, tensor in tensors(3).items():
        assert torch.equal(target[name], tensor), name


def test_no_pickle_on_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("torch.load", "torch.save", "pickle.load", "pickle.loads", "pickle.dumps", "pickle.dump"):
        monkeypatch.setattr(module, fail(AssertionError(f"{module} was called")))
    path = save(tmp_path, 3)
    assert open_checkpoint(path).tensors().keys() == tensors(3).keys()
    assert sorted(p.name for p in path.iterdir()) == [FILE, "state.json"]
    assert load_file(path / FILE).keys() == tensors(3).keys()
    assert json.loads((path / "state.json").read_text())["step"] == 3


class Bomb:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> Any:
        return Path.touch, (Path("exploded"),)


HUGE = b'{"a":{"dtype":"F32","shape":[9999999999999],"data_offsets":[0,4]}} '
PAYLOADS = [pickle.dumps(Bomb()), b"", (2**40).to_bytes(8, "little") + b"{}", len(HUGE).to_bytes(8, "little") + HUGE]


@pytest.mark.parametrize("payload", PAYLOADS, ids=["pickle", "empty", "long header", "huge tensor"])
def test_a_malicious_checkpoint_runs_no_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, payload: bytes
) -> None:
    """Behind checksums that are right, as an attacker would write them."""
    monkeypatch.chdir(tmp_path)
    path = save(tmp_path / "run", 3)
    for extra in (".metadata", "optimizer.pt", "state.pkl", FILE):
        (path / extra).write_bytes(payload)
    path = checkpoint.commit(path.parent, shutil.move(path, path.with_name("attack")), 3, {})
    with pytest.raises(CheckpointError, match="is damaged"):
        open_checkpoint(path)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("offsets", ["5", "[1]", '{"a": 5}', '{"a": {}}', '{"a": {"saved_offsets": [1000000000000]}}',
                                     "[" * 99999], ids=range(6))
def test_impossible_offsets_are_damage(tmp_path: Path, offsets: str) -> None:
    (tmp_path / "new").mkdir()
    safetensors_save({"a": torch.zeros(1)}, tmp_path / "new" / FILE, metadata={"DCP_SHARDING_INFO": offsets})
    path = checkpoint.commit(tmp_path, tmp_path / "new", 1, {})
    with pytest.raises(CheckpointError, match="is damaged"):
        open_checkpoint(path)
