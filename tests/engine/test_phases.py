"""What is refused, and what is said, of all phases of a run before its first step."""

import io
from dataclasses import replace

import pytest
import torch
from made_training import build
from rich.console import Console
from rich.table import Table

from aclip.cli.compose import print_header
from aclip.engine.trainer import Trainer
from aclip.errors import ConfigError


def phased(recipe: str, *sizes: float) -> Trainer:
    """Return a trainer whose run begins with small images."""
    trainer = build(recipe)
    phases = tuple((number + 1, size) for number, size in enumerate(sizes))
    return Trainer(trainer.config, trainer.method, replace(trainer.timetable, resolutions=phases), torch.device("cpu"))


def test_a_phase_that_would_train_on_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="pass 'masked' removes none of its 1 x 1 grid"):
        phased("mae", 0.5, 0.125)
    assert list(phased("mae", 0.5, 0.25).plans) == [0.5, 0.25, 1.0]


def test_notes_of_every_phase_are_said() -> None:
    trainer, said = phased("attentive-2x50 passes.context.refresh=2", 0.25), io.StringIO()
    print_header(Console(file=said, width=200), trainer.config, trainer, Table(), 8)
    assert "at resolution 0.25: pass 'masked': mask_ratio 0.5 removes nothing of the 2 x 2 grid in" in said.getvalue()
    assert "serve for" not in said.getvalue()  # a note of all phases, which the run's table has
