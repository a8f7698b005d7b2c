"""What a comparison runs in processes of their own: the timing of steps, and training."""

import itertools
import logging
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from aclip import data
from aclip.bench import summary, time_in_turns
from aclip.comparison.runs import BASELINE, NOMINAL_STEPS, PlannedRun, Stage, stages_of
from aclip.config import RunConfig, to_dict
from aclip.devices import choose_device
from aclip.errors import AclipError, ConfigError
from aclip.evaluation import evaluate
from aclip.evaluation.sets import is_probe
from aclip.run_folder import RunFolder
from aclip.runs import train
from aclip.trainer import Trainer, build_trainer, open_batches

WARMUP_ROUNDS, TIMED_BATCHES = 3, 4


def start(log: Path, threads: int, gpu: str | None, target: Callable[..., None], *arguments: Any) -> Any:
    """Start a process whose output goes to a log, with these threads and, if there are several, this GPU.

    It ignores Ctrl-C, which reaches all processes of a terminal: this one stops it.
    """
    environment = {"OMP_NUM_THREADS": str(threads)} | ({"CUDA_VISIBLE_DEVICES": gpu} if gpu is not None else {})
    log.parent.mkdir(parents=True, exist_ok=True)
    before = {key: os.environ.get(key) for key in environment}
    in_main = threading.current_thread() is threading.main_thread()
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN) if in_main else None
    os.environ.update(environment)
    try:
        process = multiprocessing.get_context("spawn").Process(target=_in_process, args=(log, target, arguments))
        process.start()
    finally:
        for key, value in before.items():
            os.environ.pop(key) if value is None else os.environ.update({key: value})
        if in_main:
            signal.signal(signal.SIGINT, handler)
    return process


def _in_process(log: Path, target: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    """Run `target` with its output in a log, and stop when the parent is gone."""
    descriptor = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    _lock(descriptor)  # a process that a killed comparison left behind may still be saving the same run
    os.ftruncate(descriptor, 0)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    logging.basicConfig(format="aclip: %(message)s")
    logging.getLogger("aclip").setLevel(logging.INFO)
    threading.Thread(target=_stop_without_parent, daemon=True).start()
    try:
        target(*arguments)
    except AclipError as error:
        sys.stderr.write(f"aclip: {error}\n")
        sys.exit(1)
    except KeyboardInterrupt as interrupt:
        sys.stderr.write(f"aclip: {interrupt or 'interrupted'}\n")
        sys.exit(130)


def _stop_without_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)


def train_run(run: PlannedRun, probe: str | None) -> None:
    """Train a run to its end, and measure what is missing."""
    if not run.folder.final.is_dir():
        train(run.config, resume=True)
    for wanted, specs in ((run.in_training, run.config.validation), (run.afterwards, run.later)):
        names = tuple(sorted({evaluator for _, evaluator in run.missing(wanted)}))
        if names:
            evaluate(run.config.output, data=specs, evaluators=names, device=run.config.device,
                     train=probe if any(map(is_probe, names)) else None, workers=run.config.workers)


def time_steps(folder: RunFolder, configs: Mapping[str, RunConfig], rounds: int, num_pairs: int) -> None:
    """Time optimizer steps of all configurations in turns, on batches that are read already; write `timing.json`."""
    baseline = configs[BASELINE]
    source, device = data.open_training(baseline.data), choose_device(baseline.device)
    steps: dict[str, Callable[[], object]] = {}
    stages: dict[str, tuple[Stage, ...]] = {}
    for name, config in configs.items():
        trainer = build_trainer(replace(config, samples=NOMINAL_STEPS * (config.batch_size or 1)), num_pairs, device)
        batches = [batch.to(device) for batch in itertools.islice(open_batches(trainer, source, 0), TIMED_BATCHES)]
        stages[name] = stages_of(config, trainer.method.plan, num_pairs)
        steps |= {stage.label(name): _step(trainer, stage, itertools.cycle(batches)) for stage in stages[name]}
    times = time_in_turns(steps, warmup=WARMUP_ROUNDS, rounds=rounds, device=device)
    measured = {label: summary(seconds) for label, seconds in times.items()}
    parts = {name: [{"share": s.share, "seconds": measured[s.label(name)]["median"]} for s in of_run]
             for name, of_run in stages.items()}
    average = {name: sum(part["share"] * part["seconds"] for part in of_run) for name, of_run in parts.items()}
    folder.write_json("timing.json", {
        "configs": {name: to_dict(config) for name, config in configs.items()}, "threads": torch.get_num_threads(),
        "device": str(device), "batch_size": baseline.batch_size, "warmup_rounds": WARMUP_ROUNDS, "rounds": rounds,
        "steps": measured, "stages": parts, "step_seconds": average,
        "relative": {name: value / average[BASELINE] for name, value in average.items()}})


def _step(trainer: Trainer, stage: Stage, batches: Iterator[Any]) -> Callable[[], object]:
    return lambda: trainer.train_step(next(batches), masked=stage.masked, resolution=stage.resolution)


@contextmanager
def ended(processes: Sequence[Any]) -> Iterator[None]:
    """At the end of this context, stop the processes that still run, and wait for them."""
    try:
        yield
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.join()


def gpus_of(device: str) -> list[str]:
    """Return what CUDA_VISIBLE_DEVICES calls the GPUs here, if there are several and `device` names none of them."""
    number = torch.cuda.device_count() if device in ("auto", "cuda") else 0
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = listed.split(",") if listed else list(map(str, range(number)))
    return [name.strip() for name in names[:number]] if number > 1 else []


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep a second comparison out of the folder."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("w")
    except OSError as error:
        raise ConfigError(f"cannot write the comparison's folder {folder}: {error.strerror}") from error
    with file:
        try:
            _lock(file.fileno(), wait=False)
        except BlockingIOError as error:
            raise ConfigError(f"another comparison is running in {folder}: wait for it, or stop it") from error
        yield


def _lock(descriptor: int, *, wait: bool = True) -> None:
    """Lock a file until it is closed, where the system can."""
    with suppress(ImportError):  # Windows
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
