"""`aclip train`: train or resume a run."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aclip.engine.run_config import RunConfig

DEFAULT_RECIPE, DEFAULT_MODEL = "a-clip", "vit-tiny"

EXAMPLES = """\
examples:
  aclip train --recipe a-clip --model vit-tiny --data pairs.csv --output runs/first
  aclip train --recipe a-clip --model ViT-B-16 --data 'shards/{000000..000099}.tar' --precision bf16 \\
              --epochs 25 --batch-size 1024 --validation held-out.csv --output runs/b16
  aclip train --recipe a-clip-eff --model vit-small --data pictures/ --set recipe.passes.masked.mask_ratio=0.6 \\
              --output runs/sixty
  aclip train --resume runs/b16

sources (--data, --validation):
  FILE.tar, 'a/{0000..0099}.tar', FOLDER of tars   WebDataset shards
  's3://bucket/{0000..0099}.tar', 'http://...'     the same, elsewhere
  FILE.csv, FILE.tsv, 'lists/*.csv'                tables; columns are guessed and stated
  FILE.jsonl, FILE.json                            objects with image and caption; COCO captions
  FILE.parquet, 'parts/*.parquet'                  paths or pictures in columns
  FOLDER                                           pictures with .txt captions beside them, or class folders
  FOLDER?split=train                               what Hugging Face's save_to_disk wrote
  yfcc15m.pkl, cc3m.npy, cc12m.npy                 SLIP's metadata, '?images=FOLDER' for the pictures
  emoji:train                                      a split of a set from `aclip data fetch`
  pairs.csv[:1000], 'emoji:train[:100]'            a part of any source
  --data a.csv=2 b.tar=1                           a mixture: two thirds of each epoch from a, one third from b
"""


class Tuple(argparse.Action):
    """Stores the values of an option as a tuple, as configurations hold them."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option: str | None = None) -> None:
        """Store."""
        setattr(namespace, self.dest, tuple(values))


def register(verbs: Any) -> None:
    """Add the verb to the command line."""
    parser = verbs.add_parser(
        "train", help="train a model on image-text pairs", epilog=EXAMPLES,
        description="Train any recipe on any open_clip ViT with your own image-text pairs. Everything about the\n"
                    "run goes to its folder; its last lines say where the results are.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_options(parser)
    parser.set_defaults(run=run)


def _add_options(parser: argparse.ArgumentParser) -> None:
    """Add all options of the verb."""
    what = parser.add_argument_group("what to train")
    what.add_argument("--recipe", help=f"the method, see `aclip recipes` (default: {DEFAULT_RECIPE})")
    what.add_argument("--model", help="open_clip name, NAME:PRETRAINED, NAME:WEIGHT_FILE, a preset (vit-micro, "
                      "vit-tiny, vit-small), a run, a folder of open_clip's or Hugging Face's CLIP, or the A-CLIP "
                      f"release's checkpoint (default: {DEFAULT_MODEL})")
    what.add_argument("--image-size", type=image_size, metavar="PIXELS", help="side of the input, or HEIGHTxWIDTH; "
                      "positions are interpolated (default: the model's own)")
    what.add_argument("--data", nargs="+", type=str, action=Tuple, metavar="SOURCE[=WEIGHT]",
                      help="training source, see below; several are mixed by their weights, or by their sizes")
    what.add_argument("--validation", nargs="+", type=str, action=Tuple, metavar="[NAME=]SOURCE",
                      help="sources to evaluate on during and after training")
    what.add_argument("--output", help="the run's folder (default: runs/RECIPE-MODEL)")
    what.add_argument("--resume", nargs="?", const="", metavar="RUN", help="continue a run exactly where it was "
                      "saved; without a folder: the one of --output, if it is there")

    what.add_argument("--overfit-one-batch", nargs="?", type=int, const=100, metavar="STEPS",
                      help="train on the first batch alone (100 steps), write nothing, and say whether the loss fell: "
                      "the first thing to try when a run does not learn")

    how = parser.add_argument_group("how")
    length = how.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=float, help="passes over the data (default: 25)")
    length.add_argument("--samples", type=int, help="pairs to train on, instead of --epochs")
    how.add_argument("--lr", type=float, help="peak learning rate (default: the recipe's)")
    how.add_argument("--seed", type=int, help="of weights, order, crops and masks (default: 0)")
    how.add_argument("--parallel", choices=["ddp", "fsdp"], help="over several processes (torchrun, srun): everything "
                     "on each, or a share of it on each (default: ddp)")
    add_settings(how)


def add_settings(how: Any) -> list[argparse.Action]:
    """Add the options that every training run takes, one of a comparison too, and return them."""
    return [
        how.add_argument("--batch-size", type=int, help="pairs per optimizer step (default: 256, or all the data)"),
        how.add_argument("--weight-decay", type=float, help="AdamW's, on matrices (default: the recipe's)"),
        how.add_argument("--mask-ratio", type=float, help="fraction of patches removed in every masked pass "
                         "(default: the recipe's)"),
        how.add_argument("--unmasked-tuning", type=float, metavar="SHARE", help="share of the steps, at the end, in "
                         "which nothing is masked (default: 0)"),
        how.add_argument("--unmasked-lr", type=float, metavar="FACTOR",
                         help="on the learning rate in those steps (default: 1)"),
        how.add_argument("--resolution-schedule", nargs="+", type=resolution_phase, action=Tuple,
                         metavar="SHARE:RESOLUTION", help="small images first: shares of the steps with the image side "
                         "relative to the recipe's own, e.g. 0.5:0.5 0.3:0.75 (default: whole images throughout)"),
        how.add_argument("--precision", choices=["fp32", "bf16", "fp16"],
                         help="of the towers' arithmetic (default: bf16 where the device multiplies in it, fp16 on "
                         "GPUs below compute capability 8.0, else fp32)"),
        how.add_argument("--micro-batch", type=pairs_or_auto, metavar="PAIRS|auto", help="pairs that a process holds "
                         "at a time; the step stays that of the whole batch; auto: as many as fit (default: all)"),
        how.add_argument("--recompute", action="store_true", default=None,
                         help="save memory: run the towers' blocks again in the backward pass"),
        how.add_argument("--compile", action="store_true", default=None, help="compile the towers' blocks"),
        how.add_argument("--grad-clip", type=float, metavar="NORM",
                         help="largest norm of the gradient; 0 clips nothing (default: the recipe's)"),
        how.add_argument("--layer-decay", type=float, metavar="FACTOR", help="on the learning rate, from a block of a "
                         "tower to the one before it (default: the recipe's)"),
        how.add_argument("--freeze", nargs="+", type=str, action=Tuple, metavar="PATTERN", help="parameters that are "
                         "not trained, besides the recipe's, e.g. 'visual.*' to lock the image tower"),
        how.add_argument("--device", help="auto, cpu, cuda, cuda:1, mps (default: auto)"),
        how.add_argument("--workers", type=int, help="loader processes (default: what suits the cores and the device)"),
        how.add_argument("--evaluate-every", type=float, metavar="EPOCHS",
                         help="0 evaluates at the end alone (default: 1)"),
        how.add_argument("--save-every", type=float, metavar="EPOCHS", help="between checkpoints (default: 1)"),
        how.add_argument("--keep-checkpoints", type=int, metavar="K", help="of the newest (default: 2)"),
        how.add_argument("--keep-every", type=int, metavar="N",
                         help="also keep every N-th checkpoint for good (default: 0, none)"),
        how.add_argument("--log-every", type=int, metavar="STEPS", help="between lines of metrics.jsonl (default: 10)"),
        how.add_argument("--tensorboard", action="store_true", default=None, help="also write TensorBoard events"),
        how.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", dest="assignments",
                         help="change any field of the run, e.g. recipe.objectives.byol.weight=1 (repeatable)"),
    ]


def image_size(text: str) -> int | tuple[int, int]:
    """Return a side in pixels, or (height, width) from HEIGHTxWIDTH."""
    sides = text.split("x")
    if len(sides) > 2 or not all(side.isdecimal() for side in sides):
        raise argparse.ArgumentTypeError(f"'{text}' is not a number of pixels, nor HEIGHTxWIDTH, e.g. 224 or 192x256")
    return (int(sides[0]), int(sides[1])) if len(sides) == 2 else int(sides[0])


def pairs_or_auto(text: str) -> int | str:
    """Return a number of pairs, or "auto"."""
    if text != "auto" and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"'{text}' is not a number of pairs, nor auto")
    return text if text == "auto" else int(text)


def resolution_phase(text: str) -> Any:
    """Return a phase of a resolution schedule from SHARE:RESOLUTION."""
    from aclip.engine.run_config import ResolutionPhase
    from aclip.errors import ConfigError

    try:
        share, resolution = map(float, text.split(":"))
        return ResolutionPhase(share, resolution)
    except (ValueError, ConfigError) as error:
        raise argparse.ArgumentTypeError(f"'{text}' is not SHARE:RESOLUTION, e.g. 0.5:0.5 ({error})") from error


def run(args: argparse.Namespace) -> None:
    """Train, evaluate and write the report."""
    if args.overfit_one_batch is not None:
        _overfit(args)
        return
    from aclip.engine.launch import joined, speaking_in_turn

    with speaking_in_turn():
        config, folder, resumed = _settle(args)
    from aclip import dist
    from aclip.cli.compose import train_run  # after the options are known to be right: it imports everything
    from aclip.run_folder import RunFolder

    command = " ".join(["aclip", *map(shlex.quote, sys.argv[1:])])
    with joined(config.device) as device:
        config, folder, resumed = dist.collect((config, folder, resumed))[0]
        train_run(config, RunFolder(folder), resumed=resumed, command=command, device_name=device)


def _overfit(args: argparse.Namespace) -> None:
    """Try one batch.

    Raises:
        ConfigError: fewer steps than one. TrainingError: the loss did not fall.
    """
    from aclip.errors import ConfigError, TrainingError

    if args.overfit_one_batch < 1:
        raise ConfigError(f"--overfit-one-batch takes at least one step, not {args.overfit_one_batch}")
    config = _new_config(args)
    from aclip.cli.overfit import overfit

    if not overfit(config, args.overfit_one_batch):
        raise TrainingError("one batch was not learned")


def config_from(arguments: Sequence[str]) -> RunConfig:
    """Return the configuration of the new run that `aclip train` starts with these arguments."""
    parser = argparse.ArgumentParser(prog="aclip train", usage="see aclip train --help")
    _add_options(parser)
    return _new_config(parser.parse_args(arguments))


def _settle(args: argparse.Namespace) -> tuple[RunConfig, Path, bool]:
    """Return the run's configuration, its folder, and whether it is to be resumed."""
    import dataclasses

    from aclip.engine.run_config import RESUMABLE, saved_config
    from aclip.errors import ConfigError
    from aclip.run_folder import RunFolder

    if args.resume is None and int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0:
        args.resume = ""  # torchrun has started this run anew after one of its processes ended
    if args.resume is None:
        config = _new_config(args)
        folder = Path(config.output)
        RunFolder(folder).check_free()  # before the ranks meet: of an error of rank 0 alone the others do not hear
        return config, folder, False
    folder = Path(args.resume or _output(args))
    if not (folder / "config.json").exists():
        if args.resume:
            raise ConfigError(f"{folder} holds no run to resume: it has no config.json")
        return _new_config(args), folder, False
    saved = saved_config(RunFolder(folder))
    wanted = _with_options(saved, args)
    here = dataclasses.replace(saved, output=wanted.output if Path(wanted.output) == folder else saved.output)  # moved
    changed = [f.name for f in dataclasses.fields(here)
               if f.name not in RESUMABLE and getattr(here, f.name) != getattr(wanted, f.name)]
    if changed:
        others = ", ".join("--" + name.replace("_", "-") for name in RESUMABLE)
        raise ConfigError(f"the run in {folder} was started with other settings ({', '.join(changed)}): a resumed run "
                          f"keeps its own, and takes no others than {others}; leave the rest out, or start a new run "
                          f"from the weights of this one, with --model {folder} and another --output")
    return wanted, folder, True


def _new_config(args: argparse.Namespace) -> RunConfig:
    """Return the configuration of a run that starts."""
    from aclip.engine.run_config import RunConfig
    from aclip.errors import ConfigError
    from aclip.recipes import RECIPES

    if args.data is None:
        raise ConfigError("--data is missing: name a source of image-text pairs, or get one with "
                          "`aclip data fetch emoji` and use --data emoji:train")
    base = RunConfig(recipe=RECIPES[DEFAULT_RECIPE], model=DEFAULT_MODEL, data=args.data, output=_output(args))
    return _with_options(base, args)


def _with_options(config: RunConfig, args: argparse.Namespace) -> RunConfig:
    """Return `config` with every option that was given on the command line."""
    import dataclasses

    from aclip.config import override
    from aclip.engine.run_config import RunConfig
    from aclip.errors import ConfigError, unknown_name
    from aclip.recipes import RECIPES

    given = {name: value for name, value in vars(args).items() if value is not None}
    recipe = config.recipe
    if "recipe" in given and given["recipe"] != recipe.name:
        if given["recipe"] not in RECIPES:
            raise ConfigError(unknown_name("recipe", given["recipe"], RECIPES))
        recipe = RECIPES[given["recipe"]]
    if "mask_ratio" in given:
        if all(p.masking == "none" for p in recipe.passes):
            raise ConfigError(f"--mask-ratio has nothing to act on: recipe '{recipe.name}' masks nothing")
        recipe = dataclasses.replace(recipe, passes=tuple(
            dataclasses.replace(p, mask_ratio=given["mask_ratio"]) if p.masking != "none" else p
            for p in recipe.passes))
    settings = {name: given[name] for name in ("lr", "weight_decay", "grad_clip", "layer_decay") if name in given}
    freeze = dict.fromkeys((*recipe.freeze, *given.get("freeze", ())))  # each once, for a resumed run has them already
    recipe = dataclasses.replace(recipe, optimization=dataclasses.replace(recipe.optimization, **settings),
                                 freeze=tuple(freeze))
    fields = {f.name: given[f.name] for f in dataclasses.fields(config) if f.name in given}
    config = dataclasses.replace(config, **fields | {"recipe": recipe})
    config = override(config, args.assignments)
    assert isinstance(config, RunConfig)
    return config


def _output(args: argparse.Namespace) -> str:
    model = (args.model or DEFAULT_MODEL).replace("/", "-").replace(":", "-")
    return str(args.output or f"runs/{args.recipe or DEFAULT_RECIPE}-{model}")
