"""The peak memory of a run."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from aclip.engine import memory
from aclip.engine.memory import note_peak_memory, peak_memory
from aclip.engine.run_folder import RunFolder


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
