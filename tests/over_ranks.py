"""Steps of a tiny model, over several processes, and in double precision."""

import functools
import multiprocessing as forkserver
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import torch.distributed as torch_dist
from torch import Tensor, multiprocessing

from aclip.config import Recipe, override
from aclip.data import augment
from aclip.method import Method
from aclip.recipes import RECIPES
from aclip.structs import Batch
from tests_support import build as build_recipe
from tests_support import random_batch

SOT, EOT = 98, 99


@functools.cache
def register_nano() -> None:
    """Register `vit-nano` with open_clip, a model of a few thousand weights whose step takes milliseconds."""
    open_clip.add_model_config(Path(__file__).parent / "models")


def recipe_of(words: str) -> Recipe:
    """Return a recipe from its name and changes to it: `a-clip passes.context.resolution=0.5`."""
    name, *changes = words.partition(" lora=")[0].split()
    return override(RECIPES[name], dict(change.split("=", 1) for change in changes))


def build(words: str) -> Method:
    """Return a recipe (`recipe_of`) with narrow heads on `vit-nano`; "a-clip lora=4" adapts it by updates of rank 4."""
    register_nano()
    return build_recipe(recipe_of(words), "vit-nano", lora=int(words.partition(" lora=")[2] or 0))


def a_batch(method: Method, rows: int, seed: int = 0) -> Batch:
    """Return images of different colours for a method on `vit-nano`: on plain noise its features barely differ between
    samples, and a BatchNorm, which divides by the difference, would amplify rounding errors."""
    batch = random_batch(method.plan, rows, seed)
    colours = torch.rand(rows, 3, 1, 1, generator=torch.Generator().manual_seed(seed))
    views = {name: replace(view, pixels=(view.pixels * colours).to(torch.uint8)) for name, view in batch.views.items()}
    tokens = batch.tokens % SOT
    tokens[:, 0], tokens[:, -1] = SOT, EOT
    return replace(batch, views=views, tokens=tokens)


@contextmanager
def in_double(method: torch.nn.Module) -> Iterator[None]:
    """Compute everything that a method (or objective) computes in float32 in float64."""
    method.double()
    with pytest.MonkeyPatch.context() as patch:
        applied = augment.apply
        patch.setattr(augment, "apply", lambda *given: applied(*given).double())
        patch.setattr(Tensor, "float", Tensor.double)
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(torch.float32)


def run_ranks(ranks: int, folder: Path, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Return what `work(folder, *arguments)` returns on each of some processes that form a gloo group."""
    forkserver.set_forkserver_preload(["aclip.recipes", "aclip.trainer"])  # imported once for all processes
    multiprocessing.start_processes(_one_rank, (ranks, folder, work, arguments), ranks, start_method="forkserver")
    return [torch.load(folder / f"result-{rank}.pt", weights_only=False) for rank in range(ranks)]


def _one_rank(rank: int, ranks: int, folder: Path, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    torch_dist.init_process_group("gloo", init_method=f"file://{folder}/meet-{ranks}", rank=rank, world_size=ranks)
    torch.save(work(folder, *arguments), folder / f"result-{rank}.pt")
    torch_dist.destroy_process_group()
