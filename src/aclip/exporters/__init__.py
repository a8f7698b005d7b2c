"""Export models for other libraries, each export checked against the model's own features.

One format a module. An exporter writes, and reads back with the library that the format is for; `write_checked`
compares what came back with the model and keeps the folder only if the features agree.

Everything is imported on first use, so that the command line starts without torch.
"""

import re
import shlex
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from aclip.errors import ConfigError, unknown_name

if TYPE_CHECKING:
    from aclip.exporters.base import Exporter, Readback

EXPORTERS: "dict[str, Exporter]"
"""Formats by the name that `export(to=...)` takes; `EXPORTERS["mine"] = MyExporter()` adds one.

Example:
    >>> list(aclip.EXPORTERS)
    ['open_clip', 'huggingface', 'onnx', 'torch-export']
"""

__all__ = ["EXPORTERS", "Exporter", "Readback", "export"]


def __getattr__(name: str) -> Any:
    if name == "EXPORTERS":
        from aclip.exporters import huggingface, open_clip, programs

        return globals().setdefault(name, {
            "open_clip": open_clip.OpenClipExporter(), "huggingface": huggingface.HuggingFaceExporter(),
            "onnx": programs.OnnxExporter(), "torch-export": programs.TorchExporter()})
    if name in __all__:
        return getattr(import_module("aclip.exporters.base"), name)
    raise AttributeError(f"module 'aclip.exporters' has no attribute '{name}'")


def export(
    model: str, *, to: str = "open_clip", output: str | None = None, weights: Literal["online", "ema"] = "online",
    tolerance: float = 1e-5, overwrite: bool = False,
) -> Path:
    """Write a model for another library, and check that it computes the same features there.

    The export is read back with the library it is for. If the features of images and captions differ from the model's
    by more than the tolerance, nothing is written. A model card, README.md, says how the model was trained, evaluated
    and checked.

    Args:
        model: a run's folder, or any model that training starts from: a folder, NAME:TAG, NAME:FILE.
        to: open_clip (also for clip_benchmark), huggingface (CLIPModel and CLIPProcessor of transformers), onnx (ONNX
            Runtime), torch-export (programs for torch alone), or a name in EXPORTERS.
        output: folder to write; by default RUN/export/FORMAT, or exports/NAME-FORMAT for a model that is not a run.
        weights: of a run: the trained image tower ("online") or its exponential moving average ("ema").
        tolerance: largest accepted difference of an entry of an L2-normalised feature.
        overwrite: replace an earlier export.

    Returns:
        The folder.

    Raises:
        ConfigError: an unknown model or format, or something else is at `output`.
        UnsupportedModelError: the format cannot represent the model.
        MissingDependencyError: the format needs a package that is not installed.
        ExportError: the features differ, or the export cannot be written or loaded.

    Example:
        >>> folder = aclip.export("runs/first", to="open_clip")
    """
    from rich.console import Console

    from aclip.data import CaptionTokenizer
    from aclip.exporters import EXPORTERS
    from aclip.exporters.base import model_card, write_checked
    from aclip.models import load, model_config
    from aclip.run_folder import RunFolder

    model = str(model)  # a Path is fine too
    if to not in EXPORTERS:
        raise ConfigError(unknown_name("export format", to, EXPORTERS))
    exporter, path, run = EXPORTERS[to], Path(model), RunFolder(Path(model))
    is_run = (path / "config.json").is_file() and (run.final.is_dir() or run.checkpoints.is_dir())
    title, form = path.resolve().name if path.is_dir() else model, to if weights == "online" else f"{to}-{weights}"
    default = path / "export" / form if is_run else Path("exports") / f"{re.sub('[/:]', '-', title)}-{form}"
    folder = Path(output) if output else default
    loaded = load(model, weights=weights)
    loaded.tokenizer = CaptionTokenizer(loaded.tokenizer)
    config = run.read_json("config.json") if is_run else None
    differences = write_checked(
        exporter, loaded, model_config(model), folder, tolerance=tolerance, overwrite=overwrite,
        card=lambda found: model_card(exporter, loaded, title, found, weights, config, run.records("evaluations")),
        record={"model": model, "format": to, "weights": weights, "step": loaded.step,
                "samples_seen": loaded.samples_seen, "command": shlex.join(
                    ["aclip", "export", model, "--to", to, "--weights", weights, "--output", str(folder)])})
    found = ", ".join(f"{name} {value:.2g}" for name, value in differences.items())
    Console(highlight=False).print(f"largest difference in {exporter.library}: {found}\nexported to {folder}  model "
                                   f"card: {folder / 'README.md'}", markup=False, soft_wrap=True)
    return folder
