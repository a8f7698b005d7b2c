"""Steps taken in turns."""

import time

import pytest
import torch

from aclip.engine.timing import summary, time_in_turns


def test_steps_are_taken_in_turns_and_warm_up_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    order: list[str] = []

    def step(name: str, seconds: float) -> None:
        order.append(name)
        clock[0] += seconds + len(order)  # later steps take longer, whoever takes them

    advanced: list[int] = []
    found = time_in_turns({"a": lambda: step("a", 0.1), "b": lambda: step("b", 0.2)}, warmup=1, rounds=2,
                          device=torch.device("cpu"), advance=lambda: advanced.append(1))
    assert "".join(order) == "ababab"
    assert found["a"] == pytest.approx([3.1, 5.1])
    assert found["b"] == pytest.approx([4.2, 6.2])
    assert len(advanced) == 6


def test_summary_by_hand() -> None:
    assert summary([4.0, 1.0, 3.0, 2.0, 5.0]) == {
        "median": 3.0, "first_quartile": 2.0, "third_quartile": 4.0, "rounds": 5}
    assert summary([2.0]) == {"median": 2.0, "first_quartile": 2.0, "third_quartile": 2.0, "rounds": 1}
