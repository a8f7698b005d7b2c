"""The peak memory of a run."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import test_recipes
from aclip.engine import memory
from aclip.engine.memory import note_peak_memory, peak_memory
from aclip.engine.run_config import Precision, RunConfig
from aclip.engine.wrap import wrap
from aclip.method import Method
from aclip.recipes import RECIPES
from aclip.run_folder import RunFolder
from aclip.structs import Batch
from tests_support import random_batch


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="VmHWM is Linux's")
def test_it_is_what_the_kernel_says_in_bytes() -> None:
    ones = np.ones(2**24)  # 128 MiB: a new peak, so that both counters have just moved
    status = Path("/proc/self/status").read_text()
    kernel = 1024 * int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])
    assert peak_memory(torch.device("cpu")) == pytest.approx(kernel, rel=0.05)
    assert peak_memory(torch.device("cpu")) > ones.nbytes


def test_the_most_of_all_processes_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, device = RunFolder(tmp_path), torch.device("cpu")
    for now, noted in ((5, 5), (9, 9), (7, 9)):
        monkeypatch.setattr(memory, "peak_memory", lambda _, now=now: now)
        note_peak_memory(folder, device)
        assert folder.read_json("memory.json") == {"peak_memory": noted, "device": "cpu"}
    (tmp_path / "memory.json").write_text('{"peak_mem')
    note_peak_memory(folder, device)
    assert folder.read_json("memory.json")["peak_memory"] == 7


def saved_bytes(method: Method, batch: Batch, *, bf16: bool) -> int:
    """Return the bytes that autograd holds after the towers' forward pass, weights left out."""
    weights = {p.untyped_storage().data_ptr() for p in method.parameters()}
    held: dict[int, int] = {}
    keep = []  # so that no two tensors share an address

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            held[storage.data_ptr()] = storage.nbytes()
            keep.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), torch.autocast("cpu", torch.bfloat16, bf16):
        method.encode_batch(batch)
    return sum(held.values())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("recipe", "recompute"), [("clip", False), ("a-clip", False), ("clip", True)])
def test_activations_are_about_what_is_estimated(recipe: str, recompute: bool, precision: Precision) -> None:
    method = test_recipes.build(RECIPES[recipe], "vit-micro")
    config = RunConfig(recipe=RECIPES[recipe], model="vit-micro", data="", output="", batch_size=16,
                       precision=precision, recompute=recompute)
    expected = memory.estimate(method, config, 16)
    wrap(method, torch.device("cpu"), recompute=recompute)
    batch = random_batch(method.plan, 16, text_length=77)
    found = saved_bytes(method, batch, bf16=precision == "bf16")
    if recompute:  # the estimate has one block besides, which is there in the backward pass alone
        whole = memory.estimate(method, replace(config, recompute=False), 16)
        assert found < expected.activations < whole.activations / 2
    else:
        assert expected.activations == pytest.approx(found, rel=0.3)
    assert expected.weights + expected.average == 4 * sum(p.numel() for p in method.parameters())
    assert expected.optimizer == 8 * sum(p.numel() for p in method.parameters() if p.requires_grad)


def test_logits_over_codewords_are_counted_up_to_what_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    method = test_recipes.build(RECIPES["maskclip"], "vit-micro")
    config = RunConfig(recipe=RECIPES["maskclip"], model="vit-micro", data="", output="", batch_size=16)
    held = [memory.estimate(method, config, 1).batch]
    for most in (10_000, 0):
        monkeypatch.setattr(memory, "LOGITS_AT_ONCE", most)
        held.append(memory.estimate(method, config, 1).batch)
    p = method.plan.passes[1]
    made = 16 * (p.num_patches - p.num_keep) * len(method.objectives["masked_distillation"].quantizer.codewords)
    assert held[0] - held[2] == 16 * (16 * 16 + made)
    assert held[1] - held[2] == 16 * (16 * 16 + 10_000)


def test_the_largest_micro_batch_that_fits() -> None:
    method = test_recipes.build(RECIPES["clip"], "vit-micro")
    config = RunConfig(recipe=RECIPES["clip"], model="vit-micro", data="", output="", batch_size=96, precision="fp32")
    for wanted in (96, 24, 3):
        enough = memory.estimate(method, config, wanted).total / memory.SHARE_TO_FILL
        assert memory.fitting_micro_batch(method, config, int(enough) + 1) == wanted
    assert memory.fitting_micro_batch(method, config, 0) == 1
