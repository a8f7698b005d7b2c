"""What this machine has, what is missing for which feature, and whether training works: `aclip doctor`."""

import math
import os
import platform
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console
from rich.markup import escape

from aclip import devices, models
from aclip.devices import in_units
from aclip.errors import AclipError
from aclip.exporters.base import synthetic_images
from aclip.files import cache_root, data_root
from aclip.version import VERSION

FEATURES = {
    "demo": "fetching and drawing the emoji set", "heic": "HEIC photos", "huggingface": "data that save_to_disk wrote",
    "parquet": "data in Parquet", "remote": "shards on remote storage",
    "tensorboard": "aclip train --loggers tensorboard",
    "wandb": "aclip train --loggers wandb", "mlflow": "aclip train --loggers mlflow",
    "search": "a graph of neighbours for millions of images", "serve": "aclip serve",
    "onnx": "aclip export --to onnx", "transformers": "aclip export --to huggingface",
}
"""What the extras are for; one that is not listed goes by its name."""


@dataclass(frozen=True)
class Finding:
    """One line of the examination.

    Attributes:
        what: its subject. value: what was found. state: "note" where something could be better.
        advice: what to do about it.
    """

    what: str
    value: str
    state: Literal["ok", "note", "error"] = "ok"
    advice: str = ""


def doctor(*, device: str = "auto") -> list[Finding]:
    """Print versions, devices, optional packages, paths and backends, and try one training step.

    Missing optional packages are no failure: the line beside them says how to get them. To examine data instead:
    aclip data doctor SOURCE.

    Args:
        device: of the self-test: auto, cpu, cuda, cuda:1, mps.

    Raises:
        AclipError: something essential is missing or does not work.
    """
    where = devices.choose_device(device)
    console = Console(highlight=False)
    parts: tuple[tuple[str, Callable[[], Iterable[Finding]]], ...] = (
        ("versions", versions), ("devices", hardware), ("optional packages", optional_packages), ("paths", paths),
        ("several processes", backends), ("self-test", lambda: self_test(where)),
    )
    colours = {"ok": "green", "note": "yellow", "error": "red"}
    found: list[Finding] = []
    for title, examine in parts:
        console.print(f"[bold]{title}")
        for finding in examine():
            advice = f"  [dim]{escape(finding.advice)}" if finding.advice else ""
            console.print(f"  [{colours[finding.state]}]{finding.state:<5}[/] {escape(finding.what):<22} "
                          f"{escape(finding.value)}{advice}", soft_wrap=True)
            found.append(finding)
    errors = [finding for finding in found if finding.state == "error"]
    if errors:
        raise AclipError("not everything essential works: " + "; ".join(f"{e.what} ({e.value})" for e in errors))
    console.print("everything essential works")
    return found


def _requirements() -> dict[str, list[str]]:
    extras: dict[str, list[str]] = {}
    for requirement in requires("attentive-clip") or []:
        name = re.match(r"[\w.-]+", requirement)
        extra = re.search(r"extra == ['\"]([\w-]+)['\"]", requirement)
        if name and name[0] != "attentive-clip":  # an extra that includes others
            extras.setdefault(extra[1] if extra else "", []).append(name[0])
    return extras


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def versions() -> Iterator[Finding]:
    """Yield the required packages and their versions."""
    yield Finding("attentive-clip", VERSION)
    yield Finding("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    for name in _requirements()[""]:
        installed = _version(name)
        yield Finding(name, installed) if installed else Finding(name, "missing", "error", f"pip install {name}")


def hardware() -> Iterator[Finding]:
    """Yield what computes here."""
    bf16 = devices.fast_precision(torch.device("cpu")) == "bf16"
    limit = devices.memory_limit()
    memory = f", memory limit {in_units(limit)}" if limit else ""
    yield Finding("CPU", f"{devices.usable_cores()} cores, torch uses {torch.get_num_threads()} threads, "
                  f"{torch.backends.cpu.get_cpu_capability()}, "
                  f"{'multiplies bf16' if bf16 else 'no bf16 products: trains in fp32'}{memory}")
    if not torch.cuda.is_available():
        built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is built without CUDA"
        yield Finding("GPU", f"none ({built})", "note", "a GPU makes real models feasible; vit-tiny trains on a CPU")
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        yield Finding(f"cuda:{number}", f"{properties.name}, {in_units(properties.total_memory)}, compute capability "
                      f"{properties.major}.{properties.minor}, trains in "
                      f"{devices.fast_precision(torch.device('cuda', number))}, CUDA {torch.version.cuda}")
    if torch.backends.mps.is_available():
        yield Finding("mps", "available")
    compiler = devices.cpp_compiler()
    yield Finding("C++ compiler", compiler) if compiler else Finding(
        "C++ compiler", "none", "note", "--compile needs one on CPUs: apt install g++, or leave --compile out")


def optional_packages() -> Iterator[Finding]:
    """Yield the extras, what they are for, and which of their packages are missing."""
    for extra, packages in _requirements().items():
        if extra in ("", "test"):
            continue
        purpose = FEATURES.get(extra, extra)
        if absent := [name for name in packages if not _version(name)]:
            yield Finding(extra, f"{', '.join(absent)} missing, for {purpose}", "note",
                          f"pip install 'attentive-clip[{extra}]'")
        else:
            yield Finding(extra, f"{', '.join(packages)}, for {purpose}")


def paths() -> Iterator[Finding]:
    """Yield where files go, whether the paths are writable, and how much room there is."""
    hub = Path(os.environ.get("HF_HOME", cache_root().parent / "huggingface"))
    for what, folder in (("data sets", data_root()), ("cache", cache_root()), ("pretrained weights", hub),
                         ("temporary files", Path(tempfile.gettempdir())), ("this folder", Path.cwd())):
        existing = next((one for one in (folder, *folder.parents) if one.exists()), Path(folder.anchor))
        value = f"{folder} ({in_units(shutil.disk_usage(existing).free)} free)"
        if os.access(existing, os.W_OK):
            yield Finding(what, value)
        else:
            yield Finding(what, f"{value}, not writable", "note", "set ACLIP_DATA, ACLIP_CACHE, HF_HOME or TMPDIR")
    shared = Path("/dev/shm")
    if shared.is_dir():
        free = shutil.disk_usage(shared).free
        small = free < 2**28
        yield Finding("shared memory", f"{in_units(free)} free in {shared}", "note" if small else "ok",
                      "loader processes share batches in it: use --workers 0, or enlarge it (docker: --shm-size)"
                      if small else "")


def backends() -> Iterator[Finding]:
    """Yield what there is for training on several processes."""
    from torch import distributed

    if not distributed.is_available():
        yield Finding("torch.distributed", "not in this torch", "note", "only one process can train")
        return
    for name, available in (("gloo (CPU)", distributed.is_gloo_available()),
                            ("NCCL (GPU)", distributed.is_nccl_available())):
        yield Finding(name, "available" if available else "not in this torch", "ok" if available else "note")


def self_test(device: torch.device) -> Iterable[Finding]:
    """Yield whether a training step and the encoding of an image work, with their time."""
    for what, attempt in (("one training step", _train_step), ("one image encoded", _encode_image)):
        begun = time.perf_counter()
        try:
            said = attempt(device)
        except Exception as error:  # whatever goes wrong is what the user wants to know
            yield Finding(what, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}", "error")
        else:
            yield Finding(what, f"{said}, {time.perf_counter() - begun:.1f} s")


def _train_step(device: torch.device) -> str:
    """Train A-CLIP on four synthetic images for one step, from files to the optimizer."""
    from aclip import data
    from aclip.recipes import configure
    from aclip.trainer import build_trainer, open_batches

    with tempfile.TemporaryDirectory(prefix="aclip-doctor-") as folder:
        for number, image in enumerate(synthetic_images((32, 32))):
            image.save(Path(folder, f"{number}.png"))
            Path(folder, f"{number}.txt").write_text(f"image {number}\n", encoding="utf-8")
        source = data.open_training(folder)
        config = configure(model="vit-micro", data=folder, output=folder, epochs=4)
        trainer = build_trainer(config, len(source), device)
        loss = float(trainer.train_step(next(iter(open_batches(trainer, source, workers=0)))).loss.detach())
    if not math.isfinite(loss):
        raise ArithmeticError(f"the loss is {loss}")
    return f"a-clip on vit-micro, {trainer.config.precision} on {device}, loss {loss:.2f}"


def _encode_image(device: torch.device) -> str:
    model = models.LoadedModel(models.create_model("vit-micro").eval(), models.tokenizer_of("vit-micro")).to(device)
    features = model.encode_images(synthetic_images(model.image_size)[:1])
    if not features.isfinite().all():
        raise ArithmeticError("its features are not finite")
    return f"{features.shape[1]} features"
