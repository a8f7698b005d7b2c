"""`aclip report`: write the page of a run."""

import argparse
from pathlib import Path
from typing import Any

EXAMPLES = """\
examples:
  aclip report runs/first       writes runs/first/report.html
"""


def register(verbs: Any) -> None:
    """Add the verb to the command line."""
    parser = verbs.add_parser(
        "report", help="write the page of a run", epilog=EXAMPLES,
        description="Write report.html in a run's folder: curves, what the model looks at, retrievals, the\n"
                    "recipe. `aclip train` does this at its end; the page can be written at any time.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run_folder", metavar="RUN", type=Path, help="a run's folder")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Write the report."""
    from rich.console import Console

    from aclip.report import write_report

    path = write_report(args.run_folder)
    Console().print(f"report: {path}", highlight=False, soft_wrap=True)
