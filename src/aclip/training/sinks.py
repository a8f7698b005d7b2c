"""Where the records of metrics.jsonl also go: TensorBoard, Weights & Biases, MLflow; into the run's folder, offline.

To add one: a class with `log` and `close`, a line in `SINKS`, its name in `config.Sink`, an extra in pyproject.toml.
"""

import logging
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from aclip import dist
from aclip.config import RunConfig, to_dict
from aclip.errors import MissingDependencyError

_log = logging.getLogger(__name__)

PROJECT = "attentive-clip"


class Sink(Protocol):
    """Takes numbers by name, step by step. Built from a run's folder, the steps done, and its settings by path."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Take the numbers of one optimizer step."""

    def close(self) -> None:
        """Write what is still buffered."""


class TensorBoard:
    """Events in RUN/tensorboard; those of later steps, from before a resume, are hidden."""

    def __init__(self, folder: Path, step: int, settings: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(folder / "tensorboard", purge_step=step + 1)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """An offline run in RUN/wandb, for `wandb sync`; a resumed one has the same id. WANDB_MODE=online uploads it."""

    def __init__(self, folder: Path, step: int, settings: Mapping[str, Any]) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        earlier = sorted(folder.glob("wandb/*run-*-*"))
        self._run: Any = wandb.init(
            project=PROJECT, name=folder.name, dir=folder, id=earlier[-1].name.rpartition("-")[2] if earlier else None,
            config=dict(settings), mode=None if "WANDB_MODE" in os.environ else "offline",
            settings=wandb.Settings(console="off", silent=True, disable_git=True, x_disable_stats=True))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


class MLflow:
    """A run in RUN/mlflow.db, or at MLFLOW_TRACKING_URI; a resumed one goes on with it."""

    def __init__(self, folder: Path, step: int, settings: Mapping[str, Any]) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        from mlflow import MlflowClient

        uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{folder.resolve() / 'mlflow.db'}"
        self._client: Any = MlflowClient(tracking_uri=uri)
        found = self._client.get_experiment_by_name(PROJECT)
        experiment = found.experiment_id if found else self._client.create_experiment(PROJECT)
        tags = {"folder": str(folder.resolve())}
        quote = '"' if "'" in tags["folder"] else "'"
        earlier = self._client.search_runs([experiment], f"tags.folder = {quote}{tags['folder']}{quote}")
        self._run = (earlier or [self._client.create_run(experiment, run_name=folder.name, tags=tags)])[0].info.run_id
        if not earlier:
            for name, value in settings.items():
                self._client.log_param(self._run, name, value)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._client.log_batch(self._run, [Metric(name, value, now, step) for name, value in values.items()])

    def close(self) -> None:
        self._client.set_terminated(self._run)


SINKS: dict[str, Callable[[Path, int, Mapping[str, Any]], Sink]] = {
    "tensorboard": TensorBoard, "wandb": WeightsAndBiases, "mlflow": MLflow}


class Sinks:
    """All sinks of a run (`loggers`); none on other ranks than 0. MissingDependencyError without the package of one.

    One that fails is left out with a warning: training goes on.
    """

    def __init__(self, config: RunConfig, folder: Path, step: int) -> None:
        self._open: dict[str, Sink] = {}
        for name in config.loggers if dist.rank() == 0 else ():
            try:
                self._open[name] = SINKS[name](folder, step, _flat(to_dict(config)))
            except ImportError as error:
                raise MissingDependencyError(f"--loggers {name} needs its package: pip install 'attentive-clip[{name}]'"
                                             ) from error

    def log(self, record: Mapping[str, Any]) -> None:
        """Take a record of metrics.jsonl; the parts of the loss are named loss/PART."""
        values = {name: value for name, value in record.items() if name not in ("step", "parts")}
        values |= {f"loss/{part}": value for part, value in record["parts"].items()}
        self._each(lambda sink: sink.log(record["step"], values))

    def close(self) -> None:
        """Write what is still buffered."""
        self._each(lambda sink: sink.close())

    def _each(self, action: Callable[[Sink], None]) -> None:
        for name, sink in list(self._open.items()):
            try:
                action(sink)
            except Exception as error:  # of any library, or a full disk
                _log.warning("--loggers %s failed and is left out from here on: %s", name, error)
                del self._open[name]


def _flat(values: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{path}{name}.") if isinstance(value, dict) else {f"{path}{name}": value}
    return flat
