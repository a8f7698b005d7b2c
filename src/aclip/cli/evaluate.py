"""`aclip evaluate`: retrieval and zero-shot classification on held-out pictures."""

import argparse
from pathlib import Path
from typing import Any

EXAMPLES = """\
examples:
  aclip evaluate runs/first --data held-out.csv
  aclip evaluate runs/first --data emoji:val_both --weights ema
  aclip evaluate runs/first --data held-out.csv --evaluators zero_shot --templates 'a photo of {}' --classes names.txt
  aclip evaluate ViT-B-32:laion2b_s34b_b79k --data pictures/ --evaluators retrieval zero_shot
"""


def register(verbs: Any) -> None:
    """Add the verb to the command line."""
    parser = verbs.add_parser(
        "evaluate", help="measure a model on held-out pictures", epilog=EXAMPLES,
        description="Image-to-text and text-to-image retrieval (R@1, R@5, R@10, median rank) over a set's distinct "
                    "captions, and zero-shot classification with prompt templates. Nothing is masked here.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help="a run's folder, a folder with open_clip_config.json, or an "
                        "open_clip name with pretrained weights (NAME:TAG)")
    parser.add_argument("--data", nargs="+", required=True, metavar="[NAME=]SOURCE",
                        help="held-out sources, of every kind that `aclip train --data` takes")
    parser.add_argument("--evaluators", nargs="+", default=["retrieval"], metavar="NAME",
                        help="retrieval, zero_shot (default: retrieval)")
    parser.add_argument("--templates", nargs="+", metavar="TEXT",
                        help="prompts of zero_shot, with {} for the class, e.g. 'a drawing of {}' (default: a few)")
    parser.add_argument("--classes", metavar="FILE", type=Path,
                        help="class names of zero_shot, one a line (default: the set's labels, else its captions)")
    parser.add_argument("--weights", choices=["online", "ema"], default="online",
                        help="of a run: the trained image tower or its moving average (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="loader processes (default: %(default)s)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Evaluate and print; the numbers of a run also go to its evaluations.jsonl."""
    from rich.console import Console

    from aclip.cli.compose import evaluate_sets, open_held_out
    from aclip.data import CaptionTokenizer
    from aclip.engine.checkpoint import load_ema
    from aclip.engine.run_config import choose_device
    from aclip.engine.run_folder import RunFolder
    from aclip.errors import ConfigError, unknown_name
    from aclip.evaluation import EVALUATORS
    from aclip.report import write_report
    from aclip.towers import load, visual_of
    from aclip.towers.sources import CONFIG_NAME

    for name in args.evaluators:
        if name not in EVALUATORS:
            raise ConfigError(unknown_name("evaluator", name, EVALUATORS))
    prompts: dict[str, Any] = {"templates": tuple(args.templates)} if args.templates else {}
    if args.classes is not None:
        prompts["classes"] = read_classes(args.classes)
    if prompts and "zero_shot" not in args.evaluators:
        raise ConfigError("--templates and --classes are of zero-shot classification: add --evaluators zero_shot")
    evaluators = [EVALUATORS[name](**prompts if name == "zero_shot" else {}) for name in args.evaluators]
    device = choose_device(args.device)
    # a saved model may have a config.json too, of other tools: what makes a run is that its model is in final/
    path = Path(args.model)
    is_run = (path / "config.json").is_file() and not (path / CONFIG_NAME).exists()
    folder = RunFolder(path) if is_run else None
    model = load(args.model)
    model.tokenizer = CaptionTokenizer(model.tokenizer)  # captions of any length in bounded time
    if args.weights == "ema":
        if folder is None:
            raise ConfigError(f"--weights ema needs a run's folder with its checkpoints, which {args.model} is not")
        load_ema(visual_of(model.model), folder.checkpoints)
    model.to(device)
    last = max(folder.records("metrics"), key=lambda r: r["step"], default={}) if folder else {}
    console = Console(highlight=False)
    evaluate_sets(model, open_held_out(args.data), evaluators, folder, console, device=device,
                  workers=args.workers, weights=args.weights, step=last.get("step", 0),
                  samples_seen=last.get("samples_seen", 0))
    if folder is not None:
        report = write_report(folder.path)
        console.print(f"added to {folder.path}/evaluations.jsonl and to {report}", markup=False, soft_wrap=True)


def read_classes(path: Path) -> tuple[str, ...]:
    """Return the class names in a file, one a line, empty lines left out.

    Raises:
        ConfigError: the file cannot be read or names nothing.
    """
    from aclip.errors import ConfigError

    try:
        names = tuple(line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read class names from {path}: {error}") from error
    if not names:
        raise ConfigError(f"{path} holds no class names: write one a line")
    return names
