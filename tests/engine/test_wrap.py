"""Every recipe over processes: N ranks with a share of the batch each equal one process with all of it."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as torch_dist
from torch import Tensor, multiprocessing

from aclip import plan, towers
from aclip.engine import wrap
from aclip.engine.accumulation import accumulate
from aclip.engine.gradients import total_norm
from aclip.method import Method
from aclip.recipes import RECIPES
from test_recipes import small
from tests_support import random_batch

ROWS = 8
WAYS = ("ddp", "fsdp", "ddp in parts", "fsdp in parts")


def build(name: str) -> Method:
    """Return a recipe on a very small model."""
    torch.manual_seed(0)
    resolved = plan.resolve(small(RECIPES[name]), towers.shape_of(towers.model_config("vit-micro")))
    model = towers.create_model("vit-micro", with_text=resolved.uses_text)
    return Method(model, resolved, (0.5,) * 3, (0.25,) * 3).train()


def gradients(name: str, way: str, rank: int = 0, ranks: int = 1) -> dict[str, Tensor]:
    """Return loss and gradients of one step on this rank's share, by one of the ways."""
    method = build(name)
    batch = random_batch(method.plan, ROWS).rows(slice(rank * ROWS // ranks, (rank + 1) * ROWS // ranks))
    parallel: Any = way.split()[0]
    wrapped = wrap.wrap(method, torch.device("cpu"), parallel=parallel)
    if way.endswith("parts"):
        output = accumulate(method, batch, batch.size // 2, masked=True, resolution=1.0,
                            autocast=lambda: torch.autocast("cpu", enabled=False), scale=lambda loss: loss)
        wrapped.average_gradients()
    else:
        output = wrapped.step(batch)
        output.loss.backward()
    found = {key: p.grad for key, p in method.named_parameters() if p.requires_grad}
    missing = [key for key, grad in found.items() if grad is None]
    assert not missing, missing
    norm = total_norm([grad for grad in found.values() if grad is not None])
    whole = {key: grad.full_tensor() if hasattr(grad, "full_tensor") else grad for key, grad in found.items()}
    buffers = {key: value for key, value in method.named_buffers() if "running" in key}
    return {"loss": output.loss.detach(), "norm": norm, **whole, **buffers}


def one_rank(rank: int, ranks: int, folder: str, names: tuple[str, ...]) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1"}
    torch_dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=ranks)
    found = {(name, way): gradients(name, way, rank, ranks) for name in names for way in WAYS}
    torch.save(found, f"{folder}/{rank}.pt")
    torch_dist.destroy_process_group()


def over(ranks: int, names: tuple[str, ...], folder: Path) -> list[dict[tuple[str, str], dict[str, Tensor]]]:
    multiprocessing.spawn(one_rank, args=(ranks, str(folder), names), nprocs=ranks)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(ranks)]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[tuple[str, str], dict[str, Tensor]]]:
    return over(2, tuple(RECIPES), tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> list[dict[tuple[str, str], dict[str, Tensor]]]:
    return over(4, ("a-clip", "slip", "maskclip-text"), tmp_path_factory.mktemp("four"))


def check_equal(alone: dict[str, Tensor], ranks: list[dict[str, Tensor]]) -> None:
    """Compare with one process: gradients relative to the largest of their tensor."""
    for rank in ranks:
        assert rank.keys() == alone.keys()
        for key, expected in alone.items():
            found = torch.stack([r["loss"] for r in ranks]).mean() if key == "loss" else rank[key]
            largest = float(expected.abs().max())
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * max(largest, 1e-1), msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", RECIPES)
def test_two_ranks_equal_one_process(two: list[dict[tuple[str, str], dict[str, Tensor]]], name: str, way: str) -> None:
    check_equal(gradients(name, "ddp"), [rank[name, way] for rank in two])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["a-clip", "slip", "maskclip-text"])
def test_four_ranks_equal_one_process(four: list[dict[tuple[str, str], dict[str, Tensor]]], name: str, way: str) -> None:
    check_equal(gradients(name, "ddp"), [rank[name, way] for rank in four])


@pytest.mark.parametrize("parts", [2, 3, 4])
@pytest.mark.parametrize("name", RECIPES)
def test_accumulated_equals_the_large_batch(name: str, parts: int) -> None:
    method = build(name)
    batch = random_batch(method.plan, ROWS)
    output = accumulate(method, batch, -(-ROWS // parts), masked=True, resolution=1.0,
                        autocast=lambda: torch.autocast("cpu", enabled=False), scale=lambda loss: loss)
    found = {key: p.grad for key, p in method.named_parameters() if p.requires_grad}
    whole = gradients(name, "ddp")
    check_equal(whole, [{"loss": output.loss.detach(), "norm": total_norm(list(found.values())), **found,
                         **{key: value for key, value in method.named_buffers() if "running" in key}}])
