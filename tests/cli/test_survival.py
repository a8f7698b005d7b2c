"""`aclip train` under torchrun when processes are killed, and what it says about one batch."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from aclip.cli import main
from aclip.overfit import verdict
from made_pictures import captioned_noise

TIMINGS = ("samples_per_second", "data_wait")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 noisy images with captions."""
    return captioned_noise(tmp_path_factory.mktemp("images"), 24 * [(40, 40)])


def start(images: Path, run: Path) -> "subprocess.Popen[bytes]":
    """Start two ranks, which are started anew when one ends."""
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "3",
         "-m", "aclip", "train", "--recipe", "clip", "--model", "vit-micro", "--data", str(images), "--batch-size",
         "8", "--precision", "fp32", "--log-every", "1", "--workers", "1", "--epochs", "6", "--evaluate-every", "0",
         "--save-every", "0.3", "--output", str(run)],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def lines(run: Path, journal: str = "metrics") -> list[dict[str, Any]]:
    path = run / f"{journal}.jsonl"
    found = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [{key: value for key, value in record.items() if key not in TIMINGS} for record in found]


@pytest.mark.slow
def test_a_killed_rank_is_started_anew_and_the_run_ends_as_if_nothing_had_been(images: Path, tmp_path: Path) -> None:
    alone = start(images, tmp_path / "alone")
    said = alone.communicate(timeout=300)[0].decode()
    assert alone.returncode == 0, said
    torchrun = start(images, tmp_path / "killed")
    children = Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children")
    for number, step in ((signal.SIGKILL, 5), (signal.SIGTERM, 11)):
        until = time.monotonic() + 240
        while max((r["step"] for r in lines(tmp_path / "killed")), default=0) < step:
            assert torchrun.poll() is None, torchrun.communicate()[0].decode()
            assert time.monotonic() < until
            time.sleep(0.02)
        os.kill(int(random.choice(children.read_text().split())), number)
    said = torchrun.communicate(timeout=300)[0].decode()
    assert torchrun.returncode == 0, said
    assert lines(tmp_path / "killed") == lines(tmp_path / "alone")
    assert "continue with aclip train --resume" in said
    weights = [(tmp_path / run / "final" / "open_clip_model.safetensors").read_bytes() for run in ("killed", "alone")]
    assert weights[0] == weights[1]


def test_one_batch_is_learned(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
                              monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    options = ["train", "--recipe", "clip", "--model", "vit-micro", "--data", str(images), "--batch-size", "8"]
    assert main([*options, "--overfit-one-batch", "25"]) == 0
    said = capsys.readouterr().out
    assert "the contrastive loss fell from" in said
    assert "chance is 2.08" in said
    assert not list(tmp_path.iterdir())
    phases = ["--unmasked-tuning", "0.1", "--unmasked-lr", "0.1", "--resolution-schedule", "0.5:0.5"]  # a run's alone
    assert main([*options, *phases, "--lr", "1e-9", "--overfit-one-batch", "5"]) == 1
    assert "does not even memorise it" in capsys.readouterr().err
    assert main([*options, "--overfit-one-batch", "0"]) == 2


def test_the_verdict_on_one_batch() -> None:
    assert verdict([4.0, 1.9], 4.2)[1]
    assert not verdict([4.0, 2.1], 4.2)[1]
    assert verdict([1.0, 0.89], None)[1]
    assert "learning rate is too high" in verdict([1.0, float("nan")], None)[0]
