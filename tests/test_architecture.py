"""The shape of the code: layers, cycles, names of files, and what an import costs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import aclip

ROOT = Path(aclip.__file__).parent

# Lowest first. A part imports from lower levels alone, never from its own or a higher one.
LEVELS = (
    {"errors", "logs", "version"},
    {"devices", "files", "rng", "tokens"},
    {"config", "dist", "structs"},
    {"checkpoint", "run_folder"},
    {"masking", "ema", "data"},
    {"models"},
    {"objectives"},
    {"plan"},
    {"method"},
    {"recipes", "report", "training"},
    {"describe", "evaluation", "examination", "explanation", "exporters"},
    {"search", "trainer"},
    {"bench", "encoding", "merging", "overfit", "runs"},
    {"comparison", "machine"},
    {"cli"},
    {"__main__", "__init__"},
)
LEVEL = {part: level for level, parts in enumerate(LEVELS) for part in parts}
# Parts that may import less than all of the lower levels, besides themselves.
NARROWER = {"recipes": {"config", "errors"}, "__main__": {"cli"}}

MODULES = {
    ".".join(["aclip", *path.relative_to(ROOT).with_suffix("").parts]).removesuffix(".__init__"): path
    for path in sorted(ROOT.rglob("*.py"))
}


def imported_modules(name: str) -> set[str]:
    """Return the project's modules that a module imports, inside functions too (names of types excepted)."""
    found: set[str] = set()
    package = name if MODULES[name].name == "__init__.py" else name.rpartition(".")[0]
    for node in without_type_checking(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: import by full name, not relative to {package}"
            parent = node.module or ""
            targets = [
                f"{parent}.{alias.name}" if f"{parent}.{alias.name}" in MODULES else parent for alias in node.names
            ]
        else:
            continue
        found |= {target for target in targets if target in MODULES}
    return found - {name}


def without_type_checking(tree: ast.AST) -> list[ast.AST]:
    """Return all nodes but those below `if TYPE_CHECKING:`."""
    nodes = [tree]
    for child in ast.iter_child_nodes(tree):
        if not (isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"):
            nodes += without_type_checking(child)
    return nodes


IMPORTS = {name: imported_modules(name) for name in MODULES}


def part_of(module: str) -> str:
    """Return the part of the project that a module belongs to: `aclip.data.views` -> `data`."""
    return module.split(".")[1] if "." in module else "__init__"


@pytest.mark.parametrize("part", sorted({part_of(name) for name in MODULES}))
def test_imports_come_from_lower_levels(part: str) -> None:
    assert part in LEVEL, f"aclip.{part} has no level: give it one here and in the documentation"
    for name in (m for m in MODULES if part_of(m) == part):
        for target in (part_of(t) for t in IMPORTS[name]):
            if target == "__init__":
                assert part in ("cli", "__main__"), f"{name} imports the package's facade"
            elif target != part:
                assert LEVEL[target] < LEVEL[part], f"{name} imports {target}, which is not below {part}"
                assert target in NARROWER.get(part, LEVEL), f"{name} imports {target}"


def test_there_are_no_cycles() -> None:
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"cycle: {' -> '.join((*path, name))}"
        if name not in done:
            for target in sorted(IMPORTS[name]):
                visit(target, (*path, name))
            done.add(name)

    for name in MODULES:
        visit(name, ())
    assert done == set(MODULES)


def test_imports_were_found() -> None:
    assert "aclip.masking.base" in IMPORTS["aclip.masking.attentive"]  # from a.b import name
    assert "aclip.dist" in IMPORTS["aclip.objectives.functional"]  # from a import b
    assert "aclip.runs" in IMPORTS["aclip.cli"]  # inside a function


@pytest.mark.parametrize("name", MODULES)
def test_module_is_named_for_what_it_does_and_says_so(name: str) -> None:
    last = name.rpartition(".")[2]
    assert last not in {"utils", "util", "helpers", "misc", "common"}
    assert not last.startswith("legacy")
    text = MODULES[name].read_text()
    assert not text.strip() or ast.get_docstring(ast.parse(text))


HEAVY = {"torch", "torchvision", "timm", "wandb", "open_clip", "kornia", "numpy"}


@pytest.mark.parametrize(
    "code",
    [
        "import aclip",
        "import aclip; aclip.__version__; dir(aclip)",
        "from aclip.cli import main; main(['--help'])",
        "from aclip.cli import main; main(['--version'])",
        "from aclip.cli import main; main(['train', '--help'])",
    ],
)
def test_nothing_heavy_is_imported(code: str) -> None:
    report = f"import atexit, sys; atexit.register(lambda: print('loaded:', *{HEAVY} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", f"{report}\n{code}"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].strip() == "loaded:"


def test_public_names_resolve() -> None:
    for name in aclip.__all__:
        assert getattr(aclip, name) is not None
    assert set(aclip.__all__) <= set(dir(aclip))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = aclip.nothing
