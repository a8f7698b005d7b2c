"""`aclip evaluate`: retrieval, zero-shot classification, calibration and probes on held-out pictures."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from aclip.cli.compose_evaluation import Masked
    from aclip.evaluation import Evaluator
    from aclip.run_folder import RunFolder

EXAMPLES = """\
examples:
  aclip evaluate runs/first --data held-out.csv
  aclip evaluate runs/first --data emoji:val_both --weights ema
  aclip evaluate runs/first --data held-out.csv --evaluators zero_shot --templates 'a photo of {}' --classes names.txt
  aclip evaluate runs/first --data imagenet/val --evaluators zero_shot --classes imagenet --templates openai
  aclip evaluate runs/first --data 'dataset_coco.json?split=test&images=coco' --protocol karpathy
  aclip evaluate runs/first --data cifar10:test --train cifar10:train --evaluators linear_probe knn
  aclip evaluate runs/first --data emoji:val_vendor --keep 1 0.75 0.5 0.25 --keep-by attentive uniform
  aclip evaluate ViT-B-32:laion2b_s34b_b79k --data pictures/ --evaluators retrieval zero_shot --output measured
  torchrun --nproc-per-node 8 -m aclip evaluate runs/first --data held-out.csv

evaluators:
  retrieval      R@1, R@5, R@10 and median rank, both ways, among what --protocol says
  zero_shot      top-1, top-5 and mean per class, from prompts with the classes' names; each class in the report
  calibration    of zero_shot: expected calibration error, negative log-likelihood, reliability diagram
  linear_probe   top-1, ... of a logistic regression on the image features, its strength searched on --train
  knn            the same of the 20 nearest pictures of --train, weighted by similarity
A model without text, of a recipe such as simclr or mae, can do the last two. Nothing is masked without --keep.

protocols of retrieval:
  distinct       first captions; equal ones are one, and right for all of their pictures (default)
  all            all captions of every picture, each right for its own picture alone
  karpathy       the first five of them, as COCO 5K and Flickr30K 1K are measured
  karpathy-1k    likewise, mean over folds of 1,000 pictures, as COCO 1K
"""

CLASSIFIES_BY_NAME = ("zero_shot", "calibration")


def register(verbs: Any) -> None:
    """Add the verb to the command line."""
    parser = verbs.add_parser(
        "evaluate", help="measure a model on held-out pictures", epilog=EXAMPLES,
        description="Measure a model on held-out pictures with captions (retrieval), with class names (zero-shot\n"
                    "classification), or with labels and labelled pictures to learn from (linear probe, nearest\n"
                    "neighbours).",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help="a run's folder, or any model that `aclip train --model` "
                        "starts from: a model's folder, NAME:TAG, NAME:FILE")
    parser.add_argument("--data", nargs="+", required=True, metavar="[NAME=]SOURCE",
                        help="held-out sources, of every kind that `aclip train --data` takes")
    parser.add_argument("--train", metavar="[NAME=]SOURCE",
                        help="labelled pictures that linear_probe and knn learn from")
    parser.add_argument("--evaluators", nargs="+", metavar="NAME",
                        help="see below (default: retrieval if the model has text; with --train also linear_probe "
                             "and knn)")
    parser.add_argument("--protocol", default="distinct", metavar="NAME",
                        help="of retrieval, see below (default: %(default)s)")
    parser.add_argument("--templates", nargs="+", metavar="TEXT",
                        help="prompts of zero_shot, with {} for the class, e.g. 'a drawing of {}'; a file with one a "
                             "line; openai, simple, or a published set's name (default: a few)")
    parser.add_argument("--classes", metavar="FILE|NAME",
                        help="class names of zero_shot: a file with one a line, or with the set's label, a tab and the "
                             "name; imagenet, imagenet-subset, or a published set's name such as eurosat (default: the "
                             "set's labels, else its captions)")
    parser.add_argument("--first-label", type=int, choices=[0, 1],
                        help="number of the first of --classes, where the set's labels are numbers (default: what the "
                             "labels show)")
    parser.add_argument("--solver", default="lbfgs", metavar="NAME",
                        help="of linear_probe: lbfgs with a search of the penalty, or sgd with a sweep of learning "
                             "rates and decays (default: %(default)s)")
    parser.add_argument("--keep", nargs="+", type=float, default=[], metavar="SHARE",
                        help="also measure with these shares of the patches kept, e.g. 1 0.75 0.5 0.25")
    parser.add_argument("--keep-by", nargs="+", default=["attentive", "uniform"], metavar="WAY",
                        help="how --keep chooses: attentive, attentive-half (scored at half size), uniform "
                             "(default: attentive uniform)")
    parser.add_argument("--block-size", type=int, default=1, metavar="PATCHES",
                        help="side of what --keep keeps or removes as a whole; training uses 2 (default: %(default)s)")
    parser.add_argument("--output", type=Path, metavar="FOLDER",
                        help="where numbers and page go, for a model that is no run (default: they are printed alone)")
    parser.add_argument("--weights", choices=["online", "ema"], default="online",
                        help="of a run: the trained image tower or its moving average (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: %(default)s)")
    parser.add_argument("--workers", type=int, help="loader processes (default: what suits the cores and the device)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Evaluate and print; the numbers of a run also go to its evaluations.jsonl.

    Processes that torchrun or Slurm has started each take their share of the pictures and captions.
    """
    from aclip.engine.launch import joined, speaking_in_turn
    from aclip.evaluation import together

    with speaking_in_turn():
        check_names(args.evaluators, with_training=args.train is not None)
        options = evaluator_options(args)
        masked = masking(args)
    with joined(args.device) as device_name, together.together():
        measure(args, options, masked, device_name)


def measure(
    args: argparse.Namespace, options: Mapping[str, Mapping[str, Any]], masked: Masked, device_name: str
) -> None:
    """Load the model and evaluate it, on every process; the first prints and writes."""
    from rich.console import Console

    from aclip.cli.compose import open_held_out
    from aclip.cli.compose_evaluation import evaluate_sets
    from aclip.data import CaptionTokenizer, suitable_workers
    from aclip.engine.run_config import choose_device
    from aclip.evaluation import together
    from aclip.models import load
    from aclip.report import write_report

    console = Console(highlight=False, quiet=together.rank() > 0)
    with together.common_fate():
        device = choose_device(device_name)
        folder, _ = journal_folder(args)
        model = load(args.model, weights=args.weights)
        names = choose(args.evaluators, args.model, has_text=model.has_text, with_training=args.train is not None)
        evaluators = build(names, options)
        model.tokenizer = CaptionTokenizer(model.tokenizer)  # captions of any length in bounded time
        model.to(device)
        held_out = open_held_out(args.data)
        training = open_held_out([args.train])[0] if args.train is not None else None
    # a last step that was skipped has no line among the metrics
    known = (folder.last("metrics"), folder.last("evaluations")) if folder else ({},)
    last = max(known, key=lambda record: record.get("step", 0))
    workers = suitable_workers(device, args.workers)
    evaluate_sets(model, held_out, evaluators, folder, console, device=device, workers=workers,
                  weights=args.weights, step=last.get("step", 0), samples_seen=last.get("samples_seen", 0),
                  masked=masked, training=training)
    if folder is not None and together.rank() == 0:
        report = write_report(folder.path)
        console.print(f"added to {folder.path}/evaluations.jsonl and to {report}", markup=False, soft_wrap=True)


def evaluator_options(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Return the options of evaluators that are not left to their defaults, by the evaluator's name.

    Raises:
        ConfigError: an option without its evaluator, or a value that does not exist.
    """
    from dataclasses import replace

    from aclip.errors import ConfigError
    from aclip.evaluation import find_classes, find_templates

    asked = args.evaluators or ()
    prompts: dict[str, Any] = {}
    if (args.classes or args.templates) and not set(asked) & set(CLASSIFIES_BY_NAME):
        raise ConfigError("--templates and --classes are of zero-shot classification: add --evaluators zero_shot")
    if args.templates:
        prompts["templates"] = find_templates(args.templates)
    if args.classes is not None:
        prompts["classes"] = replace(find_classes(args.classes), first_number=args.first_label)
    elif args.first_label is not None:
        raise ConfigError("--first-label counts the classes of --classes: name them")
    if args.solver != "lbfgs" and "linear_probe" not in (asked or ["linear_probe"] * (args.train is not None)):
        raise ConfigError("--solver is of the linear probe: add --evaluators linear_probe")
    if args.protocol != "distinct" and asked and "retrieval" not in asked:
        raise ConfigError("--protocol is of retrieval: add --evaluators retrieval")
    options = {"retrieval": {"protocol": args.protocol}, "linear_probe": {"solver": args.solver},
               **dict.fromkeys(CLASSIFIES_BY_NAME, prompts)}
    build([name for name in options if name in asked or name == "retrieval"], options)  # wrong values are met here
    return options


def masking(args: argparse.Namespace) -> Masked:
    """Return what `--keep` and its companions ask for.

    Raises:
        ConfigError: a share outside (0, 1], an unknown way, or a block size below 1.
    """
    from aclip.cli.compose_evaluation import Masked
    from aclip.errors import ConfigError, unknown_name
    from aclip.evaluation import KEPT_BY

    for share in args.keep:
        if not 0.0 < share <= 1.0:
            raise ConfigError(f"--keep is the share of patches that the model sees, 0 < share <= 1, not {share:g}")
    for way in args.keep_by:
        if way not in KEPT_BY:
            raise ConfigError(unknown_name("way to keep patches", way, KEPT_BY))
    if args.block_size < 1:
        raise ConfigError(f"--block-size is counted in patches, at least 1, not {args.block_size}")
    return Masked(tuple(args.keep), tuple(args.keep_by), args.block_size)


def journal_folder(args: argparse.Namespace) -> tuple[RunFolder | None, bool]:
    """Return where the numbers go, if anywhere, and whether that is the run that is measured.

    Raises:
        ConfigError: --output for a run, which has a folder; one that is a run, or of another model.
    """
    from aclip.errors import ConfigError
    from aclip.evaluation import together
    from aclip.models.hugging_face import read_config
    from aclip.models.sources import CONFIG_NAME
    from aclip.run_folder import RunFolder

    # a saved model may have a config.json too, of other tools: what makes a run is that its model is in final/
    path = Path(args.model)
    if (path / "config.json").is_file() and not (path / CONFIG_NAME).exists() and read_config(path) is None:
        if args.output is not None:
            raise ConfigError(f"{path} is a run, and its numbers go into its own folder: leave --output out")
        return RunFolder(path), True
    if args.output is None:
        return None, False
    folder = RunFolder(args.output)
    if (folder.path / "checkpoints").exists():
        raise ConfigError(f"--output {folder.path} is the folder of a run: choose another")
    config = {"recipe": {"name": args.model}, "command": " ".join(["aclip", *sys.argv[1:]])}
    if (folder.path / "config.json").exists():
        there = folder.read_json("config.json")  # of an earlier evaluation, or of a model that lies there
        if not isinstance(there, dict) or there.get("recipe") != config["recipe"]:
            raise ConfigError(f"--output {folder.path} has a config.json of something else than numbers of "
                              f"{args.model}: choose another folder")
    if together.rank() == 0:
        folder.write_json("config.json", config)
    return folder, False


def build(names: Sequence[str], options: Mapping[str, Mapping[str, Any]]) -> list[Evaluator]:
    """Return evaluators with their options."""
    from aclip.evaluation import EVALUATORS

    return [EVALUATORS[name](**options.get(name, {})) for name in names]


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
