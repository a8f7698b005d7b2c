"""Step times of several methods, taken in turns so that whatever else the machine does meets all of them."""

import statistics
import time
from collections.abc import Callable, Mapping

import torch


def time_in_turns(
    steps: Mapping[str, Callable[[], object]], *, warmup: int, rounds: int, device: torch.device,
    advance: Callable[[], object],
) -> dict[str, list[float]]:
    """Return seconds of every step: rounds A B C, A B C, ..., after a few that are not counted.

    Args:
        steps: name -> does one step.
        warmup: rounds that are not counted. rounds: those that are.
        device: waited for before and after each step.
        advance: called after every step.
    """
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(warmup + rounds):
        for name, step in steps.items():
            _wait(device)
            begun = time.perf_counter()
            step()
            _wait(device)
            if number >= warmup:
                seconds[name].append(time.perf_counter() - begun)
            advance()
    return seconds


def summary(seconds: list[float]) -> dict[str, float]:
    """Return median and quartiles (inclusive method) of step times, and how many there are."""
    low, median, high = statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else seconds * 3
    return {"median": median, "first_quartile": low, "third_quartile": high, "rounds": len(seconds)}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
