"""Two processes with half of a batch each: objectives that count or centre over the whole batch are exact."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as torch_dist
from made_passes import CAPTIONS, HIDDEN, SHAPE, made_pass, step_context
from torch import Tensor, multiprocessing

from aclip.objectives import BagOfWords, MaskedDistillation, MaskedLanguage, Objective, Reconstruction, Sigmoid
from aclip.objectives.functional import chance_loss
from aclip.structs import StepContext

RANKS, ROWS = 2, 4
STUDENT = made_pass("masked", ("a", "b"), masking="uniform", mask_ratio=0.75)
TEACHER = made_pass("teacher", ("a", "b"), "ema")
LOCAL = ("reconstruction",)  # each rank's loss is that of its rows alone
CAPTION_IDS = (0, 1, 1, 0, 2)
NAMES = ("masked_distillation", "masked_language", "sigmoid", "bag_of_words")


def build(name: str) -> Objective:
    torch.manual_seed(0)
    if name == "masked_distillation":
        return MaskedDistillation([STUDENT, TEACHER], SHAPE, codewords=7)
    if name == "reconstruction":
        return Reconstruction([STUDENT], SHAPE, decoder_layers=1)
    if name == "sigmoid":
        return Sigmoid([STUDENT, CAPTIONS], SHAPE, init_bias=0.0)
    if name == "bag_of_words":
        return BagOfWords([STUDENT, CAPTIONS], SHAPE)
    return MaskedLanguage([HIDDEN], SHAPE)


def context_of(name: str, rows: slice) -> StepContext:
    """Return some rows of the batch, as tensors of their own that take a gradient where the batch's do."""

    def some(fields: dict[str, Any], dim: int) -> dict[str, Tensor]:
        index = (slice(None),) * dim + (rows,)
        return {key: value[index].detach().clone().requires_grad_(value.requires_grad)
                for key, value in fields.items() if isinstance(value, Tensor)}

    whole = step_context(STUDENT, TEACHER, texts=(HIDDEN, CAPTIONS), caption_ids=CAPTION_IDS)
    whole.passes["masked"].features.requires_grad_()
    return replace(
        whole,
        passes={key: replace(encoded, **some(vars(encoded), 1)) for key, encoded in whole.passes.items()},
        texts={key: replace(text, **some(vars(text), 0)) for key, text in whole.texts.items()},
        caption_ids=whole.caption_ids[rows],
    )


def compute(name: str, rows: slice) -> dict[str, Any]:
    """Return the loss and its gradients with respect to parameters and to this process's rows."""
    objective, context = build(name), context_of(name, rows)
    loss = objective(context)
    loss.backward()
    if name == "masked_language":
        read = context.texts["hidden"].states.grad
    elif name == "sigmoid":
        read = context.passes["masked"].features.grad.transpose(0, 1)
    else:
        read = context.passes["masked"].patches.grad.transpose(0, 1)
    parameters = {key: p.grad for key, p in objective.named_parameters() if p.requires_grad}
    return {"loss": loss.detach(), "rows": read, "parameters": parameters, "buffers": dict(objective.named_buffers())}


def one_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch_dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=RANKS)
    own = slice(rank * ROWS // RANKS, (rank + 1) * ROWS // RANKS)
    found: dict[str, Any] = {name: compute(name, own) for name in (*NAMES, *LOCAL)}
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


@pytest.mark.parametrize("name", [*NAMES, *LOCAL])
def test_two_ranks_equal_one_process(by_rank: list[dict], name: str) -> None:
    alone, ranks = compute(name, slice(0, ROWS)), [result[name] for result in by_rank]
    # averaged over ranks, as data-parallel training averages gradients
    torch.testing.assert_close(torch.stack([r["loss"] for r in ranks]).mean(), alone["loss"], rtol=0, atol=1e-6)
    for key, expected in alone["parameters"].items():
        mean = torch.stack([r["parameters"][key] for r in ranks]).mean(dim=0)
        torch.testing.assert_close(mean, expected, rtol=0, atol=1e-6, msg=key)
    assert all(torch.equal(r["buffers"][key], count) for r in ranks for key, count in alone["buffers"].items())
    rows = torch.cat([r["rows"] for r in ranks]) / RANKS
    largest = float(alone["rows"].abs().max())
    assert largest > 1e-4
    torch.testing.assert_close(rows, alone["rows"], rtol=0, atol=1e-3 * min(1e-3, largest))


@pytest.mark.parametrize("name", NAMES)
def test_the_whole_batch_matters(by_rank: list[dict], name: str) -> None:
    """A rank by itself, without the others' counts and centre, would return another loss."""
    for rank, result in enumerate(by_rank):
        own = slice(rank * ROWS // RANKS, (rank + 1) * ROWS // RANKS)
        assert (result[name]["loss"] - compute(name, own)["loss"]).abs() > 1e-3
