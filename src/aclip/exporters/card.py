"""The model card of an export: what it is, how to load it, how it was trained, measured and checked."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from aclip.exporters.base import ExportFormat, Subject
from aclip.exporters.check import Parity
from aclip.exporters.examples import Examples

_LIBRARIES = {"open_clip": "open_clip", "transformers": "transformers", "ONNX Runtime": "onnx"}


@dataclass(frozen=True)
class Training:
    """What a run's folder says about the model.

    Attributes:
        config: its config.json. evaluations: the lines of its evaluations.jsonl.
        weights: "online" or "ema".
        step, samples_seen: optimizer steps done, pairs seen.
    """

    config: Mapping[str, Any]
    evaluations: Sequence[Mapping[str, Any]] = field(default=())
    weights: str = "online"
    step: int = 0
    samples_seen: int = 0


def model_card(
    export_format: ExportFormat, subject: Subject, parity: Parity, examples: Examples, training: Training | None
) -> str:
    """Return README.md of an export.

    Args:
        export_format, subject: what was written. parity, examples: how it was checked.
        training: of a run; None for a model that came from elsewhere.
    """
    parts = [_front_matter(export_format, subject), f"# {subject.name}", _summary(subject, training),
             "## Use", "`FOLDER` is where this file is.", f"```python\n{export_format.usage(subject)}\n```",
             "## Input", _input(subject)]
    if training is not None:
        parts += ["## Training", _training(training), "## Metrics", _metrics(training)]
    parts += ["## Check", _check(export_format, parity, examples), "## Licence", _licence(training)]
    return "\n\n".join(parts) + "\n"


def _front_matter(export_format: ExportFormat, subject: Subject) -> str:
    lines = ["---", "tags: [clip, attentive-clip]"]
    if export_format.library in _LIBRARIES:
        lines.append(f"library_name: {_LIBRARIES[export_format.library]}")
    if subject.model.has_text:
        lines.append("pipeline_tag: zero-shot-image-classification")
    return "\n".join([*lines, "---"])


def _summary(subject: Subject, training: Training | None) -> str:
    model: Any = subject.model.model
    image = sum(p.numel() for p in model.visual.parameters())
    text = sum(p.numel() for p in model.parameters()) - image
    kind = "A CLIP model" if subject.model.has_text else "An image encoder"
    size = f"{image / 1e6:.1f} M parameters in the image tower" + (f", {text / 1e6:.1f} M in the text tower"
                                                                   if subject.model.has_text else "")
    if training is None:
        return f"{kind}: {size}. Exported by attentive-clip."
    recipe = training.config.get("recipe", {})
    average = ("\n\nThe image tower holds the moving average of its weights over training."
               if training.weights == "ema" else "")
    return (f"{kind} trained with attentive-clip, recipe `{recipe.get('name', 'unknown')}` "
            f"({recipe.get('title', '')}; {recipe.get('paper', '')}): {size}.{average}")


def _input(subject: Subject) -> str:
    config = subject.preprocess
    height, width = subject.image_size
    resize = {"squash": "resized to it, proportions not kept", "longest": "resized by the longer side and padded"}.get(
        config.get("resize_mode", "shortest"), "resized by the shorter side, then cropped in the centre")
    lines = [f"Pictures of {height} x {width} pixels, RGB from 0 to 1, {resize} ({config.get('interpolation')}).",
             f"Mean {_numbers(config['mean'])}, standard deviation {_numbers(config['std'])}."]
    if subject.model.has_text:
        bias = "" if subject.logit_bias is None else f", and {subject.logit_bias:.4g} is added"
        lines.append(f"Texts of up to {subject.context_length} tokens. Similarities are multiplied with "
                     f"{subject.logit_scale:.4g}{bias}.")
    return "\n".join(lines)


def _training(training: Training) -> str:
    config = training.config
    data = config.get("data", "unknown")
    sources = [data] if isinstance(data, str) else list(data)
    rows = [
        ("model", config.get("model")), ("data", ", ".join(f"`{source}`" for source in sources)),
        ("pairs", f"{config['num_pairs']:,}" if "num_pairs" in config else None),
        ("pairs seen", f"{training.samples_seen:,}" if training.samples_seen else None),
        ("steps", f"{training.step:,}" if training.step else None),
        *((name.replace("_", " "), config.get(name)) for name in (
            "epochs", "batch_size", "unmasked_tuning", "unmasked_lr", "image_size", "seed", "precision")),
        ("learning rate", config.get("recipe", {}).get("optimization", {}).get("lr")),
        ("versions", ", ".join(f"{name} {version}" for name, version in config.get("versions", {}).items())),
    ]
    parts = [_table(("", ""), [row for row in rows if row[1] not in (None, "")])]
    if config.get("command"):
        parts.append(f"```bash\n{config['command']}\n```")
    if config.get("recipe"):
        recipe = json.dumps(config["recipe"], indent=2, ensure_ascii=False)
        parts.append(f"<details><summary>The recipe as it was run</summary>\n\n```json\n{recipe}\n```\n\n</details>")
    return "\n\n".join(parts)


def _metrics(training: Training) -> str:
    """Return the newest result of every set, evaluator and weights, as evaluations.jsonl has them."""
    newest: dict[tuple[Any, ...], Mapping[str, Any]] = {}
    for record in training.evaluations:
        if record.get("weights") == training.weights:
            newest[tuple(record.get(key) for key in ("set", "evaluator", "training_set"))] = record
    rows = [(record.get("set"), record.get("evaluator"), metric, f"{value:.4g}", record.get("step"))
            for record in newest.values() for metric, value in record.get("metrics", {}).items()]
    if not rows:
        return "None were measured on these weights."
    return _table(("set", "evaluator", "metric", "value", "after step"), rows)


def _check(export_format: ExportFormat, parity: Parity, examples: Examples) -> str:
    rows = [(what, f"{value:.1e}") for what, value in (
        ("image features", parity.image), ("text features", parity.text), ("logit scale", parity.logit_scale))
        if value is not None]
    if parity.pixels is not None:
        rows.append(("preprocessing, of 255 grey levels", f"{parity.pixels:.2g}"))
    if parity.captions:
        rows.append(("captions split otherwise", f"{len(parity.differing)} of {parity.captions}"))
    return (f"Largest difference between the trained model and this export as {export_format.library} reads it, of an "
            f"entry of features of length 1, on {examples.origin}:\n\n" + _table(("", "difference"), rows))


def _licence(training: Training | None) -> str:
    told = ["State it here: these weights have the licence that you give them, within what the licences of the "
            "training data allow."]
    if training is not None and ":" in str(training.config.get("model", "")):
        told.append(f"They were fine-tuned from `{training.config['model']}`, whose licence applies too.")
    if training is None:
        told = ["The licence of the weights that were exported applies."]
    return " ".join([*told, "The software that exported them, attentive-clip, is under Apache-2.0."])


def _table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def _numbers(values: Sequence[float]) -> str:
    return "(" + ", ".join(f"{value:.6g}" for value in values) + ")"
