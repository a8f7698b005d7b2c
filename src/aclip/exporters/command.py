"""`aclip export`: from a model's name to a checked export with its model card."""

import re
import shlex
from pathlib import Path
from typing import Literal

from aclip.errors import ConfigError, unknown_name


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
        >>> import aclip
        >>> folder = aclip.export("runs/first", to="huggingface")
    """
    from rich.console import Console

    from aclip.data import CaptionTokenizer
    from aclip.exporters import EXPORTERS
    from aclip.exporters.card import model_card
    from aclip.exporters.check import write_checked
    from aclip.models import load, model_config
    from aclip.run_folder import RunFolder

    model = str(model)  # a Path is fine too
    if to not in EXPORTERS:
        raise ConfigError(unknown_name("export format", to, EXPORTERS))
    exporter, path, run = EXPORTERS[to], Path(model), RunFolder(Path(model))
    is_run = (path / "config.json").is_file() and (run.final.is_dir() or run.checkpoints.is_dir())
    name = to if weights == "online" else f"{to}-{weights}"
    folder = Path(output) if output else _default_output(model, name, is_run)
    loaded = load(model, weights=weights)
    loaded.tokenizer = CaptionTokenizer(loaded.tokenizer)
    config = run.read_json("config.json") if is_run else None
    differences = write_checked(
        exporter, loaded, model_config(model), folder, tolerance=tolerance, overwrite=overwrite,
        card=lambda found: model_card(
            exporter, loaded, path.resolve().name if path.is_dir() else model, found, weights=weights, config=config,
            evaluations=run.records("evaluations")),
        record={"model": model, "format": to, "weights": weights, "step": loaded.step,
                "samples_seen": loaded.samples_seen, "command": shlex.join(
                    ["aclip", "export", model, "--to", to, "--weights", weights, "--output", str(folder)])})
    console = Console(highlight=False)
    found = ", ".join(f"{name} {value:.2g}" for name, value in differences.items())
    for line in (f"largest difference in {exporter.library}: {found}",
                 f"exported to {folder}  model card: {folder / 'README.md'}"):
        console.print(line, markup=False, soft_wrap=True)
    return folder


def _default_output(model: str, name: str, is_run: bool) -> Path:
    if is_run:
        return Path(model) / "export" / name
    title = Path(model).resolve().name if Path(model).is_dir() else re.sub("[/:]", "-", model)
    return Path("exports") / f"{title}-{name}"
