"""`aclip evaluate`: retrieval, zero-shot classification and probes on held-out pictures."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

EXAMPLES = """\
examples:
  aclip evaluate runs/first --data held-out.csv
  aclip evaluate runs/first --data emoji:val_both --weights ema
  aclip evaluate runs/first --data held-out.csv --evaluators zero_shot --templates 'a photo of {}' --classes names.txt
  aclip evaluate runs/first --data cifar10:test --train cifar10:train --evaluators linear_probe knn
  aclip evaluate ViT-B-32:laion2b_s34b_b79k --data pictures/ --evaluators retrieval zero_shot

evaluators:
  retrieval      R@1, R@5, R@10 and median rank, both ways, over the set's distinct captions
  zero_shot      top-1, top-5 and mean per class, from prompts with the classes' names
  linear_probe   the same of a logistic regression on the image features, L2 strength searched on --train
  knn            the same of the 20 nearest pictures of --train, weighted by similarity
A model without text, of a recipe such as simclr or mae, can do the last two. Nothing is masked here.
"""


def register(verbs: Any) -> None:
    """Add the verb to the command line."""
    parser = verbs.add_parser(
        "evaluate", help="measure a model on held-out pictures", epilog=EXAMPLES,
        description="Measure a model on held-out pictures with captions (retrieval), with class names (zero-shot "
                    "classification), or with labels and labelled pictures to learn from (linear probe, nearest "
                    "neighbours).",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help="a run's folder, a folder with open_clip_config.json, or an "
                        "open_clip name with pretrained weights (NAME:TAG)")
    parser.add_argument("--data", nargs="+", required=True, metavar="[NAME=]SOURCE",
                        help="held-out sources, of every kind that `aclip train --data` takes")
    parser.add_argument("--train", metavar="[NAME=]SOURCE",
                        help="labelled pictures that linear_probe and knn learn from")
    parser.add_argument("--evaluators", nargs="+", metavar="NAME",
                        help="see below (default: retrieval if the model has text; with --train also linear_probe "
                             "and knn)")
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
    from aclip.engine.run_config import choose_device
    from aclip.engine.run_folder import RunFolder
    from aclip.errors import ConfigError
    from aclip.evaluation import EVALUATORS
    from aclip.report import write_report
    from aclip.towers import load
    from aclip.towers.hugging_face import read_config
    from aclip.towers.sources import CONFIG_NAME

    check_names(args.evaluators, with_training=args.train is not None)
    prompts: dict[str, Any] = {"templates": tuple(args.templates)} if args.templates else {}
    if args.classes is not None:
        prompts["classes"] = read_classes(args.classes)
    if prompts and "zero_shot" not in (args.evaluators or ()):
        raise ConfigError("--templates and --classes are of zero-shot classification: add --evaluators zero_shot")
    device = choose_device(args.device)
    # a saved model may have a config.json too, of other tools: what makes a run is that its model is in final/
    path = Path(args.model)
    is_run = (path / "config.json").is_file() and not (path / CONFIG_NAME).exists() and read_config(path) is None
    folder = RunFolder(path) if is_run else None
    model = load(args.model, weights=args.weights)
    names = choose(args.evaluators, args.model, has_text=model.has_text, with_training=args.train is not None)
    evaluators = [EVALUATORS[name](**prompts if name == "zero_shot" else {}) for name in names]
    model.tokenizer = CaptionTokenizer(model.tokenizer)  # captions of any length in bounded time
    model.to(device)
    last = max(folder.records("metrics"), key=lambda r: r["step"], default={}) if folder else {}
    console = Console(highlight=False)
    evaluate_sets(model, open_held_out(args.data), evaluators, folder, console, device=device,
                  workers=args.workers, weights=args.weights, step=last.get("step", 0),
                  samples_seen=last.get("samples_seen", 0),
                  training=open_held_out([args.train])[0] if args.train is not None else None)
    if folder is not None:
        report = write_report(folder.path)
        console.print(f"added to {folder.path}/evaluations.jsonl and to {report}", markup=False, soft_wrap=True)


def check_names(names: Sequence[str] | None, *, with_training: bool) -> None:
    """Check the evaluators that were asked for, before anything is loaded.

    Raises:
        ConfigError: an unknown one, one that learns without --train, or --train with none that learns.
    """
    from aclip.errors import ConfigError, unknown_name
    from aclip.evaluation import EVALUATORS

    for name in names or ():
        if name not in EVALUATORS:
            raise ConfigError(unknown_name("evaluator", name, EVALUATORS))
        if name in _probes() and not with_training:
            raise ConfigError(f"{name} learns from labelled pictures: name them with --train, as in "
                              "--data cifar10:test --train cifar10:train")
    if with_training and names and not set(names) & set(_probes()):
        raise ConfigError(f"--train is for evaluators that learn, which {', '.join(names)} "
                          f"{'do' if len(names) > 1 else 'does'} not: add one of {', '.join(_probes())}")


def choose(names: Sequence[str] | None, model: str, *, has_text: bool, with_training: bool) -> list[str]:
    """Return the evaluators that were asked for, or else those that a model can do with what was given.

    Raises:
        UnsupportedModelError: a model without text, and one that needs text or nothing to learn from.
    """
    from aclip.errors import UnsupportedModelError
    from aclip.evaluation import EVALUATORS

    if names is None:
        names = [*(["retrieval"] if has_text else []), *(_probes() if with_training else [])]
    with_text = [name for name in names if EVALUATORS[name].space == "joint"]
    if not has_text and (with_text or not names):
        raise UnsupportedModelError(
            f"{model} has an image tower only, which {' and '.join(with_text or ['retrieval'])} cannot compare with "
            f"text: give labelled pictures with --train, and --evaluators {' '.join(_probes())}")
    return list(names)


def _probes() -> list[str]:
    from aclip.evaluation import EVALUATORS, Probe

    return [name for name, evaluator in EVALUATORS.items() if issubclass(evaluator, Probe)]


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
