"""`aclip doctor`: what this machine has, what is missing for which feature, and whether training works."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from rich.console import Console

EXAMPLES = """\
examples:
  aclip doctor
  aclip doctor --device cuda          self-test on a device of your choice

Ends with 0 if models can be trained and used here, else with 1. Optional packages that are missing are no failure:
the line beside them says how to get them. To examine a data set instead: aclip data doctor SOURCE
"""

ESSENTIAL = ("torch", "torchvision", "open_clip_torch", "numpy", "pillow", "safetensors", "jaxtyping", "rich")

FEATURES = {
    "demo": "fetching and drawing the emoji sets", "huggingface": "data sets that save_to_disk wrote",
    "parquet": "data in Parquet", "remote": "shards on remote storage", "tensorboard": "aclip train --tensorboard",
    "onnx": "aclip export --to onnx", "transformers": "aclip export --to huggingface",
}
"""What the extras of this package are for; one that is not listed goes by its name."""

State = Literal["ok", "note", "error"]


@dataclass(frozen=True)
class Finding:
    """One line.

    Attributes:
        what: its subject. value: what was found. state: "note" where something could be better.
        advice: what to do about it.
    """

    what: str
    value: str
    state: State = "ok"
    advice: str = ""


def register(verbs: Any) -> None:
    """Add the verb to the command line."""
    parser = verbs.add_parser(
        "doctor", help="examine this machine and installation", epilog=EXAMPLES,
        description="Print versions, devices, optional packages, places on disk, what there is for several processes,\n"
                    "and try one training step.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", default="auto", help="of the self-test: auto, cpu, cuda, cuda:1, mps "
                        "(default: %(default)s)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Examine and print; fail if something essential is wrong."""
    from rich.console import Console

    from aclip.engine.run_config import choose_device
    from aclip.errors import AclipError

    device = choose_device(args.device)
    console = Console(highlight=False)
    errors = []
    for title, examine in (
        ("versions", versions), ("devices", devices), ("optional packages", optional_packages), ("places", places),
        ("several processes", several_processes), ("self-test", lambda: self_test(device)),
    ):
        console.print(f"[bold]{title}")
        errors += [finding for finding in print_findings(console, examine()) if finding.state == "error"]
    if errors:
        raise AclipError(f"{len(errors)} essential thing{'s are' if len(errors) > 1 else ' is'} not in order: "
                         + "; ".join(f"{finding.what} ({finding.value})" for finding in errors))
    console.print("all essentials are in order")


def print_findings(console: Console, findings: Iterable[Finding]) -> list[Finding]:
    """Print one line each as it is found, and return them."""
    from rich.markup import escape

    colours = {"ok": "green", "note": "yellow", "error": "red"}
    found = []
    for finding in findings:
        advice = f"  [dim]{escape(finding.advice)}" if finding.advice else ""
        console.print(f"  [{colours[finding.state]}]{finding.state:<5}[/] {escape(finding.what):<22} "
                      f"{escape(finding.value)}{advice}", soft_wrap=True)
        found.append(finding)
    return found


def versions() -> Iterable[Finding]:
    """Yield what is essential, and its versions."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    import aclip

    yield Finding("attentive-clip", aclip.__version__)
    yield Finding("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    for name in ESSENTIAL:
        try:
            yield Finding(name, version(name))
        except PackageNotFoundError:
            yield Finding(name, "missing", "error", f"pip install {name}")


def devices() -> Iterable[Finding]:
    """Yield what computes here."""
    import torch

    from aclip.data.workers import usable_cores
    from aclip.engine.run_config import fast_precision

    cores = usable_cores()
    bf16 = "multiplies bf16" if fast_precision(torch.device("cpu")) == "bf16" else "no bf16 products: trains in fp32"
    yield Finding("CPU", f"{cores} cores, torch uses {torch.get_num_threads()} threads, "
                  f"{torch.backends.cpu.get_cpu_capability()}, {bf16}{_memory()}")
    if not torch.cuda.is_available():
        built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is built without CUDA"
        yield Finding("GPU", f"none ({built})", "note", "a GPU makes real models feasible; vit-tiny trains on a CPU")
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        yield Finding(f"cuda:{number}", f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, compute "
                      f"capability {properties.major}.{properties.minor}, trains in "
                      f"{fast_precision(torch.device('cuda', number))}, CUDA {torch.version.cuda}{_driver()}")
    if torch.backends.mps.is_available():
        yield Finding("mps", "available")


def optional_packages() -> Iterable[Finding]:
    """Yield this package's extras, what they are for, and which packages of them are missing."""
    import re
    from importlib.metadata import PackageNotFoundError, requires

    try:
        requirements = requires("attentive-clip") or []
    except PackageNotFoundError:
        yield Finding("attentive-clip", "not installed, only found", "note", "pip install . to know its extras")
        return
    extras: dict[str, list[str]] = {}
    for requirement in requirements:
        found = re.match(r"([\w.-]+).*extra == ['\"]([\w-]+)['\"]", requirement)
        if found and found[2] != "test":
            extras.setdefault(found[2], []).append(found[1])
    for extra, packages in extras.items():
        absent = [name for name in packages if not _installed(name)]
        purpose = FEATURES.get(extra, extra)
        if absent:
            yield Finding(extra, f"{', '.join(absent)} missing, for {purpose}", "note",
                          f"pip install 'attentive-clip[{extra}]'")
        else:
            yield Finding(extra, f"{', '.join(packages)}, for {purpose}")


def places() -> Iterable[Finding]:
    """Yield where files go, whether they can, and how much room there is."""
    import os
    import tempfile

    from aclip.data.fetch import default_root
    from aclip.data.sources.shard_index import cache_folder

    hub = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"))
    for what, folder in (("data sets", default_root()), ("cache", cache_folder()), ("fetched weights", hub),
                         ("temporary files", Path(tempfile.gettempdir())), ("this folder", Path.cwd())):
        yield _place(what, folder)
    shared = Path("/dev/shm")
    if shared.is_dir():
        free = _free(shared)
        yield Finding("shared memory", f"{free / 2**30:.1f} GiB free in {shared}", "note" if free < 2**28 else "ok",
                      "loader processes hand batches over in it: use --workers 0, or enlarge it (docker: --shm-size)"
                      if free < 2**28 else "")


def several_processes() -> Iterable[Finding]:
    """Yield what there is to train on several processes."""
    import importlib.util

    from torch import distributed

    if not distributed.is_available():
        yield Finding("torch.distributed", "not in this torch", "note", "one process can train")
        return
    yield Finding("torchrun", "python -m torch.distributed.run"
                  if importlib.util.find_spec("torch.distributed.run") else "missing")
    for name, there in (("gloo (CPU)", distributed.is_gloo_available()),
                        ("NCCL (GPU)", distributed.is_nccl_available())):
        yield Finding(name, "available" if there else "not in this torch", "ok" if there else "note")


def self_test(device: Any) -> Iterable[Finding]:
    """Yield whether a training step and the encoding of a picture work, with the time that each takes."""
    import importlib
    import tempfile

    importlib.import_module("aclip.cli.step_times")  # imports everything, which is not what is timed
    with tempfile.TemporaryDirectory(prefix="aclip-doctor-") as folder:
        yield _tried("one training step", lambda: _train_a_step(Path(folder), device))
        yield _tried("one picture encoded", lambda: _encode_a_picture(device))


def _tried(what: str, attempt: Callable[[], str]) -> Finding:
    """Return how an attempt went; whatever goes wrong here is what the user wants to know."""
    import time

    begun = time.perf_counter()
    try:
        told = attempt()
    except Exception as error:
        return Finding(what, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}", "error")
    return Finding(what, f"{told}, {time.perf_counter() - begun:.1f} s")


def _train_a_step(folder: Path, device: Any) -> str:
    """Train A-CLIP on four made pictures for one step, from files to the optimizer."""
    import math

    from aclip.cli.compose import build_trainer, open_training
    from aclip.cli.step_times import read_batches
    from aclip.engine.run_config import RunConfig, settled
    from aclip.exporters import made_examples
    from aclip.recipes import RECIPES

    for number, picture in enumerate(made_examples((32, 32)).pictures):
        picture.save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"picture {number}\n")
    config = RunConfig(recipe=RECIPES["a-clip"], model="vit-micro", data=str(folder), output=str(folder), epochs=4,
                       workers=0)
    source = open_training(config.data)
    config = settled(config, len(source), device)
    trainer = build_trainer(config, len(source), device)
    loss = float(trainer.train_step(read_batches(trainer, source)[0]).loss.detach())
    if not math.isfinite(loss):
        raise ArithmeticError(f"the loss is {loss}")
    return f"a-clip on vit-micro, {config.precision} on {device}, loss {loss:.2f}"


def _encode_a_picture(device: Any) -> str:
    from aclip.exporters import made_examples
    from aclip.models import LoadedModel, create_model, tokenizer_of

    model = LoadedModel(create_model("vit-micro").eval(), tokenizer_of("vit-micro")).to(device)
    features = model.encode_images(made_examples(model.image_size).pictures[:1])
    if not features.isfinite().all():
        raise ArithmeticError("its features are not finite")
    return f"{features.shape[1]} numbers"


def _installed(name: str) -> bool:
    from importlib.metadata import PackageNotFoundError, version

    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True


def _place(what: str, folder: Path) -> Finding:
    """Return how much room a folder, or the first that exists above it, has, and whether it can be written to."""
    import os

    there = next((one for one in (folder, *folder.parents) if one.exists()), Path("/"))
    value = f"{folder} ({_free(there) / 2**30:.0f} GiB free)"
    if not os.access(there, os.W_OK):
        return Finding(what, f"{value}, not writable", "note",
                       "choose another place with ACLIP_DATA, ACLIP_CACHE, HF_HOME or TMPDIR")
    return Finding(what, value)


def _free(folder: Path) -> int:
    import shutil

    return shutil.disk_usage(folder).free


def _memory() -> str:
    """Return how much memory the machine has, where that can be read."""
    import os

    try:
        return f", {os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB of memory"
    except (AttributeError, OSError, ValueError):
        return ""


def _driver() -> str:
    """Return the version of NVIDIA's driver, where it says so."""
    path = Path("/proc/driver/nvidia/version")
    words = path.read_text().split() if path.exists() else []
    number = next((word for word in words if word[0].isdigit() and "." in word), "")
    return f", driver {number}" if number else ""
