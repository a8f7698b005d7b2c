"""`aclip export`: hand a model to other tools, checked."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aclip.exporters import Examples, Parity, Subject, Training
    from aclip.run_folder import RunFolder

PICTURES = 8

EXAMPLES = """\
examples:
  aclip export runs/first --to huggingface
  aclip export runs/first --to onnx --weights ema --output models/first-onnx
  aclip export ViT-B-32:laion2b_s34b_b79k --to torch-export

formats:
  open_clip      a folder for open_clip (local-dir:FOLDER), and for clip_benchmark
  huggingface    a folder for transformers: CLIPModel and CLIPProcessor; CLIPVisionModel for an image tower alone
  onnx           image.onnx and text.onnx for ONNX Runtime, any batch size
  safetensors    the weights in one file, architecture and preprocessing as JSON
  torch-export   image.pt2 and text.pt2, programs for torch alone, any batch size

What was written is read back with its own library. If features of pictures and captions differ from the model's by more
than the tolerance, nothing is left behind. Pictures are those of the run's validation or training data where they are
there, else made ones. A model card, README.md, says how the model was trained, measured and checked.
"""


def register(verbs: Any) -> None:
    """Add the verb to the command line."""
    parser = verbs.add_parser(
        "export", help="write a model for other tools", epilog=EXAMPLES,
        description="Write a model for open_clip, transformers, ONNX Runtime or torch alone, and check that it gives\n"
                    "the same features there.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help="a run's folder, or any model that `aclip train --model` "
                        "starts from: a model's folder, NAME:TAG, NAME:FILE")
    parser.add_argument("--to", required=True, metavar="FORMAT", help="see below")
    parser.add_argument("--output", type=Path, metavar="FOLDER",
                        help="(default: RUN/export/FORMAT, or exports/NAME-FORMAT for what is no run)")
    parser.add_argument("--weights", choices=["online", "ema"], default="online",
                        help="of a run: the trained image tower or its moving average (default: %(default)s)")
    parser.add_argument("--tolerance", type=float, default=1e-5, metavar="NUMBER",
                        help="largest difference of an entry of a feature of length 1 (default: %(default)g)")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Export, check, and say where the result is and how far it is from the model."""
    from rich.console import Console

    from aclip.data import CaptionTokenizer
    from aclip.errors import ConfigError, unknown_name
    from aclip.exporters import EXPORTS, Subject, check_place, model_card, write_checked
    from aclip.models import load, model_config
    from aclip.run_folder import RunFolder

    if args.to not in EXPORTS:
        raise ConfigError(unknown_name("format", args.to, EXPORTS))
    if not args.tolerance > 0:
        raise ConfigError(f"--tolerance is a positive number, not {args.tolerance:g}")
    path = Path(args.model)
    is_run = (path / "config.json").is_file() and any((path / name).is_dir() for name in ("final", "checkpoints"))
    folder = RunFolder(path) if is_run else None
    output = args.output or default_output(args.model, args.to, args.weights, is_run=is_run)
    check_place(output, overwrite=args.overwrite)
    model = load(args.model, weights=args.weights)
    model.tokenizer = CaptionTokenizer(model.tokenizer)
    subject = Subject(model, model_config(args.model), path.resolve().name if path.is_dir() else args.model)
    console = Console(highlight=False)
    export_format = EXPORTS[args.to]
    export_format.check_can_represent(subject)
    examples = find_examples(folder, subject)
    training = read_training(folder, args.weights) if folder is not None else None
    with console.status(f"writing and checking {output}"):
        parity = write_checked(
            export_format, subject, output, examples, tolerance=args.tolerance, overwrite=args.overwrite,
            card=lambda found: model_card(export_format, subject, found, examples, training))
    print_parity(console, parity, examples, export_format.library)
    console.print(f"done. {args.to}: {output}  model card: {output / 'README.md'}", markup=False, soft_wrap=True)


def default_output(model: str, export_format: str, weights: str, *, is_run: bool) -> Path:
    """Return where an export goes if nothing is said: beside the run, or under the model's name."""
    what = export_format if weights == "online" else f"{export_format}-{weights}"
    if is_run:
        return Path(model) / "export" / what
    name = Path(model).resolve().name if Path(model).is_dir() else model.replace("/", "-").replace(":", "-")
    return Path("exports") / f"{name}-{what}"


def find_examples(folder: RunFolder | None, subject: Subject) -> Examples:
    """Return pictures and captions of a run's validation or training data if they can be read, else made ones."""
    from aclip.cli.compose import open_held_out, open_training, pick_pictures
    from aclip.errors import AclipError
    from aclip.exporters import made_examples, real_examples

    config = folder.read_json("config.json") if folder is not None else {}
    for source in [*config.get("validation", ()), config.get("data")]:
        if not source:
            continue
        try:
            held = open_held_out([source])[0].source if isinstance(source, str) else open_training(source)
            pairs = pick_pictures(held, PICTURES, seed=0)
        except (AclipError, OSError):  # moved, deleted, or elsewhere
            continue
        if pairs:
            return real_examples(pairs, source if isinstance(source, str) else ", ".join(source))
    return made_examples(subject.image_size)


def read_training(folder: RunFolder, weights: str) -> Training:
    """Return what a run's folder says about how its model came to be."""
    from aclip.exporters import Training

    last = folder.last("metrics")
    return Training(folder.read_json("config.json"), list(folder.records("evaluations")), weights,
                    int(last.get("step", 0)), int(last.get("samples_seen", 0)))


def print_parity(console: Any, parity: Parity, examples: Examples, library: str) -> None:
    """Say how far the export is from the model."""
    told = [f"image features {parity.image:.1e}"]
    if parity.text is not None:
        told.append(f"text features {parity.text:.1e}")
    if parity.pixels is not None:
        told.append(f"preprocessing {parity.pixels:.2g} of 255 grey levels")
    console.print(f"largest difference as {library} reads it: {', '.join(told)} (on {examples.origin})", markup=False,
                  soft_wrap=True)
    if parity.differing:
        shown = "; ".join(repr(caption[:60]) for caption in parity.differing[:3])
        console.print(f"{len(parity.differing)} of {parity.captions} captions are split into other tokens there: "
                      f"{shown}", markup=False, soft_wrap=True)
