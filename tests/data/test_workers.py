"""Reading ahead: in order, lazily, errors as they were raised, and an end that comes at once, whatever happens."""

import itertools
import logging
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from aclip.data import workers
from aclip.data.workers import _report, read_ahead, suitable_workers
from aclip.errors import ConfigError, DataError


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


def test_a_negative_number_of_workers_is_refused_at_once() -> None:
    sentence = r"workers must be 0 \(read in the main process\) or more, not -1"
    with pytest.raises(ConfigError, match=sentence):
        read_ahead(refuse_seven, range(10), workers=-1)
    with pytest.raises(ConfigError, match=sentence):
        suitable_workers(torch.device("cpu"), -1)


def own_process(number: int) -> tuple[int, int]:
    return number, os.getpid()


def test_signals_to_the_process_group_are_left_to_the_parent() -> None:
    """torchrun sends SIGTERM to a process and its loader workers alike; the process saves first."""
    answers = read_ahead(own_process, range(100), workers=1)
    _, worker = next(iter(answers))
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        os.kill(worker, number)
    assert [number for number, _ in answers] == list(range(1, 100))


def sleep_from_three_on(number: int) -> int:
    if number >= 3:
        time.sleep(60)
    return number


def test_workers_in_a_long_read_end_with_the_iteration() -> None:
    answers = read_ahead(sleep_from_three_on, range(10), workers=2)
    assert list(itertools.islice(answers, 3)) == [0, 1, 2]
    begun = time.monotonic()
    answers.close()  # type: ignore[attr-defined]
    assert time.monotonic() - begun < 4
    assert multiprocessing.active_children() == []


SLEEPER = """
    import sys, time
    from aclip.data.workers import read_ahead
    def read(number):
        if number:
            time.sleep(60)
        return number
    for _ in read_ahead(read, range(5), workers=2):
        {then}
"""


@pytest.mark.parametrize("then", ["sys.exit(3)", "import os, signal; os.kill(os.getpid(), signal.SIGTERM)",
                                  "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"])
def test_a_program_leaves_at_once_in_the_middle_of_a_long_read(then: str) -> None:
    program = [sys.executable, "-c", textwrap.dedent(SLEEPER.format(then=then))]
    begun = time.monotonic()
    # the pipes close when the last worker has gone, too
    found = subprocess.run(program, capture_output=True, text=True, timeout=50, check=False)
    assert time.monotonic() - begun < 25
    assert found.returncode in (3, -signal.SIGTERM, -signal.SIGKILL)
    assert "Traceback" not in found.stderr


def kill_itself(number: int) -> int:
    if number == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def test_a_killed_worker_ends_the_iteration_in_a_sentence() -> None:
    with pytest.raises(DataError, match=r"a loader worker was killed, .* memory ran out: lower '--workers'"):
        list(read_ahead(kill_itself, range(10), workers=1))


def test_a_killed_worker_is_reported_wherever_the_main_thread_is() -> None:
    answers = read_ahead(own_process, range(100), workers=1)
    _, worker = next(iter(answers))
    with pytest.raises(DataError, match="a loader worker was killed"):  # noqa: PT012 - the signal arrives at any point
        os.kill(worker, signal.SIGKILL)
        time.sleep(5)
    answers.close()  # type: ignore[attr-defined]


def test_any_thread_may_read() -> None:
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.extend(read_ahead(double_slowly, range(20), workers=2)))
    thread.start()
    thread.join(30)
    assert found == list(range(0, 40, 2))


class LookUp:
    """Tells whether its array is still where the parent had it: shared, not copied."""

    def __init__(self) -> None:
        self.values = np.arange(1_000_000)
        self.address = self.values.ctypes.data

    def __call__(self, number: int) -> tuple[int, bool]:
        return int(self.values[number]), self.values.ctypes.data == self.address


@pytest.mark.skipif(sys.platform != "linux", reason="other systems spawn")
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_workers_share_the_index_whatever_the_start_method(method: str) -> None:
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method(method, force=True)
    try:
        answers = list(read_ahead(LookUp(), range(999_000, 999_010), workers=1))
    finally:
        multiprocessing.set_start_method(before, force=True)
    assert answers == [(number, True) for number in range(999_000, 999_010)]


SMALL_SHM = """
    import logging, torch
    from aclip.data.workers import read_ahead
    logging.basicConfig()
    def read(number):
        return {"pixels": torch.full((1_000_000,), number), "more": [torch.tensor(number)]}
    for number, answer in enumerate(read_ahead(read, range(9), workers=2)):
        assert answer["pixels"].tolist() == [number] * 1_000_000, number
        assert answer["more"] == [number]
    print("complete")
"""


@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs a mount namespace")
@pytest.mark.parametrize(("size", "message"), [("4m", "complete"), ("4k", "workers cannot be started")])
def test_a_small_dev_shm_is_no_hang(size: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "read.py").write_text(textwrap.dedent(SMALL_SHM))
    mount = f"mount -t tmpfs -o size={size} tmpfs /dev/shm"
    command = ["unshare", "-m", "sh", "-c", f"{mount} || exit 77; exec {sys.executable} {tmp_path}/read.py"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    if found.returncode == 77 or "unshare" in found.stderr:
        pytest.skip("mounting is not allowed here")
    assert message in found.stdout + found.stderr
    assert "/dev/shm has no room for batches" in found.stderr
    assert "--workers 0" in found.stderr


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
])  # fmt: skip
def test_cores_are_shared_with_the_training_and_with_other_processes(
    device: str, cores: int, processes: str | None, suitable: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "usable_cores", lambda: cores)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if processes is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
    assert suitable_workers(torch.device(device)) == suitable
    assert suitable_workers(torch.device(device), 0) == 0
