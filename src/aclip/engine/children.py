"""Several commands at once as child processes: their logs, their end, and how they are stopped."""

import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from aclip.engine.stop import StopRequest

SECONDS_BETWEEN_LOOKS = 0.2


@dataclass(frozen=True)
class Job:
    """Commands that are run one after the other, each only if the one before it succeeded.

    Attributes:
        name: how the caller knows it.
        commands: program and arguments.
        log: what they say is added to this file, standard error included.
    """

    name: str
    commands: tuple[tuple[str, ...], ...]
    log: Path


@dataclass
class Child:
    """A job at work."""

    job: Job
    log: IO[bytes]
    left: deque[tuple[str, ...]]
    slot: int  # its place among those at work
    process: "subprocess.Popen[bytes]"
    begun: int  # where in the log the command at work begins


@dataclass
class Children:
    """Runs jobs, a few at a time.

    Attributes:
        at_once: how many.
        environment: of the children.
        keep_open: file descriptors that they inherit.
        slots: what the environments have besides, in turns by the jobs' places among those at work; none is the same
            for all.
        stopped: whether SIGINT or SIGTERM ended the work early.
    """

    at_once: int
    environment: Mapping[str, str]
    keep_open: tuple[int, ...] = ()
    slots: Sequence[Mapping[str, str]] = ()
    stopped: bool = field(default=False, init=False)

    def work(
        self,
        jobs: Sequence[Job],
        ended: Callable[[Job, str | None], None],
        watch: Callable[[list[str]], None],
        stopping: Callable[[list[str]], None],
    ) -> None:
        """Run all jobs; those that fail do not keep the others from their work.

        After SIGINT or SIGTERM no more jobs are started, those at work get one SIGTERM, on which a training run
        saves a checkpoint, and are waited for; `stopped` then is True. A second SIGINT kills them.

        Args:
            jobs: in the order in which they are started.
            ended: called with each job that has come to its end, and what it failed of, or None; not with those
                that were stopped.
            watch: called several times a second with the names of the jobs at work.
            stopping: called once, with their names, when they have been asked to stop.
        """
        waiting = deque(jobs)
        running: list[Child] = []
        with StopRequest() as stop:
            try:
                while running or (waiting and not stop.requested):
                    while waiting and len(running) < self.at_once and not stop.requested:
                        taken = {child.slot for child in running}
                        slot = next(number for number in range(self.at_once) if number not in taken)
                        running.append(self._start(waiting.popleft(), slot))
                    watch([child.job.name for child in running])
                    time.sleep(SECONDS_BETWEEN_LOOKS)
                    if stop.requested and not self.stopped:
                        self.stopped = True
                        for child in running:
                            child.process.send_signal(signal.SIGTERM)
                        stopping([child.job.name for child in running])
                    running = [child for child in running if self._goes_on(child, ended)]
            finally:  # only a second signal, or an error of ours, leaves any of them
                for child in running:
                    child.process.kill()
                    child.process.wait()
                    child.log.close()
        self.stopped = stop.requested

    def _start(self, job: Job, slot: int) -> Child:
        job.log.parent.mkdir(parents=True, exist_ok=True)
        log = job.log.open("ab")
        left = deque(job.commands)
        return Child(job, log, left, slot, begun=log.tell(), process=self._run(left.popleft(), log, slot))

    def _run(self, command: tuple[str, ...], log: IO[bytes], slot: int) -> "subprocess.Popen[bytes]":
        own = self.slots[slot % len(self.slots)] if self.slots else {}
        # Unbuffered, or what a command printed before its error would come after it in the log, at its exit.
        # A session of its own: the terminal's Ctrl-C would reach it besides our signal, and the second one kills.
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                                env={**self.environment, **own, "PYTHONUNBUFFERED": "1"}, start_new_session=True,
                                pass_fds=self.keep_open)

    def _goes_on(self, child: Child, ended: Callable[[Job, str | None], None]) -> bool:
        """Return whether a job still works, after starting its next command if one has ended."""
        code = child.process.poll()
        if code is None:
            return True
        if code == 0 and child.left and not self.stopped:
            child.begun = child.job.log.stat().st_size  # children have moved the end, not our position
            child.process = self._run(child.left.popleft(), child.log, child.slot)
            return True
        child.log.close()
        if code == 0 and not child.left:
            ended(child.job, None)
        elif not self.stopped:
            said = last_words(child.job.log, child.begun)
            ended(child.job, f"{said or 'it said nothing'} (exit code {code})")
        return False


def last_words(log: Path, begun: int = 0) -> str:
    """Return the last line of a log that is not empty, of what was written after its first `begun` bytes."""
    lines = log.read_bytes()[begun:].decode("utf-8", errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "")
