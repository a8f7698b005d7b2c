"""The loop: one plain pass over batches, with everything that must happen around a step."""

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from typing import Any, NoReturn, Protocol

from aclip import dist
from aclip.engine import checkpoint
from aclip.engine.health import MOST_ROLLBACKS, ChanceLevel, Watch, say
from aclip.engine.saving import Saver
from aclip.engine.stop import Interrupted, StopRequest, below_launcher
from aclip.engine.trainer import Trainer
from aclip.errors import TrainingError
from aclip.run_folder import RunFolder
from aclip.structs import Batch, StepOutput

_log = logging.getLogger(__name__)


class Sink(Protocol):
    """Something that shows or stores the progress of a run: the terminal, TensorBoard."""

    def log(self, record: dict[str, Any]) -> None:
        """Take one line of metrics.jsonl."""

    def advance(self, step: int) -> None:
        """Take notice that optimizer step `step` is done."""


@dataclass
class Clock:
    """Where the time of the current logging interval went, in seconds."""

    started: float = field(default_factory=time.perf_counter)
    waited: float = 0.0
    samples: int = 0

    def rates(self) -> dict[str, float]:
        """Return samples per second and the share of time spent waiting for data."""
        elapsed = max(time.perf_counter() - self.started, 1e-9)
        return {"samples_per_second": self.samples / elapsed, "data_wait": self.waited / elapsed}


class BadSamples:
    """Journals bad samples by name, each once, whichever rank met them.

    Args:
        folder: its journal `skipped` tells which samples are known already.
    """

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder
        self._known = {record["key"] for record in folder.records("skipped")}
        self._met: list[dict[str, Any]] = []

    def note(self, batch: Batch, step: int) -> None:
        """Take notice of a batch that was used in optimizer step `step`."""
        self._met += [{"step": step, "key": key, "reason": reason} for key, reason in batch.skipped]

    def counts(self) -> dict[str, int]:
        """Journal what was met since the last call; return how many were met so far. All ranks must call it."""
        for record in (record for of_rank in dist.collect(self._met) for record in of_rank):
            if record["key"] not in self._known:
                self._known.add(record["key"])
                if dist.rank() == 0:
                    self._folder.append("skipped", record)
        self._met = []
        return {"skipped_samples": len(self._known)}


def fit(
    trainer: Trainer,
    open_batches: Callable[[], Iterable[Batch]],
    folder: RunFolder,
    sinks: Sequence[Sink],
    evaluate: Callable[[int], None],
) -> None:
    """Train to the end of the timetable, from wherever the trainer stands; on every rank of a run.

    Args:
        trainer: fresh, or restored from a checkpoint (`resume`).
        open_batches: returns the batches from the trainer's next step on, this rank's share of each.
        folder: where metrics and checkpoints go; rank 0 writes journals.
        sinks: what else hears of the progress, on this rank.
        evaluate: called with the number of steps done, every so often and at the end.

    Raises:
        Interrupted: on SIGINT, SIGTERM or SIGUSR1 to any rank, after saving a checkpoint; on all ranks together.
        TrainingError: the loss stays without a finite value; on all ranks together. Or the memory of one runs out.
    """
    with StopRequest(below_launcher(dist.world_size())) as stop, folder.patient():
        loop = _Loop(trainer, folder, sinks, evaluate, stop)
        try:
            if trainer.owes_evaluation:
                loop.evaluate()
            while trainer.step < trainer.timetable.total_steps:
                with closing(iter(open_batches())) as batches:  # type: ignore[type-var]
                    loop.run(batches)
        finally:
            loop.saver.close()


def resume(trainer: Trainer, folder: RunFolder) -> None:
    """Continue from the newest checkpoint that is whole, or from the start if none was ever written; on every rank.

    Damaged ones are told, journalled and renamed. Journals are cut back to the checkpoint.

    Raises:
        CheckpointError: all checkpoints are damaged, or they are of another model or recipe.
    """
    if dist.collect(bool(checkpoint.list_checkpoints(folder.checkpoints)))[0]:
        saved, damaged = checkpoint.load_newest(folder.checkpoints)
        trainer.restore(saved)
        if dist.rank() == 0:
            for path, reason in damaged:
                with suppress(OSError):  # a folder that cannot be written is told of when it is written to
                    checkpoint.put_away(path)
                folder.append("incidents", {"step": saved.step, "kind": "damaged_checkpoint", "name": path.name,
                                            "reason": reason})
                _log.warning("the checkpoint %s is damaged (%s): going on from the one before, of step %d", path.name,
                             reason, saved.step)
    if dist.collect(folder.final.exists())[0]:
        trainer.owes_evaluation = False  # a finished run's last checkpoint is from before its last evaluation
    if dist.rank() == 0:
        folder.rewind(trainer.step, evaluated=not trainer.owes_evaluation)
    dist.wait_for_all()


class _Loop:
    """One run of `fit`, and what it has to remember."""

    def __init__(self, trainer: Trainer, folder: RunFolder, sinks: Sequence[Sink], evaluate: Callable[[int], None],
                 stop: StopRequest) -> None:
        config, table = trainer.config, trainer.timetable
        self.trainer, self.folder, self.sinks, self._evaluate, self._stop = trainer, folder, sinks, evaluate, stop
        self.saver = Saver(folder.checkpoints, config.keep_checkpoints, config.keep_every * table.save_every)
        self._vote = dist.Vote()
        self._bad_samples = BadSamples(folder)
        self._watch = Watch(config.most_skipped, trainer.scaler, trainer.skipped_steps)
        self._chance = ChanceLevel(table.warmup_steps)
        self._clock = Clock()
        self._save_is_due = False
        self._rollbacks: dict[int, int] = {}

    def run(self, batches: Iterable[Batch]) -> None:
        """Train until the timetable or the batches end, or the state was rolled back."""
        trainer, table = self.trainer, self.trainer.timetable
        fetching = time.perf_counter()
        for batch in batches:
            self._clock.waited += time.perf_counter() - fetching
            lr, momentum = trainer.learning_rate(), trainer.ema_momentum()
            output = trainer.train_step(batch)
            step, last = trainer.step, trainer.step == table.total_steps
            self._clock.samples += batch.size * dist.world_size()
            self._bad_samples.note(batch, step)
            self._tell("advance", step)

            logs = step % trainer.config.log_every == 0 or last
            evaluates = last or (table.evaluate_every > 0 and step % table.evaluate_every == 0)
            stops = self._vote.cast(self._stop.requested)
            self._save_is_due |= evaluates or (table.save_every > 0 and step % table.save_every == 0)
            trainer.guard.note(step, batch.keys, trainer.measured)
            if self._look(all_of_them=logs or stops or self._save_is_due):
                self._roll_back(output)
                return
            if logs and self._watch.taken:
                self._log(output, lr, momentum)
            trainer.owes_evaluation = evaluates
            # steps may be skipped for weights that nothing should go back to
            if last or stops or (self._save_is_due and self._watch.in_a_row == 0):
                self._bad_samples.counts()  # a resume from here does not meet them again
                self.saver.save(trainer.at_rest())
                self._save_is_due = False
            if stops:
                self._leave()
            if evaluates:
                self.evaluate()
            fetching = time.perf_counter()
        self.saver.finish()
        self._report_failures()

    def evaluate(self) -> None:
        """Evaluate the state that was just saved; a request to stop is followed at once, for it can be done anew."""
        if dist.world_size() > 1:  # the ranks do not meet meanwhile to complete it
            self.saver.finish()
        if any(dist.collect(self._stop.requested)):
            self._leave()
        paused = time.perf_counter()
        try:
            with self._stop.at_once():
                self._evaluate(self.trainer.step)
        except Interrupted:
            self._leave(together=dist.world_size() == 1)
        except OSError as error:
            self._incident("evaluation_failed", f"the results after step {self.trainer.step} could not be written",
                           error)
        self.trainer.owes_evaluation = False
        self._clock.started += time.perf_counter() - paused

    def _look(self, *, all_of_them: bool) -> bool:
        """Act on what is known of the steps so far; return whether skipping has not helped."""
        incidents = self._watch.incidents(self.trainer.guard.readings(all_of_them=all_of_them))
        self.trainer.skipped_steps = self._watch.skipped
        if dist.rank() == 0:
            for incident in incidents:
                self.folder.append("incidents", incident)
            say(incidents, f"{self.folder.path}/incidents.jsonl")
        self.saver.advance()
        self._report_failures()
        return self._watch.too_many(last=self.trainer.step == self.trainer.timetable.total_steps)

    def _log(self, output: StepOutput, lr: float, momentum: float | None) -> None:
        """Write and show a line of metrics.jsonl."""
        record = self.trainer.record(output, lr, momentum) | self._bad_samples.counts() | {
            "skipped_steps": self._watch.skipped} | self._clock.rates()
        self._clock = Clock()
        if dist.rank() == 0:
            self.folder.append("metrics", record)
            self._tell("log", record)
            warning = self._chance.warning(record)
            if warning:
                _log.warning("%s", warning)

    def _roll_back(self, output: StepOutput) -> None:
        """Return to the newest checkpoint, and go on with the batches that come after those that were tried.

        Raises:
            TrainingError: there is none, or that has not helped before.
        """
        trainer, tried = self.trainer, self.trainer.batch_number
        self.saver.finish()
        self._report_failures()
        newest, _ = checkpoint.newest_good(self.folder.checkpoints)
        step = checkpoint.step_of(newest) if newest is not None else trainer.step
        self._rollbacks[step] = self._rollbacks.get(step, 0) + 1
        if newest is None or self._rollbacks[step] > MOST_ROLLBACKS:
            if newest is None:  # weights are as they were before the first skipped step
                self.saver.save(trainer.at_rest())
                self.saver.finish()
            parts = ", ".join(f"{name} {part.item():g}" for name, part in output.parts.items())
            raise TrainingError(
                f"the loss is no longer finite at step {trainer.step} ({parts}), and was not in the "
                f"{self._watch.in_a_row} steps up to it: try a lower --lr or --precision fp32; their samples are in "
                f"{self.folder.path}/incidents.jsonl, the newest checkpoint is of step {step}")
        self._incident("rolled_back", f"{self._watch.in_a_row} steps up to {trainer.step} had to be skipped: going "
                       f"back to step {step}, and on with other batches")
        trainer.restore(checkpoint.opened(newest))
        trainer.skipped_batches, trainer.skipped_steps = tried - trainer.step, self._watch.skipped
        trainer.owes_evaluation = False
        if dist.rank() == 0:
            self.folder.rewind(trainer.step)
        dist.wait_for_all()
        self._bad_samples = BadSamples(self.folder)  # those of the steps taken back are to be journalled anew
        trainer.guard.readings(all_of_them=True)
        self._watch.in_a_row, self._save_is_due, self._clock = 0, False, Clock()

    def _leave(self, *, together: bool = True) -> NoReturn:
        """Stop, once the state that was just saved is on the disk; where it is not, say what is."""
        if together:
            self.saver.finish()
        self._report_failures()
        step = self.trainer.step
        saved = [checkpoint.step_of(path) for path in checkpoint.list_checkpoints(self.folder.checkpoints)]
        newest = max((other for other in saved if other <= step), default=None)
        missing = "" if newest == step else " without a checkpoint of it"
        if missing and newest is not None:
            missing += f", the newest is of step {newest}"
        raise Interrupted(f"stopped after step {step} of {self.trainer.timetable.total_steps}{missing}; continue with "
                          f"aclip train --resume {self.folder.path}")

    def _report_failures(self) -> None:
        """Tell of checkpoints that could not be written."""
        for step, reason in self.saver.failures():
            self._incident("save_failed", f"the checkpoint of step {step} could not be written, training goes on and "
                           "tries again at the next", reason)

    def _incident(self, kind: str, what: str, reason: object = "") -> None:
        """Journal and say that something went wrong."""
        if dist.rank() == 0:
            self.folder.append("incidents", {"step": self.trainer.step, "kind": kind, "reason": str(reason) or what})
            _log.warning("%s%s", what, f": {reason}" if reason else "")

    def _tell(self, what: str, value: Any) -> None:
        """Tell all sinks; a log file on a full disk is no reason to stop."""
        for sink in self.sinks:
            with suppress(OSError):
                getattr(sink, what)(value)
