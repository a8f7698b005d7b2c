"""What this process may compute on: device, precision, cores and memory, the limits of its container included."""

import math
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from aclip.errors import ConfigError
from aclip.version import VERSION

if TYPE_CHECKING:
    import torch

Precision = Literal["fp32", "bf16", "fp16"]

_MEMBERSHIP, _CGROUPS, _CPU_INFO = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"), Path("/proc/cpuinfo")
_UNLIMITED = 2**60  # bytes; cgroup v1 writes "no limit" as the largest multiple of a page


def choose_device(name: str) -> "torch.device":
    """Return the device of this name; "auto" is a GPU if there is one.

    Raises:
        ConfigError: there is no such device.
    """
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    advice = "use auto, cpu, cuda, cuda:N or mps"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"unknown device '{name}': {advice}") from error
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device '{name}' is not available: {str(error).splitlines()[0]}; {advice}") from error
    return device


def synchronize(device: "torch.device") -> None:
    """Wait for the device; a CPU has nothing to wait for."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


def fast_precision(device: "torch.device") -> Precision:
    """Return bf16 where the hardware multiplies in it, fp16 on older GPUs, which only emulate bf16, else fp32.

    bf16: NVIDIA GPUs of compute capability 8.0 and above (not T4, V100, RTX 20), AMD GPUs, CPUs with AMX or
    AVX512-BF16: on one core of such an EPYC a step of `clip` on `vit-micro` takes 1.8 times as long in fp32.
    """
    import torch

    if device.type == "cuda":
        emulated = torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0)
        return "fp16" if emulated else "bf16"
    if device.type == "cpu" and _CPU_INFO.exists():
        return "bf16" if any(name in _CPU_INFO.read_text() for name in ("amx_bf16", "avx512_bf16")) else "fp32"
    return "fp32"


def cpp_compiler() -> str | None:
    """Return the C++ compiler that torch.compile uses on CPUs, or None."""
    return shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")


def usable_cores() -> int:
    """Return the number of cores this process may use: its CPU affinity, capped by the CPU quota of its cgroup."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    of_v1 = zip(_settings("cpu", "cpu.cfs_quota_us"), _settings("cpu", "cpu.cfs_period_us"), strict=False)
    of_v2 = (setting.split() for setting in _settings("", "cpu.max"))
    quotas = [int(quota) / int(period) for quota, period in (*of_v1, *of_v2) if quota.isdecimal()]  # else no limit
    return max(1, min([cores, *map(math.ceil, quotas)]))


def memory_limit() -> int | None:
    """Return the memory limit of this process's cgroup in bytes, the lowest of its ancestors', or None without one."""
    names = (("", "memory.max"), ("memory", "memory.limit_in_bytes"))
    values = (value for controller, name in names for value in _settings(controller, name))
    limits = [int(value) for value in values if value.isdecimal() and int(value) < _UNLIMITED]
    return min(limits, default=None)


def in_units(number: int) -> str:
    """Return bytes in GiB, or MiB if few."""
    return f"{number / 2**30:.1f} GiB" if number >= 2**30 else f"{number / 2**20:.0f} MiB"


def peak_memory(device: "torch.device") -> int:
    """Return bytes: on CUDA the peak allocated on the device, else the peak resident size of this process.

    Loader processes are not counted.
    """
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def versions(device: "torch.device") -> dict[str, str]:
    """Return what a run's numbers depend on besides its configuration."""
    import torch

    return {
        "attentive-clip": VERSION, "torch": torch.__version__, "open_clip": version("open_clip_torch"),
        "python": platform.python_version(), "machine": f"{platform.system()} {platform.machine()}",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda"
        else f"{device.type}, {torch.get_num_threads()} threads",
    }


def _settings(controller: str, name: str) -> Iterator[str]:
    """Yield a setting of this process's cgroup and of each of its ancestors.

    Args:
        controller: of cgroup v1, or "" for the unified hierarchy of v2.
        name: of the file that holds the setting.
    """
    for line in _MEMBERSHIP.read_text().splitlines() if _MEMBERSHIP.exists() else ():  # Linux alone has it
        _, controllers, group = line.split(":", 2)
        if controller not in controllers.split(","):
            continue
        # In a container the path may be the host's, which does not exist here: then only the root's limit counts.
        folder = _CGROUPS / controller / group.lstrip("/")
        for place in (folder, *folder.parents):
            if place.is_relative_to(_CGROUPS / controller) and (place / name).is_file():
                yield (place / name).read_text().strip()
