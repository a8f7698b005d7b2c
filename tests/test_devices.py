"""Cores and memory as a container limits them; names of devices; peak memory."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from aclip import devices
from aclip.devices import choose_device, fast_precision, memory_limit, peak_memory, usable_cores
from aclip.errors import ConfigError

NO_LIMIT_V1 = str(2**63 - 4096)


@pytest.mark.parametrize(
    ("membership", "files", "cores", "memory"),
    [
        ("0::/", {"cpu.max": "200000 100000", "memory.max": "4294967296"}, 2, 2**32),
        ("0::/", {"cpu.max": "150000 100000", "memory.max": "max"}, 2, None),
        ("0::/", {"cpu.max": "max 100000"}, 64, None),
        # the limit of an ancestor binds, too
        ("0::/pod/box", {"pod/cpu.max": "50000 100000", "pod/box/cpu.max": "max 100000",
                         "pod/memory.max": "1000000", "pod/box/memory.max": "2000000"}, 1, 1_000_000),
        # the host's path, as seen in a container without a cgroup namespace
        ("0::/docker/123", {"cpu.max": "300000 100000"}, 3, None),
        ("4:memory:/\n3:cpu,cpuacct:/", {"cpu/cpu.cfs_quota_us": "400000", "cpu/cpu.cfs_period_us": "100000",
                                         "memory/memory.limit_in_bytes": "5000000"}, 4, 5_000_000),
        ("4:memory:/\n3:cpu,cpuacct:/", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000",
                                         "memory/memory.limit_in_bytes": NO_LIMIT_V1}, 64, None),
        ("", {}, 64, None),
    ],
)  # fmt: skip
def test_limits_of_a_container(
    membership: str, files: dict[str, str], cores: int, memory: int | None, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "membership").write_text(membership)
    for name, content in files.items():
        path = tmp_path / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content + "\n")
    monkeypatch.setattr(devices, "_MEMBERSHIP", tmp_path / "membership")
    monkeypatch.setattr(devices, "_CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    assert (usable_cores(), memory_limit()) == (cores, memory)


def test_this_machine() -> None:
    assert 1 <= usable_cores() <= (os.cpu_count() or 1)
    assert fast_precision(torch.device("cpu")) in ("fp32", "bf16")
    assert fast_precision(torch.device("meta")) == "fp32"


def test_names_of_devices() -> None:
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device("auto").type in ("cpu", "cuda")
    with pytest.raises(ConfigError, match=r"device 'cuda:99' is not available: .*use auto"):
        choose_device("cuda:99")
    with pytest.raises(ConfigError, match="unknown device 'gpu': use auto, cpu, cuda"):
        choose_device("gpu")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="VmHWM is Linux's")
def test_peak_memory_is_what_the_kernel_reports_in_bytes() -> None:
    ones = np.ones(2**24)  # 128 MiB: a new peak, so that both counters have just moved
    status = Path("/proc/self/status").read_text()
    kernel = 1024 * int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])
    assert peak_memory(torch.device("cpu")) == pytest.approx(kernel, rel=0.05)
    assert peak_memory(torch.device("cpu")) > ones.nbytes
