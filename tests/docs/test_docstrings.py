"""Every public name has an example in its docstring, and every example of the package runs as it is printed."""

import ast
import doctest
import importlib
import inspect
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

import aclip

SOURCE = Path(__file__).parents[2] / "src" / "aclip"


def docstrings(path: Path) -> Iterator[tuple[str, str]]:
    """Yield the name and docstring of every class, function and named value of a file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            yield node.name, ast.get_docstring(node) or ""
        if isinstance(node, ast.Module):
            for value, said in zip(node.body, node.body[1:], strict=False):
                if isinstance(value, ast.AnnAssign) and isinstance(said, ast.Expr) and isinstance(
                        said.value, ast.Constant):
                    yield ast.unparse(value.target), inspect.cleandoc(str(said.value.value))


EXAMPLES = {path: found for path in sorted(SOURCE.rglob("*.py"))
            if (found := [(name, text) for name, text in docstrings(path) if ">>> " in text])}


def test_every_public_name_has_an_example() -> None:
    named = {name for found in EXAMPLES.values() for name, _ in found}
    assert {*aclip.__all__, *aclip.losses.__all__} - {"losses"} <= named


class Checker(doctest.OutputChecker):
    def check_output(self, want: str, got: str, optionflags: int) -> bool:
        """What is printed counts only where the example shows it."""
        return not want or super().check_output(want, got, optionflags)


@pytest.mark.slow
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_examples_run_as_printed(
    path: Path, workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(workspace, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    module = importlib.import_module(".".join(path.relative_to(SOURCE.parent).with_suffix("").parts))
    runner = doctest.DocTestRunner(Checker(), optionflags=doctest.ELLIPSIS)
    for name, text in EXAMPLES[path]:
        names = {"aclip": aclip, "torch": torch, "Image": Image, "replace": replace, **vars(module)}
        shutil.rmtree("runs/mine", ignore_errors=True)
        runner.run(doctest.DocTestParser().get_doctest(text, names, name, str(path), 0))
    assert not runner.failures, capsys.readouterr().out
