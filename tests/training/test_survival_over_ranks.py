"""Two ranks: what happens to one happens to both, together, and another number of ranks goes on."""

import os
import shutil
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from synthetic_training import ROWS, build, numbers, train
from torch import nn
from torch.distributed import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from aclip import checkpoint, dist
from aclip.checkpoint import Saver, list_checkpoints, open_checkpoint, open_newest
from aclip.trainer import Best
from aclip.training.distributed import whole
from aclip.training.guard import Guard, Interrupted
from aclip.training.optim import total_norm
from over_ranks import run_ranks


def ranks(work: Callable[..., Any], folder: Path, *arguments: Any, count: int = 2) -> list[Any]:
    """Return what `work` returns on several ranks, which get a folder of their own to meet in."""
    return run_ranks(count, Path(tempfile.mkdtemp(dir=folder)), work, folder, *arguments)


def with_poison_on_one(_: Path, folder: Path, way: Any) -> dict[str, Any]:
    trainer = train(folder / "run", build(parallel=way), is_bad=lambda number, rank: number == 4 and rank == 1)
    finite = all(bool(torch.isfinite(whole(t)).all()) for t in trainer.method.state_dict().values())
    weights = sum(float(whole(p.detach()).double().sum()) for g in trainer.groups for p in g.parameters.values())
    return {"step": trainer.step, "finite": finite, "weights": weights}


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_a_step_that_is_not_finite_on_one_rank_is_skipped_by_both(tmp_path: Path, way: str) -> None:
    first, second = ranks(with_poison_on_one, tmp_path, way)
    assert first == second
    assert first["step"] == 12
    assert first["finite"]
    (incident,) = numbers(tmp_path / "run", "incidents")
    assert (incident["step"], incident["kind"]) == (4, "non_finite")
    assert incident["keys"] == [[f"4/{row}" for row in rows] for rows in (range(ROWS // 2), range(ROWS // 2, ROWS))]
    assert [r["step"] for r in numbers(tmp_path / "run")] == [1, 2, 3, 5, 6, 7, 8, 9, 10, 11, 12]
    assert numbers(tmp_path / "run")[-1]["skipped_steps"] == 1


def one_bad_rank(_: Path, folder: Path) -> tuple[Any, ...]:
    """A loss that is bad on rank 1 alone, with good gradients."""
    module = nn.BatchNorm1d(2)
    guard = Guard(module, torch.amp.GradScaler("cpu", enabled=False))
    guard.begin()
    module(torch.randn(4, 2))
    loss = torch.tensor(float("inf") if dist.rank() == 1 else 2.0)
    skip = guard.check(loss, total_norm([torch.ones(2)]), 1, (f"sample {dist.rank()}",))
    (incident,) = guard.incidents(wait=True)
    return skip.item(), incident["ranks"], incident["keys"], module.running_mean.tolist()


def test_the_verdict_is_the_same_on_all_ranks(tmp_path: Path) -> None:
    assert ranks(one_bad_rank, tmp_path) == [(1.0, [1], [["sample 0"], ["sample 1"]], [0.0, 0.0])] * 2


def stopping_early(_: Path, folder: Path) -> tuple[int, Any]:
    measured = {2: 0.2, 4: 0.5, 6: 0.5, 8: 0.4}

    def evaluate(step: int) -> float | None:
        return measured[step] if dist.rank() == 0 else None

    trainer = train(folder / "run", build(evaluate_every=2, keep_best="held", early_stop=2), evaluate=evaluate)
    return trainer.step, trainer.best


def test_ranks_agree_on_the_best_and_end_together(tmp_path: Path) -> None:
    assert ranks(stopping_early, tmp_path) == [(8, Best(4, 0.5, since=2))] * 2


def with_a_signal_to_one(_: Path, folder: Path, way: Any) -> str:
    def before(number: int) -> None:
        if number == 5 and dist.rank() == 1:
            os.kill(os.getpid(), signal.SIGUSR1)

    with pytest.raises(Interrupted, match=r"continue with aclip.train\(resume=") as caught:
        train(folder / "run", build(parallel=way), before=before)
    return str(caught.value)


def to_the_end(_: Path, folder: Path, way: Any) -> float:
    trainer = train(folder / "run", build(parallel=way))
    return float(trainer.ema.distance())


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_a_signal_to_one_rank_stops_both_and_any_number_goes_on(tmp_path: Path, way: str) -> None:
    first, second = ranks(with_a_signal_to_one, tmp_path, way)
    assert first == second
    saved = open_newest(tmp_path / "run" / "checkpoints")
    assert saved.step in (5, 6)
    assert f"stopped after step {saved.step} of 12" in first
    shutil.copytree(tmp_path / "run", tmp_path / "alone" / "run")

    (tmp_path / "whole").mkdir()
    ranks(to_the_end, tmp_path / "whole", way)
    undisturbed = numbers(tmp_path / "whole" / "run")
    distances = ranks(to_the_end, tmp_path, way)
    assert numbers(tmp_path / "run") == undisturbed  # the same ranks: bit for bit
    assert distances == [undisturbed[-1]["ema_distance"]] * 2
    to_the_end(tmp_path, tmp_path / "alone", "ddp")  # one process goes on with what two have saved
    for ours, theirs in zip(numbers(tmp_path / "alone" / "run"), undisturbed, strict=True):
        for key in ("loss", "ema_distance", "logit_scale"):
            assert ours[key] == pytest.approx(theirs[key], abs=1e-3), (ours["step"], key)


def with_a_full_disk_on_one(_: Path, folder: Path) -> None:
    write = checkpoint.write_rank_file

    def failing(path: Path, *arguments: object) -> object:
        if dist.rank() == 1 and "00000006" in str(path):
            raise OSError(28, "No space left on device")
        return write(path, *arguments)

    checkpoint.write_rank_file = failing  # in this process alone
    train(folder / "run")


def test_a_disk_that_is_full_for_one_rank_costs_one_checkpoint(tmp_path: Path) -> None:
    ranks(with_a_full_disk_on_one, tmp_path)
    assert [p.name[-2:] for p in list_checkpoints(tmp_path / "run" / "checkpoints")] == ["08", "10", "12"]
    (incident,) = numbers(tmp_path / "run", "incidents")
    assert incident["kind"] == "save_failed"
    assert "rank 1: [Errno 28] No space left" in incident["reason"]
    assert [r["step"] for r in numbers(tmp_path / "run")] == list(range(1, 13))
    assert not list((tmp_path / "run" / "checkpoints").glob(".*"))


SHAPES = {"matrix": (5, 3), "row": (1, 4), "vector": (3,), "scalar": (), "empty": (0, 2)}


def values() -> dict[str, torch.Tensor]:
    return {name: torch.arange(float(torch.Size(shape).numel())).reshape(shape) + 1 for name, shape in SHAPES.items()}


def save_sharded(_: Path, folder: Path) -> None:
    mesh = init_device_mesh("cpu", (dist.world_size(),))
    tensors = {name: distribute_tensor(t, mesh, [Shard(0)]) if t.ndim and t.numel() else t
               for name, t in values().items()}
    saver = Saver(folder / "checkpoints", keep=1)
    saver.save(1, tensors, {})
    saver.wait()
    assert saver.failures() == []
    saver.close()


def load_sharded(_: Path, folder: Path) -> None:
    mesh = init_device_mesh("cpu", (dist.world_size(),))
    stored = open_checkpoint(folder / "checkpoints" / "step-00000001")
    for name, tensor in values().items():
        target = distribute_tensor(torch.zeros_like(tensor), mesh, [Shard(0)]) if name != "scalar" else torch.zeros(())
        stored.load_into({name: target})
        whole = target.full_tensor() if name != "scalar" else target
        assert torch.equal(whole, tensor), name


def test_shards_are_read_by_any_number_of_ranks(tmp_path: Path) -> None:
    ranks(save_sharded, tmp_path)
    ranks(load_sharded, tmp_path, count=3)
    path = tmp_path / "checkpoints" / "step-00000001"
    stored = open_checkpoint(path).tensors()
    assert stored.keys() == SHAPES.keys()
    assert all(torch.equal(stored[name], tensor) for name, tensor in values().items())
    files = sorted(path.glob("*.safetensors"))
    assert [file.name for file in files] == [f"rank-0000{rank}-of-00002.safetensors" for rank in (0, 1)]
    sizes = [safe_open(file, framework="pt").get_slice("matrix").get_shape() for file in files]
    assert sizes == [[3, 3], [2, 3]]  # each rank has written its part alone
