"""The command line: every verb is a public function, whose signature and docstring tyro turns into options.

Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted (with the checkpoint saved).
"""

import argparse
import contextlib
import functools
import importlib
import inspect
import json
import logging
import math
import os
import re
import sys
import time
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from aclip.errors import RANK_0_REPORTS_FIRST, AclipError, ConfigError, unknown_name

HELP = """\
usage: aclip VERB ...

Train CLIP models that look only at what matters: attentive masking (A-CLIP)
and its relatives, on your own images and captions, over open_clip.

  train            train a model on image-text pairs
  evaluate         measure a model on held-out images: retrieval, zero-shot
                   classification, calibration, probes
  compare          train several recipes on equal terms, and show which is best
  explain          show where a model looks in images, and where they answer
                   a text
  export           hand a model to open_clip, transformers, ONNX Runtime or
                   torch.export
  merge            average the weights of models: fine-tune without forgetting
  index            encode images so that they can be searched
  search           find them by text, by image, or near-duplicates
  serve            the same as a page, on this machine
  report           write the report of a run or comparison again
  recipes          list the methods
  recipes show     what a recipe does
  recipes cost     what a step of each costs
  data look        how a source of pairs is understood
  data doctor      what is wrong with it: duplicates, leaks, bad captions
  data pack        write it as WebDataset shards
  data encode      store a teacher's features of it, for `--recipe distill`
  data list        the sets that can be fetched
  data fetch       fetch one
  bench step       how long training takes on this machine
  bench model      how fast a trained model is
  doctor           what is installed here, and what is missing for what

examples:
  aclip data look pairs.csv
  aclip train --model vit-tiny --data pairs.csv --output runs/first
  aclip evaluate runs/first --data held-out.csv
  aclip recipes show a-clip --model ViT-B-16

`aclip VERB --help` shows a verb's options. With every verb: --json prints what
it found as JSON, and all else on standard error; --debug shows tracebacks.
"""

# verb -> (module, function, names of positional arguments)
VERBS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "evaluate": ("aclip.evaluation", "evaluate", ("model",)),
    "explain": ("aclip.explanation", "draw_explanations", ("model", "images")),
    "export": ("aclip.exporters", "export", ("model",)),
    "merge": ("aclip.merging", "merge", ("models",)),
    "index": ("aclip.search.commands", "index", ("model", "source")),
    "search": ("aclip.search.commands", "search", ("index", "query")),
    "serve": ("aclip.search.commands", "serve", ("index",)),
    "report": ("aclip.report.run", "report", ("folder",)),
    "recipes": ("aclip.describe", "list_recipes", ()),
    "recipes show": ("aclip.describe", "show_recipe", ("recipe",)),
    "recipes cost": ("aclip.describe", "recipe_costs", ("recipes",)),
    "data look": ("aclip.examination", "look", ("source",)),
    "data list": ("aclip.data", "list_sets", ()),
    "data fetch": ("aclip.data", "fetch", ("name",)),
    "data pack": ("aclip.data", "pack", ("source",)),
    "data encode": ("aclip.encoding", "encode", ("teacher", "source")),
    "data doctor": ("aclip.examination", "doctor", ("source",)),
    "bench step": ("aclip.bench", "bench_step", ()),
    "bench model": ("aclip.bench", "bench_model", ("model",)),
    "doctor": ("aclip.machine", "doctor", ()),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    for stream in (sys.stdout, sys.stderr):  # printing must not fail in a locale that is not UTF-8
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    debug, as_json = "--debug" in given, "--json" in given
    given = [word for word in given if word not in ("--debug", "--json")]
    _show_log(debug)
    if not given or given[0] in ("-h", "--help"):
        sys.stdout.write(HELP)
        return 0 if given else 2
    if given[0] == "--version":
        import aclip

        sys.stdout.write(f"attentive-clip {aclip.__version__}\n")
        return 0
    try:
        with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
            found = _run(given)
        if as_json and os.environ.get("RANK", "0") == "0":
            sys.stdout.write(json.dumps(_plain(found), indent=1) + "\n")
        return 0
    except SystemExit as exit_:  # tyro, after --help or a wrong option
        return exit_.code if isinstance(exit_.code, int) else 2
    except KeyboardInterrupt as interrupt:
        sys.stderr.write(f"\naclip: {interrupt or 'interrupted'}\n")
        return 130
    except BrokenPipeError:
        return 1
    except (AclipError, OSError) as error:  # OSError: a full disk, a folder without permission
        if debug:
            raise
        if os.environ.get("RANK", "0") != "0" and not getattr(error, "reported", False):
            time.sleep(RANK_0_REPORTS_FIRST)  # torchrun ends the others when rank 0 has reported it
        sys.stderr.write(f"aclip: {error}\n")
        return 2 if isinstance(error, ConfigError) else 1


class _ToStandardError(logging.Handler):
    """Writes to what sys.stderr is at that moment, so that a progress bar can make room."""

    def emit(self, record: logging.LogRecord) -> None:
        text = self.format(record).encode(errors="backslashreplace").decode()  # file names may hold any bytes
        sys.stderr.write(text + "\n")


def _show_log(debug: bool) -> None:
    """Show notes and warnings of this package as lines on standard error."""
    handler = _ToStandardError()
    handler.setFormatter(logging.Formatter("aclip: %(message)s"))
    logger = logging.getLogger("aclip")
    logger.handlers[:] = [handler]
    logger.setLevel(logging.DEBUG if debug else logging.INFO)
    logger.propagate = False


def _plain(value: Any) -> Any:
    """Return what a verb found as JSON values; bytes and arrays are left out, and numbers that are not finite null."""
    if hasattr(value, "to_json"):
        return _plain(value.to_json())
    if is_dataclass(value):
        return _plain({field.name: getattr(value, field.name) for field in fields(value)})
    if isinstance(value, Mapping):
        return {str(name): _plain(one) for name, one in value.items() if not isinstance(one, bytes)}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, Path):
        return str(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _run(given: list[str]) -> Any:
    """Run a verb and return what its function does."""
    if given[0] == "train":
        return _train(given[1:])
    if given[0] == "compare":
        return _compare(given[1:])
    two = " ".join(given[:2])
    verb = two if two in VERBS else given[0]
    if verb not in VERBS:
        group = [name for name in VERBS if name.startswith(verb + " ")]
        if group:
            raise ConfigError(f"aclip {verb} needs an action: {', '.join(name.split()[1] for name in group)}")
        raise ConfigError(unknown_name("verb", verb, ["train", "compare", *{v.split()[0] for v in VERBS}]))
    module, name, positional = VERBS[verb]
    rest = given[len(verb.split()):]
    function = getattr(importlib.import_module(module), name)
    doc = function.__doc__
    parameters = _parameters_of(function)
    if any(one.name == "changes" for one in parameters):
        rest, changes = take_paths(rest)
        parameters = [one for one in parameters if one.name != "changes"]
        function = functools.partial(function, changes=changes)
    return _call(function, parameters, rest, f"aclip {verb}", doc, positional=positional)


def _train(given: list[str]) -> Any:
    from aclip.recipes import configure

    given, changes = take_paths(given, prefix="recipe.")
    optional = argparse.ArgumentParser(add_help=False, allow_abbrev=False)  # options whose value may be left out
    optional.add_argument("--resume", nargs="?", const="")
    optional.add_argument("--overfit-one-batch", nargs="?", const="100")
    taken, given = optional.parse_known_args(given)
    resume, steps = taken.resume, taken.overfit_one_batch
    settings = _call(dict, _settings_of_run(), given, "aclip train", _arguments_of_run(), TRAIN)
    if resume is not None:  # what is not given stays as it was
        named = {word[2:].partition("=")[0].removeprefix("no-").replace("-", "_")
                 for word in given if word.startswith("--")}
        settings = {name: value for name, value in settings.items() if name in named}
    settings["changes"] = changes
    if steps is not None:
        from aclip.overfit import overfit_one_batch

        if not steps.isdecimal() or not int(steps):
            raise ConfigError(f"--overfit-one-batch takes a number of steps, not '{steps}'")
        return overfit_one_batch(configure(**settings), int(steps))
    if resume is None and not os.environ.get("TORCHELASTIC_RESTART_COUNT", "0").strip("0"):
        check_early(configure(**settings))
    if os.environ.get("RANK", "0") == "0":
        sys.stderr.write("aclip: loading PyTorch\n")
    from aclip.runs import train

    return train(resume=resume or resume is not None, **settings)


def check_early(config: Any) -> None:
    """Raise what can be found without PyTorch, which takes seconds to load."""
    from aclip.data.spec import locate, parse_spec, split_name
    from aclip.run_folder import RunFolder

    RunFolder(Path(config.output)).check_free()
    for spec in (*config.data, *(split_name(named)[1] for named in config.validation)):
        locate(parse_spec(spec).path)


def _compare(given: list[str]) -> Any:
    from aclip.comparison import compare

    given, changes = take_paths(given, prefix="recipe.")
    own = [one for one in _parameters_of(compare) if one.name not in ("settings", "changes")]
    decided = {one.name for one in own} | {"recipe", "seed", "freeze", "lr", "teacher_features"}
    others = [one for one in _settings_of_run() if one.name not in decided]
    about, arguments = str(compare.__doc__).partition("\n\n    Args:\n")[::2]
    return _call(functools.partial(compare, changes=changes), [*own, *others], given, "aclip compare",
                 f"{_arguments_of_run()}\n{arguments.partition(NEXT_SECTION)[0]}", about)


def _settings_of_run() -> list[inspect.Parameter]:
    """Return the settings of a run as arguments, of types that words of the command line have."""
    from aclip.config import Optimization, RunConfig

    hints = typing.get_type_hints(RunConfig)
    simple = {"recipe": str | None, "image_size": str | None, "resolution_schedule": tuple[str, ...],
              "output": str | None}
    first = {"recipe": None, "model": "vit-tiny", "data": (), "output": None}
    known = [(field.name, simple.get(field.name, hints[field.name]), first.get(field.name, field.default))
             for field in fields(RunConfig)]
    own = typing.get_type_hints(Optimization)
    shorthands = [(name, own.get(name, float) | None, None) for name in SHORTHANDS]
    return [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hint)
            for name, hint, default in (*known, *shorthands, ("freeze", tuple[str, ...], ()))]


def _arguments_of_run() -> str:
    """Return a docstring of the settings of a run."""
    from aclip.config import RunConfig

    lines = str(RunConfig.__doc__).partition("    Attributes:\n")[2].rstrip()
    others = "".join(f"\n        {name}: {text}" for name, text in {**SHORTHANDS, **OTHERS}.items())
    return f"Settings.\n\n    Args:\n{lines}{others}"


SHORTHANDS = {
    "optimizer": "adamw, or muon on the matrices inside both towers' blocks (default: the recipe's).",
    "lr": "peak learning rate (default: the recipe's); Muon's is a multiple of it.",
    "weight_decay": "AdamW's, on matrices (default: the recipe's).",
    "grad_clip": "largest norm of the gradient; 0 disables clipping (default: the recipe's).",
    "layer_decay": "factor on the learning rate, from one block of a tower to the block before it.",
    "mask_ratio": "fraction of patches removed in every masked pass (default: the recipe's).",
}
NEXT_SECTION = "\n\n    R"  # Returns, Raises
OTHERS = {"freeze": "parameters that are not trained, besides the recipe's, e.g. 'visual.*' to lock the image tower."}

TRAIN = """\
Train any recipe on any open_clip ViT with your own image-text pairs.
Everything about the run goes to its folder.

  --resume [RUN]           continue a run exactly where it was saved; without
                           RUN: the one in --output, if any
  --overfit-one-batch [N]  train N steps (100) on one batch, write nothing, and
                           say whether the loss fell
  --recipe.PATH VALUE      any field of the recipe, e.g.
                           --recipe.passes.masked.mask-ratio 0.6

Sources: pairs.csv, pairs.jsonl, captions.json, 'parts/*.parquet',
'shards/{0000..0099}.tar', s3://..., a folder of images, emoji:train
(`aclip data fetch emoji`); pairs.csv[:1000] is a part, a.csv=2 b.csv=1 a
mixture. Without --output the run goes to runs/RECIPE-MODEL."""


def take_paths(given: Sequence[str], prefix: str = "") -> tuple[list[str], dict[str, str]]:
    """Split `--some.path VALUE` and `--some.path=VALUE` options, whose names start with `prefix`, from the rest."""
    rest: list[str] = []
    paths: dict[str, str] = {}
    words = iter(given)
    for word in words:
        name, equals, value = word.removeprefix("--").partition("=")
        if word.startswith("--") and "." in name and name.startswith(prefix):
            found = value if equals else next(words, "--")
            if found.startswith("--"):
                raise ConfigError(f"--{name} needs a value")
            paths[name] = found
        else:
            rest.append(word)
    return rest, paths


def join_repeated(given: Sequence[str], lists: Sequence[str]) -> list[str]:
    """Put all values of an option that takes several behind its first mention; tyro would read the last one's alone.

    >>> join_repeated(["--data", "a", "--seed", "1", "--data=b"], ["data"])
    ['--data', 'a', 'b', '--seed', '1']
    """
    current: list[str] = []
    groups, firsts = [current], dict[str, list[str]]()
    for word in given:
        option, equals, value = word.partition("=")
        name = option.removeprefix("--").replace("-", "_")
        if not word.startswith("--") or word == "--":
            current.append(word)
        elif name in firsts:
            current = firsts[name]
            current[:1] = current[0].split("=", 1)
            current += [value] if equals else []
        else:
            current = [word]
            groups.append(current)
            if name in lists:
                firsts[name] = current
    return [word for group in groups for word in group]


def _is_list(hint: Any) -> bool:
    return typing.get_origin(hint) in (tuple, list, Sequence) or any(map(_is_list, typing.get_args(hint)))


def _parameters_of(function: Callable[..., Any]) -> list[inspect.Parameter]:
    """Return the arguments of a function with their types; str for one that only type checkers can resolve."""
    parameters = []
    for name, parameter in inspect.signature(function).parameters.items():
        holder = types.SimpleNamespace(__annotations__={name: parameter.annotation})
        try:
            hint = typing.get_type_hints(holder, function.__globals__, include_extras=True)[name]
        except NameError:
            hint = str
        parameters.append(parameter.replace(annotation=hint))
    return parameters


def _call(
    function: Callable[..., Any], parameters: Sequence[inspect.Parameter], given: Sequence[str], program: str,
    doc: str, description: str | None = None, positional: Sequence[str] = (),
) -> Any:
    """Call a function with the arguments that tyro parses from the command line; `doc` holds their help."""
    import tyro

    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    options = []
    for parameter in parameters:
        hint = _option(parameter.annotation, parameter.default)
        if parameter.name.endswith("_"):  # a keyword of Python, such as not_
            hint = typing.Annotated[hint, tyro.conf.arg(name=parameter.name.rstrip("_"))]
        if parameter.name in positional:
            hint = typing.Annotated[hint, tyro.conf.Positional]
        options.append(parameter.replace(annotation=hint))
    lists = [one.name.rstrip("_") for one in options if one.name not in positional and _is_list(one.annotation)]
    call.__doc__ = re.sub(r"\n {12,}", " ", doc)  # or the help of an option would be wrapped twice
    call.__signature__ = inspect.Signature(options)  # type: ignore[attr-defined]
    call.__annotations__ = {option.name: option.annotation for option in options}
    return tyro.cli(call, args=join_repeated(given, lists), prog=program, description=description)


def _option(hint: Any, default: Any) -> Any:
    """Return the annotation of an option whose help says no more of its default than its text does."""
    import tyro

    kinds = [kind for kind in typing.get_args(hint) if kind in (int, float, str)]
    metavar = None
    if any(typing.get_origin(kind) in (tuple, Sequence) for kind in typing.get_args(hint)) and str in kinds:
        metavar = "STR [STR ...]"
    elif kinds and default is None:
        words = [word for kind in typing.get_args(hint) if typing.get_origin(kind) is typing.Literal
                 for word in typing.get_args(kind)]
        metavar = "|".join([*(kind.__name__.upper() for kind in kinds), *words])
    if default in (None, (), inspect.Parameter.empty):
        return typing.Annotated[hint, tyro.conf.arg(help_behavior_hint="", metavar=metavar)]
    return typing.Annotated[hint, tyro.conf.arg(metavar=metavar)] if metavar else hint


if "torch" not in sys.modules:  # idle OpenMP threads spin otherwise, which halves the speed on a shared machine
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
