"""What is refused, and what is said, of all phases of a run before its first step."""

import io

import pytest
from rich.console import Console
from rich.table import Table
from synthetic_training import build

from aclip.describe import describe_run
from aclip.errors import ConfigError
from aclip.trainer import Trainer


def phased(recipe: str, *sizes: float) -> Trainer:
    """Return a trainer whose run begins with small images."""
    return build(recipe, resolutions=tuple((number + 1, size) for number, size in enumerate(sizes)))


def test_a_phase_that_would_train_on_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="pass 'masked' removes none of its 1 x 1 grid"):
        phased("mae", 0.5, 0.125)
    phased("mae", 0.5, 0.25)


def test_notes_of_every_phase_are_said() -> None:
    trainer, said = phased("attentive-2x50", 0.25), io.StringIO()
    describe_run(Console(file=said, width=200), trainer, Table(), 8)
    assert "at resolution 0.25: pass 'masked': mask_ratio 0.5 removes nothing of the 2 x 2 grid in" in said.getvalue()
