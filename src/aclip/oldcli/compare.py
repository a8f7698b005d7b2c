"""`aclip compare`: several recipes on equal terms, with seeds, measured times and a page of results."""

import argparse
from pathlib import Path
from typing import Any

from aclip.cli.train import Tuple, add_settings

EXAMPLES = """\
examples:
  aclip compare --recipes clip flip a-clip --model vit-tiny --data emoji:train --validation emoji:val_vendor \\
                --epochs 20 --seeds 0 1 2 --output comparisons/emoji
  aclip compare --recipes clip a-clip-eff --model ViT-B-16 --data 'shards/{000000..000099}.tar' \\
                --validation held-out.csv --minutes 600 --lr 5e-4 1e-3 --output comparisons/b16 --batch-size 512
  aclip compare --report comparisons/emoji       writes tables and page again

The same command continues an interrupted comparison; runs that are finished are not repeated. More recipes or
seeds can be added to a comparison later. Options that are not listed under "what to compare" are given to every run.
"""


def register(verbs: Any) -> None:
    """Add the verb to the command line."""
    parser = verbs.add_parser(
        "compare", help="train several recipes on equal terms", epilog=EXAMPLES,
        description="Train several recipes on the same data with the same budget and the same seeds, measure their\n"
                    "steps in turns on this machine, and write one table and one page: mean and spread of every\n"
                    "metric, time, arithmetic and memory.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_argument_group("what to compare")
    what.add_argument("--recipes", nargs="+", metavar="NAME", help="see `aclip recipes`")
    model = what.add_argument("--model", help="as of `aclip train`; the same for all (default: vit-tiny)")
    size = what.add_argument("--image-size", type=int, metavar="PIXELS",
                             help="side of the input (default: the model's own)")
    data = what.add_argument("--data", nargs="+", type=str, action=Tuple, metavar="SOURCE[=WEIGHT]",
                             help="training source or sources, as of `aclip train`")
    held_out = what.add_argument("--validation", nargs="+", action=Tuple, metavar="[NAME=]SOURCE",
                                 help="sources to evaluate on; the first one's metric chooses the learning rate")
    what.add_argument("--output", type=Path, metavar="FOLDER", help="the comparison's folder")
    budget = what.add_mutually_exclusive_group()
    budget.add_argument("--epochs", type=float, help="equal passes over the data")
    budget.add_argument("--samples", type=int, help="equal numbers of pairs")
    budget.add_argument("--minutes", type=float, help="equal time in training steps, by each recipe's measured step "
                        "time on this machine")
    what.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="N",
                      help="runs of each recipe (default: 0 1 2)")
    what.add_argument("--lr", nargs="+", type=float, metavar="RATE", help="peak learning rates that every recipe tries "
                      "with the first seed; its best is used for the other seeds (default: the recipe's own)")
    what.add_argument("--evaluators", nargs="+", metavar="NAME",
                      help="further evaluators of the finished models, see `aclip evaluate` "
                           "(default: with --probe linear_probe and knn, else none)")
    what.add_argument("--probe", metavar="SOURCE", help="labelled pictures on which linear_probe and knn are trained")
    what.add_argument("--evaluate-on", nargs="+", metavar="[NAME=]SOURCE",
                      help="sets of --evaluators, e.g. labelled ones for the probes (default: those of --validation)")
    what.add_argument("--jobs", type=int, default=1, metavar="N",
                      help="runs at a time; they share the cores, and take the GPUs in turns (default: %(default)s)")
    what.add_argument("--timing-rounds", type=int, default=10, metavar="N",
                      help="timed steps of every recipe, taken in turns (default: %(default)s)")
    what.add_argument("--dry-run", action="store_true", help="print the runs and the arithmetic, do nothing")
    what.add_argument("--report", type=Path, metavar="FOLDER", help="only write tables and page of a comparison again")
    what.add_argument("--time-steps", type=Path, metavar="FOLDER",
                      help="only measure the step times again, of a comparison that is at rest")
    passed = [model, size, data, held_out, *add_settings(parser.add_argument_group("of every run"))]
    for action in passed:  # `aclip train` reads the words itself
        action.type = None
    parser.set_defaults(run=run, passed=passed)


def run(args: argparse.Namespace) -> None:
    """Compare; or one of the steps alone."""
    from aclip.errors import ConfigError

    if args.report is not None:
        from aclip.cli.compose_comparison import report

        report(args.report)
        return
    if args.time_steps is not None:
        from aclip.cli.step_times import write_step_times

        write_step_times(args.time_steps, args.timing_rounds)
        return
    for name in ("recipes", "data", "validation", "output"):
        if not getattr(args, name):
            raise ConfigError(f"--{name} is missing: see aclip compare --help")
    if args.epochs is None and args.samples is None and args.minutes is None:
        raise ConfigError("the budget is missing: --epochs, --samples or --minutes, the same for every recipe")
    from aclip.cli.compose_comparison import Comparison

    comparison = Comparison(args, common_arguments(args))
    if args.dry_run:
        comparison.console.print(comparison.table())
    else:
        comparison.run()


def common_arguments(args: argparse.Namespace) -> dict[str, list[str]]:
    """Return the options that every run is given, as `aclip train` takes them: option -> the words that set it."""
    given: dict[str, list[str]] = {}
    for action in args.passed:
        option, value = action.option_strings[0], getattr(args, action.dest)
        if value is None or value == []:
            continue
        if value is True:
            given[option] = [option]
        elif isinstance(value, list):
            given[option] = [word for one in value for word in (option, one)]
        elif isinstance(value, tuple):
            given[option] = [option, *value]
        else:
            given[option] = [option, value]
    return given
