"""The wheel, built and installed into an environment of its own, trains from the command line and from Python."""

import os
import shutil
import site
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import aclip

ROOT = Path(__file__).parent.parent
TRAINING = {"recipe": "a-clip", "model": "vit-micro", "data": "images", "batch_size": 4, "samples": 12,
            "precision": "fp32", "device": "cpu", "workers": 0}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project's wheel, built from a copy, so that the checkout stays clean."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "src", folder / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    run(folder, sys.executable, "-c", "from setuptools.build_meta import build_wheel; build_wheel('.')")
    (built,) = folder.glob("attentive_clip-*.whl")
    return built


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python of a new environment with the wheel; everything else it sees is what runs the tests."""
    environment = tmp_path_factory.mktemp("environment")
    venv.create(environment, symlinks=True)
    bin_folder = environment / ("Scripts" if os.name == "nt" else "bin")
    (installed,) = environment.rglob("site-packages")
    # added as plain paths: .pth files in them, such as an editable install's, are not read
    (installed / "others.pth").write_text("\n".join(site.getsitepackages()))
    run(environment, sys.executable, "-m", "pip", "--python", str(bin_folder / "python"), "install", "--no-deps",
        "--no-index", "--quiet", "--disable-pip-version-check", "--ignore-installed", str(wheel))
    return bin_folder / "python"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder outside the checkout with a few captioned images."""
    images = tmp_path / "images"
    images.mkdir()
    draw = np.random.default_rng(0)
    for number in range(8):
        Image.fromarray(draw.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(images / f"{number}.png")
        (images / f"{number}.txt").write_text(f"image number {number}")
    return tmp_path


def run(folder: Path, *command: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False,
                          timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_holds_every_file_of_the_package(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as content:
        packed = {name for name in content.namelist() if name.startswith("aclip/")}
        assert any(name.endswith("LICENSE") for name in content.namelist())
    source = ROOT / "src"
    files = {str(path.relative_to(source).as_posix()) for path in (source / "aclip").rglob("*") if path.is_file()}
    assert packed == {name for name in files if "__pycache__" not in name}
    assert {"aclip/py.typed", "aclip/models/configs/vit-tiny.json", "aclip/report/templates/run.html.j2"} <= packed


def test_trains_from_the_command_line(python: Path, folder: Path) -> None:
    command = python.with_name("aclip")
    assert run(folder, str(command), "--version").strip().endswith(aclip.__version__)
    options = [word for name, value in TRAINING.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    run(folder, str(command), "train", *options, "--output", "run")
    assert "<svg" in (folder / "run" / "report.html").read_text(encoding="utf-8")
    assert (folder / "run" / "final" / "open_clip_config.json").exists()


def test_trains_from_python(python: Path, folder: Path) -> None:
    code = (f"import aclip; print(aclip.__file__); run = aclip.train(**{TRAINING}, output='run'); "
            "print(run.metrics[-1]['step'], *run.model.encode_texts(['an image']).shape)")
    output = run(folder, str(python), "-c", code).splitlines()
    assert Path(output[0]).is_relative_to(python.parents[1])
    assert output[-1] == "3 1 128"
