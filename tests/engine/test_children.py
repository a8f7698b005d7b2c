"""Jobs in child processes: at once, in order, failing, stopped."""

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from aclip.engine.children import Children, Job, last_words


def python(code: str) -> tuple[str, ...]:
    return sys.executable, "-c", code


class Witness:
    """Remembers what it was told."""

    def __init__(self) -> None:
        self.ends: dict[str, str | None] = {}
        self.at_work: list[list[str]] = []
        self.stops: list[list[str]] = []

    def ended(self, job: Job, error: str | None) -> None:
        assert job.name not in self.ends
        self.ends[job.name] = error

    def work(self, children: Children, jobs: list[Job]) -> None:
        children.work(jobs, self.ended, self.at_work.append, self.stops.append)


def test_a_failure_is_told_with_its_last_words_and_keeps_nobody_from_their_work(tmp_path: Path) -> None:
    jobs = [
        Job("good", (python("print('first')"), python("print('second')")), tmp_path / "logs" / "good.log"),
        Job("bad", (python("import sys; print('well'); sys.exit('it broke')"), python("print('never')")),
            tmp_path / "logs" / "bad.log"),
        Job("silent", (python("raise SystemExit(3)"),), tmp_path / "logs" / "silent.log"),
    ]
    witness, children = Witness(), Children(1, os.environ)
    witness.work(children, jobs)
    assert witness.ends == {"good": None, "bad": "it broke (exit code 1)",
                            "silent": "it said nothing (exit code 3)"}
    assert (tmp_path / "logs" / "good.log").read_text() == "first\nsecond\n"
    assert "never" not in (tmp_path / "logs" / "bad.log").read_text()
    assert not children.stopped
    assert max(map(len, witness.at_work)) == 1


def test_jobs_run_at_once_with_the_environment_given(tmp_path: Path) -> None:
    """Each waits for the other's file: one at a time they would wait forever."""
    def waits(own: str, other: str) -> tuple[str, ...]:
        return python(f"import os, pathlib, time\npathlib.Path(os.environ['PLACE'], '{own}').touch()\n"
                      f"while not pathlib.Path(os.environ['PLACE'], '{other}').exists(): time.sleep(0.01)")

    witness = Witness()
    witness.work(Children(2, os.environ | {"PLACE": str(tmp_path)}),
                 [Job("a", (waits("1", "2"),), tmp_path / "a.log"), Job("b", (waits("2", "1"),), tmp_path / "b.log")])
    assert witness.ends == {"a": None, "b": None}
    assert ["a", "b"] in witness.at_work


def test_slots_are_taken_in_turns_and_again_when_they_are_free(tmp_path: Path) -> None:
    """Three at a time over two slots; the fourth job has the slot of the one that ended, in both of its commands."""
    def tells(*others: str) -> tuple[str, ...]:
        return python(f"import os, pathlib, time\nprint(os.environ['GPU'])\nplace = pathlib.Path({str(tmp_path)!r})\n"
                      f"while not all((place / name).exists() for name in {others}): time.sleep(0.01)")

    def touch(name: str) -> tuple[str, ...]:
        return python(f"import pathlib; pathlib.Path({str(tmp_path)!r}, {name!r}).touch()")

    jobs = [Job("a", (tells("d"),), tmp_path / "a.log"), Job("b", (tells(),), tmp_path / "b.log"),
            Job("c", (tells("d"),), tmp_path / "c.log"), Job("d", (tells(), tells(), touch("d")), tmp_path / "d.log")]
    witness = Witness()
    witness.work(Children(3, os.environ, slots=[{"GPU": "first"}, {"GPU": "second"}]), jobs)
    assert set(witness.ends.values()) == {None}
    told = {job.name: job.log.read_text().split() for job in jobs}
    assert told == {"a": ["first"], "b": ["second"], "c": ["first"], "d": ["second", "second"]}


def interrupt_when(path: Path) -> None:
    def wait() -> None:
        deadline = time.monotonic() + 60
        while not path.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=wait, daemon=True).start()


def test_an_interrupt_stops_them_gently_and_starts_no_more(tmp_path: Path) -> None:
    gentle = python(f"import pathlib, signal, sys, time\n"
                    f"signal.signal(signal.SIGTERM, lambda *_: (print('saved'), sys.exit(130)))\n"
                    f"pathlib.Path({str(tmp_path / 'ready')!r}).touch()\n"
                    "time.sleep(60)")
    jobs = [Job("at work", (gentle, python("print('never')")), tmp_path / "a.log"),
            Job("waiting", (python("print('never')"),), tmp_path / "b.log")]
    interrupt_when(tmp_path / "ready")
    witness, children = Witness(), Children(1, os.environ)
    before = signal.getsignal(signal.SIGINT)
    witness.work(children, jobs)
    assert children.stopped
    assert witness.stops == [["at work"]]
    assert witness.ends == {}  # stopped is not failed
    assert (tmp_path / "a.log").read_text() == "saved\n"
    assert not (tmp_path / "b.log").exists()
    assert signal.getsignal(signal.SIGINT) is before


def test_an_error_of_the_caller_leaves_no_child_behind(tmp_path: Path) -> None:
    def watch(_: list[str]) -> None:
        if (tmp_path / "pid").exists():
            raise RuntimeError("of the caller")

    code = python(f"import os, pathlib, time\np = pathlib.Path({str(tmp_path)!r})\n"
                  "(p / 'part').write_text(str(os.getpid())); (p / 'part').rename(p / 'pid'); time.sleep(60)")
    witness = Witness()
    with pytest.raises(RuntimeError, match="of the caller"):
        Children(1, os.environ).work([Job("a", (code,), tmp_path / "a.log")], witness.ended, watch, print)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_last_words_are_the_last_line_with_any(tmp_path: Path) -> None:
    (tmp_path / "log").write_bytes(b"one\ntw\xffo \n\n  \n")
    assert last_words(tmp_path / "log") == "tw\N{REPLACEMENT CHARACTER}o"
    (tmp_path / "log").write_bytes(b"\n")
    assert last_words(tmp_path / "log") == ""


def test_last_words_are_those_of_the_command_that_failed(tmp_path: Path) -> None:
    (tmp_path / "log").write_bytes(b"done\n")
    assert last_words(tmp_path / "log", begun=5) == ""
    witness = Witness()
    job = Job("killed", (python("print('done')"), python("raise SystemExit(9)")), tmp_path / "killed.log")
    witness.work(Children(1, os.environ), [job])
    assert witness.ends == {"killed": "it said nothing (exit code 9)"}
