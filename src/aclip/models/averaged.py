"""The moving average of an image tower, which a run's checkpoints hold beside the trained weights."""

from pathlib import Path

from safetensors import SafetensorError
from torch import nn

from aclip.errors import CheckpointError
from aclip.tensor_files import StoredTensors

_PREFIX = "method/ema_visual."


def load_average(visual: nn.Module, checkpoints: Path) -> None:
    """Give an image tower the moving average that the newest checkpoint holds; nothing else of it is read.

    Args:
        visual: the tower, as it was trained.
        checkpoints: a run's folder of them.

    Raises:
        CheckpointError: no checkpoint, a damaged one, or a recipe that keeps no average.
    """
    found = sorted(checkpoints.glob("step-*[0-9]"))
    if not found:
        raise CheckpointError(f"there is no checkpoint in {checkpoints}")
    load_average_at(visual, found[-1])


def load_average_at(visual: nn.Module, step: Path) -> None:
    """Give an image tower the moving average that one checkpoint, a folder `step-XXXXXXXX`, holds.

    Raises:
        CheckpointError: a damaged one, or a recipe that keeps no average.
    """
    try:
        stored = StoredTensors.of_folder(step)
        average = {name.removeprefix(_PREFIX): stored[name] for name in stored if name.startswith(_PREFIX)}
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise CheckpointError(f"the checkpoint {step} cannot be read: {error}") from error
    if not average:
        raise CheckpointError(f"the run in {step.parent.parent} keeps no moving average: use online weights")
    try:
        visual.load_state_dict(average)
    except RuntimeError as error:
        raise CheckpointError(f"the moving average in {step} is of another image tower: {error}") from error
