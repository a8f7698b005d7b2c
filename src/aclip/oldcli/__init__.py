"""The command line: one verb a file, composed here.

Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted (with the checkpoint saved).
"""

import argparse
import logging
import sys
from collections.abc import Sequence

import aclip
from aclip.cli import bench, compare, data, doctor, evaluate, export, recipes, report, train
from aclip.errors import AclipError, ConfigError

VERBS = (train, compare, evaluate, export, report, recipes, data, bench, doctor)

DESCRIPTION = """\
Train CLIP models that look only at what matters: attentive masking (A-CLIP) and its relatives, on your own
pictures and captions, over open_clip.
"""

EXAMPLES = """\
examples:
  aclip data fetch emoji                                   a real dataset to try things on
  aclip train --recipe a-clip --model vit-tiny --data pairs.csv --output runs/first
  aclip evaluate runs/first --data held-out.csv
  aclip recipes show a-clip --model ViT-B-16
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    parser = build_parser()
    args = parser.parse_args(arguments)
    _show_log(args.debug)
    try:
        args.run(args)
    except ConfigError as error:
        return _fail(error, 2, args.debug)
    except AclipError as error:
        return _fail(error, 1, args.debug)
    except KeyboardInterrupt as interrupt:
        sys.stderr.write(f"\naclip: {interrupt or 'interrupted'}\n")
        return 130
    except BrokenPipeError:
        return 1
    except OSError as error:  # a full disk, a folder without permission
        if args.debug:
            raise
        sys.stderr.write(f"aclip: {error}\n")
        return 1
    return 0


def build_parser() -> argparse.ArgumentParser:
    """Return the parser with all verbs."""
    parser = argparse.ArgumentParser(
        prog="aclip", description=DESCRIPTION, epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"attentive-clip {aclip.__version__}")
    parser.add_argument("--debug", action="store_true", help="show tracebacks and debug messages")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)
    for verb in VERBS:
        verb.register(verbs)
    return parser


def _fail(error: AclipError, code: int, debug: bool) -> int:
    if debug:
        raise error
    sys.stderr.write(f"aclip: {error}\n")
    return code


class _ToStandardError(logging.Handler):
    """Writes to what standard error is at that moment, so that a progress bar on show can make room."""

    def emit(self, record: logging.LogRecord) -> None:
        sys.stderr.write(self.format(record) + "\n")


def _show_log(debug: bool) -> None:
    """Notes and warnings of the library go to standard error as one line each."""
    handler = _ToStandardError()
    handler.setFormatter(logging.Formatter("aclip: %(message)s"))
    logger = logging.getLogger("aclip")
    logger.handlers[:] = [handler]
    logger.setLevel(logging.DEBUG if debug else logging.INFO)
    logger.propagate = False
