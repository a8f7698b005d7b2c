"""Every benchmark runs, in its smallest form."""

import importlib
import io
import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import aclip
from aclip.data.packing import Sample, write_tar

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
SOURCE = Path(aclip.__file__).parents[1]
PARTS = {"checkouts", "competitors", "gpu_checks", "gpu_speed", "gpu_training"}  # imported by others
NOT_RUN = {"align", "reading", "gpu_bundle"}  # read fetched sets, or what a package brings
NEEDS = {"evaluation_parity": "clip_benchmark"}

IN_THIS_PROCESS = {
    "convolutional": "--data SHARD --validation test --steps 2 --batch-size 4 --styles 99",
    "checkpoint": "--model vit-micro --batch-size 2 --checkpoints 2",
    "evaluation_parity": "RUN --data SHARD --labelled SHARD --held-out SHARD",
    "forgetting": "RUN --data SHARD --new SHARD --old SHARD --methods clip --seeds 0 1 --epochs 0.25 --batch-size 8 "
                  "--output FOLDER/forgetting",
    "growth": "--size vit-micro --batch-size 2 --rounds 1 --device cpu --precision fp32 --output FOLDER/growth.svg "
              "--panels batch_size",
    "kept_on_object": "RUN --data SHARD",
    "maps": "--photos SHARD --objects 4 measure RUN --count 3",
    "parity": "--models vit-micro --formats open_clip",
    "parity_in": "vit-micro",
    "retrieval_memory": "--images 40 --captions 200 --width 16",
    "search": "search --count 300 --dim 16 --queries 3 --methods exact",
    "small_objects": "make FOLDER/cluttered --train 8 --test 4 --photos SHARD",
    "step": "--size vit-micro --batch-size 2 --rounds 2 --warmup 1 --parts 1 --device cpu --precision fp32 --text cut "
            "--methods clip a-clip",
    "teacher": "--model vit-micro --teacher vit-micro --batch-size 2 --rounds 2 --device cpu",
    "whole_or_masked": "RUN --data SHARD",
}
IN_PROCESSES = {
    "communication": "--recipes clip --batch-size 4 --ranks 2",
    "data": "--synthetic --images 384 --rounds 1",
    "data_memory": "--rows 2000 --samples 500 --passes 2 --workers 2",
    "equality": "--recipes clip",
    "first_step": "",
    "gpu": "--stages optimizers=2 attention=2 --tiny --device cpu --output FOLDER/gpu",
    "resume_data": "--shards 10 --pairs 12 --batch-size 12 --workers 1 --ranks 2 --outage 3",
    "soak": "--steps 6 --minutes 0 --kills 1 --pause 1 --signals-only --output FOLDER/soak --data SHARD SHARD",
    "step": "--against SOURCE --methods clip --models vit-micro --batch-size 2 --rounds 1 --turns 1 --precision fp32",
    "threads": "--model vit-micro --batch-size 2 --rounds 1 --turns 1 --busy 1",
}


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A folder, a shard of labelled cut-out images in it, and a run of two steps on them."""
    folder: Path = tmp_path_factory.mktemp("benchmarks")
    shard, run = folder / "train.tar", folder / "run"
    draw = np.random.default_rng(0)

    def image(number: int) -> bytes:
        pixels = draw.integers(0, 256, (32, 32, 4), dtype=np.uint8)
        pixels[..., 3] = 255 * (np.arange(32) < 16)
        encoded = io.BytesIO()
        Image.fromarray(pixels).save(encoded, "PNG")
        return encoded.getvalue()

    with shard.open("wb") as file:
        write_tar(file, (Sample(f"{n:03}", {
            "png": image(n), "json": b'{"captions": ["image %d"], "label": "class %d"}' % (n, n % 3),
        }) for n in range(64)))
    aclip.train(recipe="a-clip", model="vit-micro", data=str(shard), output=str(run), batch_size=8, samples=16,
                device="cpu", precision="fp32", workers=0)
    return {"RUN": str(run), "SHARD": str(shard), "FOLDER": str(folder), "SOURCE": str(SOURCE)}


def words(line: str, places: dict[str, str]) -> list[str]:
    for name, place in places.items():
        line = line.replace(name, place)
    return [word.replace("_", " ") if word == "batch_size" else word for word in line.split()]


def test_every_benchmark_is_listed() -> None:
    assert {path.stem for path in BENCHMARKS.glob("*.py")} == {*IN_THIS_PROCESS, *IN_PROCESSES, *PARTS, *NOT_RUN}


def test_those_that_are_not_run_are_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    for name in NOT_RUN:
        importlib.import_module(name)


@pytest.mark.parametrize("name", IN_THIS_PROCESS)
def test_runs(
    name: str, places: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(sys, "argv", [name, *words(IN_THIS_PROCESS[name], places)])
    runpy.run_path(str(BENCHMARKS / f"{name}.py"), run_name="__main__")
    assert name == "small_objects" or capsys.readouterr().out.strip()


@pytest.mark.slow
@pytest.mark.parametrize("name", IN_PROCESSES)
def test_runs_in_processes(name: str, places: dict[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / f"{name}.py"), *words(IN_PROCESSES[name], places)], capture_output=True,
        text=True, check=False, env=os.environ | {"PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1"}, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip()
