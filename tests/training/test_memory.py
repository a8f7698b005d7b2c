"""The peak memory of a run, and the sentence when it runs out."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from aclip.config import RunConfig
from aclip.errors import OutOfMemoryError
from aclip.recipes import RECIPES
from aclip.run_folder import RunFolder
from aclip.training import memory
from aclip.training.memory import explain_oom, peak_memory, write_peak_memory


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="VmHWM is Linux's")
def test_it_is_what_the_kernel_reports_in_bytes() -> None:
    ones = np.ones(2**24)  # 128 MiB: a new peak, so that both counters have just moved
    status = Path("/proc/self/status").read_text()
    kernel = 1024 * int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])
    assert peak_memory(torch.device("cpu")) == pytest.approx(kernel, rel=0.05)
    assert peak_memory(torch.device("cpu")) > ones.nbytes


def test_the_maximum_over_all_processes_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, device = RunFolder(tmp_path), torch.device("cpu")
    for now, noted in ((5, 5), (9, 9), (7, 9)):
        monkeypatch.setattr(memory, "peak_memory", lambda _, now=now: now)
        write_peak_memory(folder, device)
        assert folder.read_json("memory.json") == {"peak_memory": noted, "device": "cpu"}
    (tmp_path / "memory.json").write_text('{"peak_mem')
    write_peak_memory(folder, device)
    assert folder.read_json("memory.json")["peak_memory"] == 7


@pytest.mark.parametrize(("micro_batch", "recompute", "helps"), [
    (None, False, "use --micro-batch 128, --recompute (the step stays the same), or a smaller --batch-size"),
    (32, True, "use --micro-batch 16 (the step stays the same), or a smaller --batch-size"),
])
def test_running_out_of_memory_says_what_was_held_and_what_helps(
    micro_batch: int | None, recompute: bool, helps: str
) -> None:
    config = RunConfig(recipe=RECIPES["clip"], model="vit-micro", data="x", output="x", batch_size=256,
                       micro_batch=micro_batch, recompute=recompute)
    with pytest.raises(OutOfMemoryError) as caught, explain_oom(config, torch.device("cpu")):
        torch.empty(2**60, dtype=torch.uint8)
    assert str(caught.value).startswith(f"out of memory in a step of 256 pairs, {micro_batch or 256} at a time, on cpu")
    assert helps in str(caught.value)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), explain_oom(config, torch.device("cpu")):
        torch.ones(2, 3) @ torch.ones(2, 3)
