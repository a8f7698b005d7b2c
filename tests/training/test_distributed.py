"""Every recipe over processes: N ranks with a share of the batch each equal one process with all of it."""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from aclip import dist
from aclip.method import Method
from aclip.recipes import RECIPES
from aclip.training import distributed
from aclip.training.accumulation import accumulate
from aclip.training.optim import total_norm
from over_ranks import a_batch, build, in_double, run_ranks

ROWS = 8
PRECISIONS = ("fp64", "fp32")
SOME = ("a-clip", "slip", "mae", "siglip", "finetune-attentive")
# heads with batch statistics, an EMA, a decoder, another loss, a frozen model
SCORED_ONLINE = "attentive-2x50 passes.context.encoder=online"  # the same encoder without gradient, and then with it
GUIDED = ('finetune objectives.contrastive.reads=["full","captions","frozen-captions"] '
          "objectives.contrastive.options.false_negatives=0.3")
NAMES = (*RECIPES, SCORED_ONLINE, GUIDED)
TWO_RANKS = [*((name, way) for name in NAMES for way in ("ddp", "fsdp")),
             *((name, way) for name in (*SOME, SCORED_ONLINE, GUIDED)
               for way in ("ddp in 2", "fsdp in 2", "fsdp recomputed"))]
FOUR_RANKS = [(name, way) for name in ("a-clip", "simclr") for way in ("ddp", "fsdp", "fsdp in 2")]


@dataclass
class Difference:
    """How far a tensor is from one process's in fp64, how far one process's in the same precision is, and the largest
    number in it."""

    error: float
    alone: float
    largest: float


def step(name: str, way: str, precision: str) -> dict[str, Tensor]:
    """Return loss, gradients and running statistics of one step on this rank's share, by one of the ways."""
    method = build(name)
    share = ROWS // dist.world_size()
    batch = a_batch(method, ROWS).rows(slice(dist.rank() * share, (dist.rank() + 1) * share))
    with in_double(method) if precision == "fp64" else nullcontext():
        parallel, _, parts = way.partition(" in ")
        wrapped = distributed.wrap(
            method, torch.device("cpu"), parallel="fsdp" if parallel.startswith("fsdp") else "ddp",
            recompute=way.endswith("recomputed"), in_parts=bool(parts))
        if parts:
            output = accumulate(method, batch, -(-batch.size // int(parts)), masked=True, resolution=1.0,
                                autocast=nullcontext, scale=lambda loss: loss)
            wrapped.average_gradients()
        else:
            output = wrapped.step(batch)
            output.loss.backward()
        return {"loss": dist.sum_over_ranks(output.loss) / dist.world_size(), **gradients(method)}


def gradients(method: Method) -> dict[str, Tensor]:
    """Return all gradients, whole; their norm; and running statistics."""
    trained = {key: p.grad for key, p in method.named_parameters() if p.requires_grad}
    missing = [key for key, grad in trained.items() if grad is None]
    assert not missing, missing
    found: dict[str, Any] = {"norm": total_norm([*trained.values()])}  # type: ignore[list-item]
    found |= {key: distributed.whole(grad) for key, grad in trained.items() if grad is not None}
    return found | {key: value for key, value in method.named_buffers() if "running" in key}


def compare(found: dict[str, Tensor], name: str, precision: str, folder: Path) -> dict[str, Difference]:
    """Compare with what one process has found, which lies in the folder."""
    exact, alone = (torch.load(folder / f"{name}-{of}.pt", weights_only=True) for of in ("fp64", precision))
    assert found.keys() == exact.keys()
    return {key: Difference(float((found[key] - whole).abs().max()), float((alone[key] - whole).abs().max()),
                            float(whole.abs().max())) for key, whole in exact.items()}


def differences(folder: Path, cases: list[tuple[str, str]]) -> dict[tuple[str, str, str], dict[str, Difference]]:
    """Compare this rank's steps."""
    return {(name, way, precision): compare(step(name, way, precision), name, precision, folder)
            for precision in PRECISIONS for name, way in cases}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where one process's results lie, computed once."""
    path: Path = tmp_path_factory.mktemp("ranks")
    for precision in PRECISIONS:
        for name in NAMES:
            torch.save(step(name, "ddp", precision), path / f"{name}-{precision}.pt")
    return path


@pytest.fixture(scope="module")
def two(folder: Path) -> list[Any]:
    return run_ranks(2, folder, differences, TWO_RANKS)


@pytest.fixture(scope="module")
def four(folder: Path) -> list[Any]:
    return run_ranks(4, folder, differences, FOUR_RANKS)


def check(found: dict[str, Difference], precision: str) -> None:
    """In fp64, where rounding is out of sight, every tensor is right to 1e-9 of its own largest number (of those that
    vanish in exact arithmetic, biases before a BatchNorm, some 1e-14 is left).

    In fp32 loss, norm and statistics are right to 1e-5, and gradients to 1e-5 of the model's largest, beyond the
    rounding that one process has as well: where a BatchNorm divides by a small deviation that is up to 4e-5.
    """
    plain = {key for key in found if key in ("loss", "norm") or "running" in key}
    largest = max(difference.largest for key, difference in found.items() if key not in plain)
    for key, difference in found.items():
        if precision == "fp64":
            allowed = 1e-9 * (difference.largest + 1e-3 * largest)
        else:
            allowed = 1e-5 * (difference.largest if key in plain else largest) + 2 * difference.alone
        assert difference.error <= allowed, f"{key}: {difference}"


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("name", "way"), TWO_RANKS)
def test_two_ranks_equal_one_process(two: list[Any], name: str, way: str, precision: str) -> None:
    for rank in two:
        check(rank[name, way, precision], precision)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("name", "way"), FOUR_RANKS)
def test_four_ranks_equal_one_process(four: list[Any], name: str, way: str, precision: str) -> None:
    for rank in four:
        check(rank[name, way, precision], precision)


@pytest.mark.parametrize(("parts", "precision"), [(2, "fp32"), (3, "fp64"), (4, "fp32")])
@pytest.mark.parametrize("name", NAMES)
def test_accumulated_equals_the_large_batch(folder: Path, name: str, parts: int, precision: str) -> None:
    """Three parts are uneven: 3, 3 and 2 samples."""
    check(compare(step(name, f"ddp in {parts}", precision), name, precision, folder), precision)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's own, in tracing
@pytest.mark.parametrize("name", ["a-clip", SCORED_ONLINE])
def test_compiled_blocks_serve_every_length(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With what traces and does not generate code: two lengths make all variants, and give what is given otherwise."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    plain, compiled = build(name), build(name)
    wrapped = distributed.wrap(compiled, torch.device("cpu"), compile_blocks=True)
    graphs = []
    for length in (9, 7, 12, 15, 8):
        batch = a_batch(plain, ROWS)
        words = batch.tokens[:, 1:2].expand(-1, length - 2)
        batch = replace(batch, tokens=torch.cat([batch.tokens[:, :1], words, batch.tokens[:, -1:]], dim=1))
        output = wrapped.step(batch)
        output.loss.backward()
        torch.testing.assert_close(output.loss, plain(batch).loss)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] > 0
    assert graphs[1:] == graphs[1:2] * 4
