"""Two processes with half of a batch each: objectives that count or centre over the whole batch are exact."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as torch_dist
from synthetic_passes import CAPTIONS, HIDDEN, SHAPE, masked, step_context
from torch import Tensor, multiprocessing

from aclip.config import Pass, TextPass
from aclip.objectives import OBJECTIVES, Objective
from aclip.objectives.functional import chance_loss
from aclip.structs import StepContext

RANKS, ROWS = 2, 4
CAPTION_IDS = (0, 1, 1, 0, 2)
PASSES: dict[str, Pass | TextPass] = {
    **masked(), "teacher": Pass(views=("a", "b"), encoder="ema"), **HIDDEN, **CAPTIONS,
}
READS: dict[str, tuple[str, ...]] = {
    "masked_distillation": ("masked", "teacher"),
    "masked_language": ("hidden",),
    "sigmoid": ("masked", "captions"),
    "bag_of_words": ("masked", "captions"),
    "contrastive": ("masked", "captions"),
    "ntxent": ("masked",),
    "byol": ("masked", "teacher"),
    "reconstruction": ("masked",),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "masked_distillation": {"codewords": 7},
    "sigmoid": {"init_bias": 0.0},
    "ntxent": {"hidden": 16, "out": 4, "temperature": 1.0},
    "byol": {"hidden": 16, "out": 4},
    "reconstruction": {"decoder_layers": 1},
}
LOCAL = {"reconstruction"}  # each rank's loss is that of its rows alone


def build(name: str) -> Objective:
    torch.manual_seed(0)
    return OBJECTIVES[name]({key: PASSES[key] for key in READS[name]}, SHAPE, **OPTIONS.get(name, {}))


def context_of(rows: slice) -> StepContext:
    """Return some rows of the batch, as leaf tensors that require a gradient where the batch's do."""

    def some(fields: dict[str, Any], dim: int) -> dict[str, Tensor]:
        index = (slice(None),) * dim + (rows,)
        return {key: value[index].detach().clone().requires_grad_(value.requires_grad)
                for key, value in fields.items() if isinstance(value, Tensor)}

    whole = step_context(PASSES, CAPTION_IDS)
    whole.passes["masked"].features.requires_grad_()
    return replace(
        whole,
        passes={key: replace(encoded, **some(vars(encoded), 1)) for key, encoded in whole.passes.items()},
        texts={key: replace(text, **some(vars(text), 0)) for key, text in whole.texts.items()},
        caption_ids=whole.caption_ids[rows],
    )


def compute(name: str, rows: slice) -> dict[str, Any]:
    """Return the loss and its gradients with respect to parameters and to this process's rows."""
    objective, context = build(name), context_of(rows)
    loss = objective(context)
    loss.backward()
    seen = context.passes["masked"]
    if name == "masked_language":
        read = context.texts["hidden"].states.grad
    elif name in ("sigmoid", "contrastive"):
        read = seen.features.grad.transpose(0, 1)
    else:
        read = (seen.cls if name in ("ntxent", "byol") else seen.patches).grad.transpose(0, 1)
    parameters = {key: p.grad for key, p in objective.named_parameters() if p.requires_grad}
    return {"loss": loss.detach(), "rows": read, "parameters": parameters, "buffers": dict(objective.named_buffers())}


def one_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch_dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=RANKS)
    own = slice(rank * ROWS // RANKS, (rank + 1) * ROWS // RANKS)
    found: dict[str, Any] = {name: compute(name, own) for name in READS}
    torch.save(found | {"chance": chance_loss(torch.tensor(CAPTION_IDS)[own])}, f"{folder}/{rank}.pt")
    torch_dist.destroy_process_group()


@pytest.fixture(scope="module")
def by_rank(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    folder: Path = tmp_path_factory.mktemp("ranks")
    multiprocessing.spawn(one_rank, args=(str(folder),), nprocs=RANKS)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]


def test_chance_counts_the_captions_of_both(by_rank: list[dict]) -> None:
    mean = torch.stack([result["chance"] for result in by_rank]).mean()
    torch.testing.assert_close(mean, chance_loss(torch.tensor(CAPTION_IDS[:ROWS])), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", READS)
def test_two_ranks_equal_one_process(by_rank: list[dict], name: str) -> None:
    alone, ranks = compute(name, slice(0, ROWS)), [result[name] for result in by_rank]
    # averaged over ranks, as data-parallel training does with gradients
    torch.testing.assert_close(torch.stack([r["loss"] for r in ranks]).mean(), alone["loss"], rtol=0, atol=1e-6)
    for key, expected in alone["parameters"].items():
        mean = torch.stack([r["parameters"][key] for r in ranks]).mean(dim=0)
        atol = 1e-6 * max(1.0, float(expected.abs().max()))
        torch.testing.assert_close(mean, expected, rtol=0, atol=atol, msg=lambda text, key=key: f"{key}: {text}")
    for key, expected in alone["buffers"].items():
        for r in ranks:
            torch.testing.assert_close(r["buffers"][key], expected, rtol=0, atol=1e-6, msg=key)
    rows = torch.cat([r["rows"] for r in ranks]) / RANKS
    largest = float(alone["rows"].abs().max())
    assert largest > 1e-4
    torch.testing.assert_close(rows, alone["rows"], rtol=0, atol=1e-3 * min(1e-3, largest))


@pytest.mark.parametrize("name", sorted(READS.keys() - LOCAL))
def test_the_whole_batch_matters(by_rank: list[dict], name: str) -> None:
    """A single rank, without the negatives, counts and statistics of the others, has another loss."""
    for rank, result in enumerate(by_rank):
        own = slice(rank * ROWS // RANKS, (rank + 1) * ROWS // RANKS)
        assert (result[name]["loss"] - compute(name, own)["loss"]).abs() > 1e-3
