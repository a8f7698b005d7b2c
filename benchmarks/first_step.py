"""What happens before the first optimizer step of `aclip train`: files and functions of ours, processor time, memory.

    python benchmarks/first_step.py                     # this checkout
    PYTHONPATH=/elsewhere/src python benchmarks/first_step.py

Trains `a-clip` on `vit-micro` for 32 samples of a folder of synthetic images, once with a profiler that counts the
functions called (their definitions do not count), and once without it for the times.
"""

import argparse
import inspect
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

CHILD = """
import json, resource, sys, threading, time
from pathlib import Path
count, folder = sys.argv[1] == "count", sys.argv[2]
called = set()
import importlib.util
root = str(Path(importlib.util.find_spec("aclip").origin).parent)
def note(frame, event, _):
    code = frame.f_code
    if event == "call" and code.co_flags & 1 and code.co_filename.startswith(root):
        called.add((code.co_filename[len(root) + 1:], code.co_qualname))
class Reached(BaseException): pass
def reached(*_):
    sys.setprofile(None)
    usage = resource.getrusage(resource.RUSAGE_SELF)
    print("RESULT " + json.dumps({"files": sorted({file for file, _ in called}), "functions": len(called),
        "seconds": usage.ru_utime + usage.ru_stime, "memory": usage.ru_maxrss * 1024}), flush=True)
    raise Reached
from torch.optim.optimizer import register_optimizer_step_pre_hook
register_optimizer_step_pre_hook(reached)
if count:
    sys.setprofile(note); threading.setprofile(note)
from aclip.cli import main
try:
    main(["train", "--recipe", "a-clip", "--model", "vit-micro", "--data", folder, "--samples", "32",
          "--batch-size", "16", "--workers", "0", "--precision", "fp32", "--output", folder + "-run-" + sys.argv[1]])
except Reached:
    pass
"""


def measure(what: str, folder: Path) -> dict[str, object]:
    """Return what a training process reports at its first optimizer step."""
    done = subprocess.run([sys.executable, "-c", CHILD, what, str(folder)], capture_output=True, text=True, check=False)
    found = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not found:
        raise RuntimeError(done.stderr[-2000:])
    result: dict[str, object] = json.loads(found[0].removeprefix("RESULT "))
    return result


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=inspect.getdoc(sys.modules[__name__]))
    parser.add_argument("--files", action="store_true", help="also list the files")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, "images")
        folder.mkdir()
        for number in range(48):
            pixels = np.random.default_rng(number).integers(0, 256, (48, 48, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{number:02}.png")
            (folder / f"{number:02}.txt").write_text(f"image number {number}\n")
        counted = measure("count", folder)
        begun = time.perf_counter()
        timed = measure("time", folder)
    files = counted["files"]
    assert isinstance(files, list)
    sys.stdout.write(
        f"before the first optimizer step: {len(files)} files and {counted['functions']} functions of aclip, "
        f"{timed['seconds']:.1f} s of processor time, {time.perf_counter() - begun:.1f} s in all, "
        f"{int(str(timed['memory'])) / 2**20:.0f} MiB resident\n")
    if arguments.files:
        sys.stdout.write("\n".join(files) + "\n")


if __name__ == "__main__":
    main()
