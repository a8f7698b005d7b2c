"""Two processes with half of a batch each compute what one process computes with all of it."""

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as torch_dist
import torch.nn.functional as F
from torch import Tensor, multiprocessing
from torch.distributed import TCPStore

from aclip import dist
from aclip.errors import ConfigError
from aclip.objectives.functional import clip_loss, ntxent_loss, sigmoid_loss

RANKS, ROWS = 2, 10
# equal captions inside each half (0, 5) and across the halves (1)
CAPTION_IDS = torch.tensor([0, 0, 1, 2, 3, 4, 5, 5, 1, 6])


def inputs() -> list[Tensor]:
    noise = torch.Generator().manual_seed(0)
    return [torch.randn(ROWS, width, generator=noise) for width in (8, 8, 3)]


def compute(loss_name: str, a: Tensor, b: Tensor, guide: Tensor, caption_ids: Tensor) -> dict[str, Tensor]:
    """Return the loss and its gradients with respect to this process's rows and the scale."""
    a, b = a.clone().requires_grad_(), b.clone().requires_grad_()
    scale = torch.tensor(9.0, requires_grad=True)
    if loss_name == "ntxent":
        loss = ntxent_loss(a, b, temperature=0.2) * scale
    else:
        a_unit, b_unit, ids = F.normalize(a, dim=1), F.normalize(b, dim=1), None
        if loss_name.endswith("with caption_ids"):
            ids = caption_ids
        guided = {"guide": F.normalize(guide, dim=1), "false_negatives": 0.3} if loss_name.endswith("guide") else {}
        if loss_name.startswith("sigmoid"):
            loss = sigmoid_loss(a_unit, b_unit, scale, -2.0, ids, **guided)
        else:
            loss = clip_loss(a_unit, b_unit, scale, ids, **guided)
    loss.backward()
    return {"loss": loss.detach(), "a": a.grad, "b": b.grad, "scale": scale.grad}


LOSSES = ("clip", "clip with caption_ids", "clip with guide", "sigmoid", "sigmoid with caption_ids",
          "sigmoid with guide", "ntxent")


def one_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch_dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=RANKS)
    own = slice(rank * ROWS // RANKS, (rank + 1) * ROWS // RANKS)
    rows = [x[own] for x in (*inputs(), CAPTION_IDS)]
    results: dict[str, object] = {name: compute(name, *rows) for name in LOSSES}
    results["gathered"] = dist.gather(CAPTION_IDS[own])
    results["place"] = (dist.rank(), dist.world_size())
    results["summed"] = dist.sum_over_ranks(CAPTION_IDS[own])
    torch.save(results, f"{folder}/{rank}.pt")
    torch_dist.destroy_process_group()


@pytest.fixture(scope="module")
def by_rank(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    folder: Path = tmp_path_factory.mktemp("ranks")
    multiprocessing.spawn(one_rank, args=(str(folder),), nprocs=RANKS)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]


@pytest.mark.parametrize("name", LOSSES)
def test_two_ranks_equal_one_process(by_rank: list[dict], name: str) -> None:
    alone = compute(name, *inputs(), CAPTION_IDS)
    ranks = [result[name] for result in by_rank]
    # averaged over ranks, as data-parallel training averages gradients
    assert torch.allclose(torch.stack([r["loss"] for r in ranks]).mean(), alone["loss"], rtol=0, atol=1e-6)
    assert torch.allclose(torch.stack([r["scale"] for r in ranks]).mean(0), alone["scale"], rtol=0, atol=1e-6)
    for side in ("a", "b"):
        rows = torch.cat([r[side] for r in ranks]) / RANKS
        assert alone[side].abs().max() > 1e-2
        assert torch.allclose(rows, alone[side], rtol=0, atol=1e-6)


def test_caption_ids_and_guide_change_the_loss(by_rank: list[dict]) -> None:
    for result in by_rank:
        for name in ("clip", "sigmoid"):
            assert result[f"{name} with caption_ids"]["loss"] < result[name]["loss"] - 1e-3
            assert result[f"{name} with guide"]["loss"] < result[name]["loss"] - 1e-3


def test_gather_keeps_rank_order_and_integers(by_rank: list[dict]) -> None:
    for rank, result in enumerate(by_rank):
        assert torch.equal(result["gathered"], CAPTION_IDS)
        assert result["place"] == (rank, RANKS)


def test_sums_are_the_same_on_every_rank(by_rank: list[dict]) -> None:
    for result in by_rank:
        assert torch.equal(result["summed"], CAPTION_IDS.unflatten(0, (RANKS, -1)).sum(dim=0))


def test_one_process_is_the_identity() -> None:
    x = torch.randn(3, 2, requires_grad=True)
    assert dist.gather(x) is x
    assert torch.equal(dist.sum_over_ranks(x), x)
    assert not dist.sum_over_ranks(x).requires_grad
    assert (dist.rank(), dist.world_size()) == (0, 1)


def test_processes_that_start_anew_find_no_keys_of_those_that_are_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """As under torchrun: the store lives on, with the keys of processes that were killed."""
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))
    rank = threading.local()
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(server.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}

    class Environment(dict[str, str]):
        def __getitem__(self, name: str) -> str:
            return str(rank.number) if name == "RANK" else super().__getitem__(name)

    monkeypatch.setattr(os, "environ", Environment({**os.environ, **environment}))
    server.set("aclip/call/1", "of a process that was killed while it called")

    def meet(number: int) -> Any:
        rank.number = number
        return dist._fresh_store(3)

    for _ in range(3):
        with ThreadPoolExecutor(3) as ranks:
            stores = list(ranks.map(meet, range(3)))
        assert not stores[0].check(["address"])
        stores[0].set("address", "here")
        assert [store.get("address") for store in stores] == [b"here"] * 3


def test_slurm_tasks_without_torchrun_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"SLURM_NTASKS": "4", "SLURM_STEP_ID": "0"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="start one torchrun a machine"), dist.joined("cpu"):
        pass
    monkeypatch.delenv("SLURM_STEP_ID")  # an allocation without a step
    with dist.joined("cpu") as device:
        assert device == "cpu"


@pytest.mark.parametrize(("rank", "waits", "sentence"), [(0, [], "no data"), (
    3, [dist.RANK_0_REPORTS_FIRST], "rank 3: no data")])
def test_rank_0_reports_first_and_the_others_name_themselves(
    rank: int, waits: list[float], sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[float] = []
    monkeypatch.setattr(dist.time, "sleep", waited.append)
    monkeypatch.setattr(dist, "_fresh_store", lambda ranks: None)
    monkeypatch.setattr(dist, "rank", lambda: rank)
    for name in ("init_process_group", "destroy_process_group"):
        monkeypatch.setattr(torch_dist, name, lambda *_, **__: None)
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ConfigError) as found, dist.joined("cpu"):
        raise ConfigError("no data")
    assert (str(found.value), waited) == (sentence, waits)


@pytest.mark.parametrize(("local", "visible", "device"), [(1, 2, "cuda:1"), (3, 1, "cuda:0")])
def test_every_process_takes_its_gpu_also_where_it_sees_one_alone(
    local: int, visible: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(dist, "_fresh_store", lambda ranks: None)
    for name in ("init_process_group", "destroy_process_group"):
        monkeypatch.setattr(torch_dist, name, lambda *_, **__: None)
    for name, value in {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": str(local)}.items():
        monkeypatch.setenv(name, value)
    with dist.joined("auto") as chosen:
        assert chosen == device
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigError, match="process 2 of this machine has no GPU: 2 exist"), dist.joined("auto"):
        pass
