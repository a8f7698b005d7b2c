"""Reading ahead: in order, lazily, with errors as they were raised."""

import itertools
import logging
import os
import signal
import time
from collections.abc import Iterator

import pytest
import torch

from aclip.data import workers
from aclip.data.workers import _report, read_ahead, suitable_workers
from aclip.errors import DataError


def double_slowly(number: int) -> int:
    time.sleep(0.02 if number % 3 == 0 else 0.0)  # so that later requests are answered first
    return 2 * number


def refuse_seven(number: int) -> int:
    if number == 7:
        raise DataError("seven is bad")
    return number


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_answers_come_in_order(workers: int) -> None:
    assert list(read_ahead(double_slowly, range(20), workers=workers)) == list(range(0, 40, 2))


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_keeps_its_one_sentence_and_its_place(workers: int) -> None:
    answers: list[int] = []
    with pytest.raises(DataError, match=r"^seven is bad$"):
        answers.extend(read_ahead(refuse_seven, range(10), workers=workers))
    answers = list(itertools.islice(read_ahead(refuse_seven, range(10), workers=workers), 7))
    assert answers == list(range(7))


def test_endless_requests_are_drawn_as_needed() -> None:
    drawn: list[int] = []

    def requests() -> Iterator[int]:
        for number in itertools.count():
            drawn.append(number)
            yield number

    answers = read_ahead(refuse_seven, requests(), workers=1, prefetch=3)
    assert list(itertools.islice(answers, 5)) == [0, 1, 2, 3, 4]
    assert len(drawn) == 8  # those five, and three ahead
    answers.close()  # type: ignore[attr-defined]


def own_process(number: int) -> tuple[int, int]:
    return number, os.getpid()


def test_signals_to_the_whole_group_are_left_to_the_parent() -> None:
    """torchrun sends SIGTERM to a process and its loader workers alike; the process saves first."""
    answers = read_ahead(own_process, range(100), workers=1)
    _, worker = next(iter(answers))
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        os.kill(worker, number)
    assert [number for number, _ in answers] == list(range(1, 100))


def test_more_workers_than_cores_is_noted(caplog: pytest.LogCaptureFixture) -> None:
    count = workers.usable_cores() + 1
    with caplog.at_level(logging.WARNING, logger="aclip"):
        assert list(read_ahead(double_slowly, range(3), workers=count)) == [0, 2, 4]
    assert f"{count} loader workers share" in caplog.text


def test_a_worker_is_silent_about_a_parent_that_hung_up(capsys: pytest.CaptureFixture[str]) -> None:
    for error in (BrokenPipeError("gone"), EOFError(), ValueError("a real fault")):
        _report(type(error), error, None)
    assert capsys.readouterr().err == "ValueError: a real fault\n"


@pytest.mark.parametrize(("device", "cores", "processes", "suitable"), [
    ("cpu", 2, None, 1), ("cpu", 16, None, 4), ("cpu", 128, None, 8),
    ("cuda", 1, None, 1), ("cuda", 4, None, 3), ("cuda", 64, None, 8), ("cuda", 32, "8", 3), ("cuda", 4, "8", 1),
])
def test_cores_are_shared_with_the_training_and_with_other_processes(
    device: str, cores: int, processes: str | None, suitable: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "usable_cores", lambda: cores)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if processes is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
    assert suitable_workers(torch.device(device)) == suitable
    assert suitable_workers(torch.device(device), 0) == 0
