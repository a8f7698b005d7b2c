"""`aclip bench`: how fast this machine is, measured in turns; one action a file."""

import argparse
from typing import Any

from aclip.cli import bench_model, bench_step

ACTIONS = (bench_model, bench_step)

EXAMPLES = """\
examples:
  aclip bench step --recipe a-clip-eff --model ViT-B-16 --pairs 3000000
  aclip bench model ViT-B-16                     images and texts a second, whole and with patches dropped
  aclip bench model runs/first --keep 1 0.5 --batch-sizes 1 32 --json
"""


def register(verbs: Any) -> None:
    """Add the verb to the command line."""
    parser = verbs.add_parser(
        "bench", help="measure the speed of this machine", epilog=EXAMPLES,
        description="Measure the speed of this machine. What is compared is timed in turns (A B C, A B C, ...), so\n"
                    "that whatever else the machine does meets all of it.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    for action in ACTIONS:
        action.register(actions)
