"""Sinks, each read back with its own library, offline; and what happens when one fails."""

import logging
import os
import struct
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import aclip
from aclip.config import RunConfig
from aclip.errors import MissingDependencyError
from aclip.training import sinks
from aclip.training.sinks import Sinks

RECORDS = [{"step": step, "loss": 1.0, "parts": {"contrastive": 2.0**-step}} for step in (1, 2, 3, 4)]
WRITTEN = {(step, 2.0**-step) for step in (1, 2, 3, 4)}


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_MODE", "MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID", "WANDB_RUN_ID"):
        monkeypatch.delenv(name, raising=False)


def config(*names: str) -> RunConfig:
    return aclip.configure(recipe="a-clip", data="pairs.csv", loggers=names)


def write(name: str, folder: Path) -> None:
    """Two steps, and two more after a resume."""
    for first in (0, 2):
        opened = Sinks(config(name), folder, first)
        for record in RECORDS[first: first + 2]:
            opened.log(record)
        opened.close()


def test_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write("tensorboard", tmp_path)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert {(e.step, e.value) for e in events.Scalars("loss/contrastive")} == WRITTEN


def wandb_history(file: Path) -> Iterator[dict[str, str]]:
    """Read the history from an offline file: 7 bytes, then blocks of 32 KiB as in LevelDB's log, a Record in each."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, offset, parts = file.read_bytes(), 7, b""
    while offset + 7 <= len(data):
        length, kind = struct.unpack_from("<HB", data, offset + 4)
        left = 32768 - offset % 32768
        if left < 7 or kind == 0:  # padding to the end of a block
            offset += left
            continue
        parts += data[offset + 7: offset + 7 + length]
        offset += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record, parts = Record.FromString(parts), b""
            if record.HasField("history"):
                yield {item.key or ".".join(item.nested_key): item.value_json for item in record.history.item}


@pytest.mark.skipif("ACLIP_TEST_WANDB" not in os.environ, reason="its service sometimes hangs or writes late: by hand")
def test_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    write("wandb", tmp_path / "run")
    files = sorted((tmp_path / "run").rglob("*.wandb"))
    assert len(files) == 2
    assert len({file.stem for file in files}) == 1  # one run for the server
    found = [(int(row["_step"]), float(row["loss/contrastive"])) for file in files for row in wandb_history(file)]
    assert set(found) == WRITTEN


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*noload.*")
def test_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    from mlflow import MlflowClient

    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    folder = tmp_path / "today's"
    folder.mkdir()
    write("mlflow", folder)
    client = MlflowClient(tracking_uri=f"sqlite:///{folder / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name(sinks.PROJECT).experiment_id])
    assert run.data.params["recipe.name"] == "a-clip"
    assert {(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "loss/contrastive")} == WRITTEN


def test_one_that_fails_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    steps: list[int] = []

    def failing(step: int, values: Mapping[str, Any]) -> None:
        raise OSError("no space left")

    monkeypatch.setitem(sinks.SINKS, "wandb", lambda *_: SimpleNamespace(log=failing, close=None))
    monkeypatch.setitem(sinks.SINKS, "mlflow", lambda *_: SimpleNamespace(
        log=lambda step, values: steps.append(step), close=lambda: None))
    opened = Sinks(config("wandb", "mlflow"), tmp_path, 0)
    with caplog.at_level(logging.WARNING):
        for record in RECORDS:
            opened.log(record)
        opened.close()
    assert steps == [1, 2, 3, 4]
    assert [r.getMessage() for r in caplog.records] == [
        "--loggers wandb failed and is left out from here on: no space left"]


def test_a_missing_package_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'attentive-clip\[wandb\]'"):
        Sinks(config("wandb"), tmp_path, 0)
