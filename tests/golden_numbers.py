"""Numbers of the public A-CLIP release, and how close to them is close enough."""

from pathlib import Path

import numpy as np
import torch

FILE = Path(__file__).parent / "golden" / "aclip_reference.npz"


class Golden:
    """Inputs and outputs of the release, executed on CPU in float32, by key.

    Attributes:
        errors: key -> largest difference found, relative to the largest golden value.
    """

    def __init__(self) -> None:
        self.errors: dict[str, float] = {}
        with np.load(FILE) as file:
            self._arrays = dict(file)

    def __getitem__(self, key: str) -> torch.Tensor:
        return torch.from_numpy(self._arrays[key].copy())

    def check(self, key: str, ours: torch.Tensor, tolerance: float = 1e-5) -> None:
        """Assert max |ours - golden| <= tolerance x max |golden|."""
        golden = self[key].double()
        assert ours.shape == golden.shape, key
        error = float((ours.detach().double() - golden).abs().max() / golden.abs().max())
        self.errors[key] = max(error, self.errors.get(key, 0.0))
        assert error <= tolerance, f"{key}: off by {error:.2g} of the largest value"
