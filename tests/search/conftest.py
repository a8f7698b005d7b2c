"""A model with random weights, saved where `aclip.load` finds it."""

from pathlib import Path

import pytest
from saved_models import save_model

from aclip import models
from aclip.models import LoadedModel


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model") / "random", seed=0)


@pytest.fixture(scope="session")
def model(model_folder: Path) -> LoadedModel:
    return models.load(model_folder)
