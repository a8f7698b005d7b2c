"""Fixtures of all tests; also turns on run-time checks of shapes and types in the numeric core."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import jaxtyping
import pytest
import torch

from golden_numbers import Golden

# Before the first import of aclip: every annotated shape of these packages is checked on every call.
# Integers pass for floats, as they do for mypy; beartype knows Self only in classes that it decorates itself.
jaxtyping.install_import_hook(
    ["aclip.masking", "aclip.objectives", "aclip.structs", "aclip.dist", "aclip.ema"],
    "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True, "
    "hint_overrides=beartype.FrozenDict({beartype.typing.Self: object})))",
)

torch.set_num_threads(1)


GOLDEN = Golden()


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep the user's cache out of the tests, and the tests out of it; programs that tests start inherit this."""
    os.environ["ACLIP_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def _own_log() -> Iterator[None]:
    """Undo what the command line does to the log, so that no test sees another's."""
    yield
    logger = logging.getLogger("aclip")
    logger.handlers.clear()
    logger.setLevel(logging.NOTSET)
    logger.propagate = True


@pytest.fixture(scope="session")
def golden() -> Golden:
    return GOLDEN


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--golden-errors", action="store_true", help="print the distance to every golden number")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if config.getoption("--golden-errors"):
        terminalreporter.section("largest difference / largest golden value")
        for key, error in sorted(GOLDEN.errors.items()):
            terminalreporter.write_line(f"{key:<45} {error:.1e}")


@pytest.fixture
def pair_folder(tmp_path: Path) -> Path:
    """Forty good pairs; the caption of `007.png` is "picture 7"."""
    from made_pictures import encode, picture  # imports aclip, after the hook above

    folder = tmp_path / "pairs"
    folder.mkdir()
    for number in range(40):
        (folder / f"{number:03}.png").write_bytes(encode(picture(number)))
        (folder / f"{number:03}.txt").write_text(f"picture {number}")
    return folder


@pytest.fixture
def without_type_checks() -> Iterator[None]:
    """Let values of a wrong type through to the code's own checks, as outside the tests."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
