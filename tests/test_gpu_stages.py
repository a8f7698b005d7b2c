"""What is to run on a GPU runs on a CPU, at the smallest sizes."""

import importlib
import io
import json
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import packages_distributions
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(scope="module", autouse=True)
def _importable() -> Iterator[None]:
    sys.path.insert(0, str(BENCHMARKS))
    yield
    sys.path.remove(str(BENCHMARKS))


@pytest.fixture
def gpu() -> ModuleType:
    return importlib.import_module("gpu")


def run(gpu: ModuleType, name: str, folder: Path, seconds: float = 600.0, **changes: Any) -> dict[str, list[Any]]:
    """Run a stage here; return its rows by table."""
    sizes = replace(gpu.TINY, **changes)
    bench = gpu.Bench("cpu", sizes, gpu.Results(folder / "results"), seconds, folder / "data")
    assert gpu.child(name, bench) == 0
    tables: dict[str, list[Any]] = {}
    for line in (folder / "results" / "results.jsonl").read_text().splitlines():
        row = json.loads(line)
        tables.setdefault(row.pop("table"), []).append(row)
    return tables


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Two small sets of pictures, as a bundle has them."""
    from aclip.data.packing import pack

    draw = np.random.default_rng(0)
    for name, count in (("some-train", 48), ("some-val", 12)):
        folder = tmp_path / "pairs" / name
        folder.mkdir(parents=True)
        for number in range(count):
            encoded = io.BytesIO()
            Image.fromarray(draw.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(encoded, "PNG")
            (folder / f"{number}.png").write_bytes(encoded.getvalue())
            (folder / f"{number}.txt").write_text(f"picture {number} of {name}")
        pack(str(folder), output=str(tmp_path / "data" / name), workers=0)
    return tmp_path


def test_devices_agree(gpu: ModuleType, tmp_path: Path) -> None:
    rows = run(gpu, "check", tmp_path)["recipes on the device"]
    assert [row["recipe"] for row in rows] == ["clip", "a-clip"]
    for row in rows:
        assert row["equal"]
        assert row["bf16: finite"]
        assert row["fp16: finite"]
        assert row["bf16: skipped of 6"] == 0
    assert rows[1]["masks"] == 1.0


def test_a_difference_is_noticed(gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checks = importlib.import_module("gpu_checks")
    monkeypatch.setattr(checks, "on", lambda encoded, device: replace(encoded, keep_indices=None if (
        encoded.keep_indices is None) else encoded.keep_indices.flip(-1) // 2))
    row = run(gpu, "check", tmp_path, check_recipes=("flip",))["recipes on the device"][0]
    assert not row["equal"]


def test_a_step_is_profiled(gpu: ModuleType, tmp_path: Path) -> None:
    tables = run(gpu, "profile", tmp_path)
    profile = {row["what"]: row["share"] for row in tables["profile of a step"]}
    assert profile["matrix products"] > 0
    assert sum(share for what, share in profile.items() if "all" not in what and "host" not in what) < 1.05
    assert tables["synchronisations inside a step"][0] == {"what": "set_sync_debug_mode", "count": "needs CUDA"}
    assert tables["parts of a step"][0]["online pass, ms"] > 0
    assert (tmp_path / "results" / "trace.json.gz").stat().st_size > 1000


def test_steps_are_timed_beside_those_of_open_clip(gpu: ModuleType, tmp_path: Path) -> None:
    tables = run(gpu, "steps", tmp_path)
    rows = {row["method"]: row for row in tables["steps"]}
    assert list(rows) == ["open_clip", "clip", "a-clip"]
    assert rows["open_clip"]["x open_clip"] == 1.0
    assert rows["a-clip"]["arithmetic"] > rows["clip"]["arithmetic"]
    assert all(row["MFU"] > 0 for row in rows.values())
    assert {row["method"] for row in tables["parts of a step"]} == {"clip", "a-clip"}


def test_compiled_steps_stand_beside_eager_ones(gpu: ModuleType, tmp_path: Path) -> None:
    with torch._dynamo.config.patch(disable=True):  # compiling is tested in test_distributed.py
        rows = run(gpu, "steps", tmp_path, step_methods=("clip",), compiles=True)["steps"]
    assert [row["method"] for row in rows] == ["open_clip", "clip", "open_clip, compiled", "clip, compiled"]


def test_the_batch_is_the_largest_that_fits(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    speed, gib = importlib.import_module("gpu_speed"), 2**30
    settings = speed.Settings("vit-micro", torch.device("cuda"), "bf16", False, 0, 14.0)
    # 2 GiB of weights and 0.01 GiB a pair are held between steps, and a step of slip takes 0.2 GiB a pair
    held = {64: 2.64 * gib, 128: 3.28 * gib}
    monkeypatch.setattr(speed, "memory_of_slip", lambda settings, watch: (
        held[settings.batch_size] + 0.2 * gib * settings.batch_size, held[settings.batch_size]))
    for total, batch_size in ((140, 320), (80, 128), (20, 64), (1000, 1024)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, total=total: (0, total * gib))
        assert speed.largest_batch(settings, None, others=8) == batch_size
        if batch_size not in (64, 1024):
            assert 9 * 2 + 9 * 0.01 * batch_size + 0.2 * batch_size < 0.92 * total


def test_optimizers_are_timed(gpu: ModuleType, tmp_path: Path) -> None:
    rows = run(gpu, "optimizers", tmp_path)["optimizers"]
    assert [row["update"].partition(",")[0] for row in rows] == [
        "AdamW", "AdamW", "torch's Muon", "aclip's Muon", "EMA update"]
    assert all(row["ms"] > 0 for row in rows)


def test_operations_are_compared(gpu: ModuleType, tmp_path: Path) -> None:
    tables = run(gpu, "attention", tmp_path)
    assert {row["what"] for row in tables["row of [CLS]"]} == {"attention, forward", "row of scores"}
    by_backend = {(row["tokens"], row["backend"]): row for row in tables["SDPA, forward and backward"]}
    assert by_backend[197, "MATH"]["ms"] > 0
    assert "failed" in by_backend[197, "CUDNN_ATTENTION"]  # on a CPU
    captions = {row["what"]: row for row in tables["captions, forward and backward"]}
    assert captions["tower, packed outside of attention"]["ms"] > 0
    assert {row["how"]: "failed" in row for row in tables["CUDA graphs"]} == {"eager": False, "CUDA graph": True}


def test_reading_is_measured(gpu: ModuleType, tmp_path: Path) -> None:
    tables = run(gpu, "loader", tmp_path)
    assert tables["loader"][0]["pairs/s"] > 0
    assert [row["recipe"] for row in tables["a run"]] == ["a-clip", "clip"]
    assert all(0 <= row["data_wait"] <= 1 for row in tables["a run"])


@pytest.mark.slow
def test_how_long_methods_train_depends_on_a_trial(gpu: ModuleType, shards: Path) -> None:
    rows = run(gpu, "training", shards, seconds=90.0, trial_steps=10)["equal time"]
    assert [(row["recipe"], row["seed"]) for row in rows[:2]] == [("clip", 0), ("a-clip", 0)]
    assert all(0 <= row["some-val: image_to_text_r1"] <= 1 for row in rows)


def test_two_processes_equal_one(gpu: ModuleType, tmp_path: Path) -> None:
    rows = run(gpu, "ranks", tmp_path)["two processes against one"]
    assert len(rows) == 4
    for row in rows:
        assert row["gradient, relative"] < 1e-3
        assert row["loss, relative"] < 1e-3


def test_what_fails_is_a_row(gpu: ModuleType, tmp_path: Path) -> None:
    bench = gpu.Bench("cpu", gpu.TINY, gpu.Results(tmp_path), 60.0)
    assert gpu.child("training", bench) == 1
    assert bench.results.rows[-1]["table"] == "errors"
    assert "--bundle" in bench.results.rows[-1]["error"]


def test_plans_keep_their_minutes(gpu: ModuleType) -> None:
    for minutes, stages in gpu.PLANS.items():
        assert sum(stages.values()) <= float(minutes)
        assert list(stages) == [name for name in gpu.STAGES if name in stages]
    assert gpu.chosen_stages("8", []) == gpu.PLANS["8"]
    assert gpu.chosen_stages(None, ["ranks", "steps=2.5"]) == {"steps": 2.5, "ranks": 1.0}
    with pytest.raises(SystemExit, match="no stage 'step'"):
        gpu.chosen_stages(None, ["step"])


def command(gpu: ModuleType, *words: str, **options: Any) -> str:
    return subprocess.run([sys.executable, gpu.__file__, *words], capture_output=True, text=True, check=True,
                          **options).stdout


def test_a_dry_run_needs_nothing_but_python(gpu: ModuleType, tmp_path: Path) -> None:
    printed = subprocess.run([sys.executable, "-S", "-I", gpu.__file__, "--plan", "20", "--dry-run"], cwd=tmp_path,
                             capture_output=True, text=True, check=True).stdout
    assert "| steps | " in printed
    assert not list(tmp_path.iterdir())


def test_a_stage_ends_with_its_minutes_and_finished_ones_are_not_repeated(gpu: ModuleType, tmp_path: Path) -> None:
    results = gpu.Results(tmp_path)
    results.add("stages", stage="optimizers", outcome="finished", minutes=0.1)
    words = ("--tiny", "--device", "cpu", "--output", str(tmp_path), "--stages")
    printed = command(gpu, *words, "optimizers", "attention=0.01", "ranks=5", "--minutes", "1")
    assert "--- optimizers" not in printed
    assert "--- attention, at most 0.01 minutes" in printed
    assert "ranks may take 5 minutes, which are not left: call again" in printed
    assert [row["outcome"] for row in gpu.Results(tmp_path).rows if row["table"] == "stages"] == [
        "finished", "out of time"]
    assert "| attention | out of time |" in (tmp_path / "results.md").read_text()


def test_the_bundle_brings_what_the_stages_import(gpu: ModuleType) -> None:
    bundle = importlib.import_module("gpu_bundle")
    code = "sys.modules['wandb'] = None; "  # which timm loads where it is installed
    code += "import gpu_checks, gpu_speed, gpu_training, aclip.report, aclip.cli; "
    code += "print(*(name for name, module in sys.modules.items() if module))"
    paths = f"import sys; sys.path[:0] = {[str(BENCHMARKS), str(BENCHMARKS.parent / 'src')]!r}; "
    names = subprocess.run([sys.executable, "-W", "ignore", "-c", paths + code], capture_output=True, text=True,
                           check=True).stdout.split()
    distributions = packages_distributions()
    loaded = {spelled(one) for name in names for one in distributions.get(name.partition(".")[0], ())}
    there = {spelled(name) for name in (*bundle.EXPECTED, "setuptools", "attentive-clip")}
    for _ in range(4):  # and what those need
        there |= {need for name in there for need in needs_of(name)}
    optional = {spelled(name) for name in ("transformers", "tokenizers", "dill", "sniffio")}  # loaded where installed
    assert loaded - there - optional <= {spelled(name) for name in bundle.WHEELS}


def spelled(name: str) -> str:
    return name.lower().replace("_", "-")


def needs_of(name: str) -> set[str]:
    from importlib.metadata import PackageNotFoundError, requires
    from re import match

    try:
        found = requires(name) or []
    except PackageNotFoundError:
        return set()
    return {spelled(match(r"[\w.-]+", one)[0]) for one in found if "extra ==" not in one}


def test_a_bundle_is_unpacked(gpu: ModuleType, shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = importlib.import_module("gpu_bundle")
    asked: list[list[str]] = []
    monkeypatch.setattr(bundle.subprocess, "run", lambda command, check: asked.append(command))
    bundle.download(shards / "bundle" / "wheels", ["rich"])
    assert asked[0][-1].startswith("rich==")
    assert {"3.12", "manylinux2014_x86_64", "--no-deps", "--only-binary=:all:"} <= set(asked[0])
    monkeypatch.undo()
    (shards / "bundle").mkdir()
    bundle.pack_sets(shards / "bundle" / "data.tar.gz", {"some-train": str(shards / "pairs" / "some-train")})
    gpu.unpack(shards / "bundle", shards / "unpacked")
    folder = shards / "unpacked" / "data" / "some-train"
    with tarfile.open(folder / "000000.tar") as archive:
        assert len(archive.getnames()) == 96
    assert not torch.cuda.is_initialized()
