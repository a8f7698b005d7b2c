"""Every `aclip` command of the documentation parses, and runs in its smallest form unless `NOT_RUN` says why not."""

import glob
import itertools
import os
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import aclip
from aclip import cli
from aclip.cli import main

ROOT = Path(__file__).parents[2]
OF_THEIR_TIME = {"history.md"}  # its commands are those of earlier code
PAGES = [path for path in (*ROOT.glob("*.md"), *ROOT.glob("skill/*.md"), *ROOT.glob("docs/*.md"))
         if path.name not in OF_THEIR_TIME]
MEASURED = {"results.md", "short-runs.md", "decisions.md", "benchmarks.md", "gpu.md", "CHANGELOG.md"}
"""Their commands take minutes to hours, which is what the pages are about."""

NOT_RUN = {
    r"\bserve\b": "ends with Ctrl-C; tests/search/test_server.py",
    r"\bcompare\b": "a process for each run; tests/test_comparison.py",
    r"\bdata fetch\b": "downloads; tests/data/sets",
    r"\bbench\b": "measures for minutes; tests/cli",
    r"\bdoctor$": "tests/cli/test_cli_doctor.py",
    r"--overfit-one-batch": "100 steps; tests/cli/test_train.py",
    r"torchrun|s3://": "several processes, remote files; tests/cli/test_train.py, tests/data/sources/test_remote.py",
    r"cifar10:|torchvision:|imagenet|dataset_coco|mine/test|scenes/": "data that has to be there",
    r"--to (huggingface|onnx|torch-export)": "tests/exporters",
    r"--pretrained|clip_benchmark": "another program",
    r"--recipe align": "the same; tests/models/test_loading.py",
    r"--teacher|data encode": "weights that have to be there; tests/test_frozen.py, tests/test_encoding.py",
    r"xlm-roberta": "the same; tests/models/test_hugging_face_text.py",
}
SMALLEST = {"--epochs": "1", "--batch-size": "4", "--seeds": "0", "--workers": "0"}


def commands(page: Path) -> list[str]:
    """Return the commands in a page's shell blocks, one line each."""
    blocks = re.findall(r"^```bash\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    found = [re.search(r"(?:^|&& )(aclip .*|.*torchrun .* -m aclip .*)", line) for line in lines if " ... " not in line]
    return [part for match in found if match for part in match[1].split(" && ") if "aclip" in part]


def words(command: str) -> list[str]:
    return shlex.split(re.sub(r".* -m aclip ", "aclip ", command), comments=True)[1:]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_commands_parse(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    call = cli._call
    monkeypatch.setattr(cli, "_call", lambda function, *rest, **more: call(
        dict if function is dict else lambda *a, **k: None, *rest, **more))
    monkeypatch.setattr(cli, "check_early", lambda config: None)
    monkeypatch.setattr("aclip.runs.train", lambda **settings: None)
    monkeypatch.setattr("aclip.overfit.overfit_one_batch", lambda *given: None)
    for command in commands(page):
        assert main(words(command)) == 0, command


def test_commands_are_found() -> None:
    assert sum(len(commands(page)) for page in PAGES) > 60
    assert ["search", "photos.index", "two red cars", "--not", "a person", "--sheet", "cars.png"] in [
        words(command) for command in commands(ROOT / "docs" / "search.md")]


def smallest(command: str, number: Iterator[int]) -> list[str]:
    """Return a command with a model, data and numbers that take no time, and an output of its own."""
    given = re.sub(r"ViT-[BL]-[\w-]*(:[\w.]+)?|vit-(tiny|small)", "vit-micro", command)
    given = re.sub(r"emoji:\w+|photos/?(?= )", "photos", given)
    given = re.sub(r"\[[0-9:]+\]", "", given).replace("shards/{000000..000099}.tar", "photos")
    found = words(given)
    for option, value in SMALLEST.items():
        if option in found:
            found[found.index(option) + 1] = value
    if found[0] in ("train", "merge") and "--output" in found:
        found[found.index("--output") + 1] = f"runs/{next(number)}"
    if found[0] == "train" and "--resume" not in found:
        found += ["--epochs", "1", "--batch-size", "4", "--workers", "0"]
    return list(itertools.chain.from_iterable(sorted(glob.glob(word)) or [word] if "*" in word else [word]
                                              for word in found))


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if page.name not in MEASURED and commands(page)],
                         ids=lambda path: path.name)
def test_commands_run(page: Path, workspace: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shutil.copytree(workspace, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("ACLIP_CACHE", str(tmp_path / "cache"))
    number = itertools.count()
    for command in commands(page):
        plain = command.partition("  #")[0].strip()
        if not any(re.search(pattern, plain) for pattern in NOT_RUN):
            assert main(smallest(command, number)) == 0, plain


def test_python_blocks_compile_and_name_what_exists() -> None:
    for page in (page for page in PAGES if page.name not in MEASURED):
        for block in re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
            compile(block, str(page), "exec")
            for name in re.findall(r"\baclip\.([A-Za-z]\w*)", block):
                if not os.path.exists(ROOT / "src" / "aclip" / name):
                    _: Any = getattr(aclip, name)
