"""A folder with what a GPU machine without a network lacks, for `gpu.py --bundle`.

    aclip data fetch emoji
    aclip data fetch icons
    python benchmarks/gpu_bundle.py gpu-bundle

`wheels/` holds this environment's versions of packages that aclip needs, for CPython 3.12 on x86-64; those `EXPECTED`
there are left out. `data.tar.gz` holds emoji and a part of icons as shards.
"""

import argparse
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

from aclip.data import pack

EXPECTED = ("torch", "torchvision", "numpy", "pandas", "pillow", "huggingface_hub")
"""Distributions that the machine has, with what they need."""

WHEELS = (
    "open_clip_torch", "timm", "ftfy", "wcwidth", "regex", "simplejpeg", "ijson", "charset-normalizer", "safetensors",
    "jaxtyping", "wadler_lindig", "pydantic", "pydantic_core", "annotated-types", "typing-inspection",
    "typing_extensions", "tenacity", "torchmetrics", "lightning-utilities", "rich", "markdown-it-py", "mdurl",
    "Pygments", "tyro", "docstring_parser", "typeguard", "Jinja2", "MarkupSafe",
)  # fmt: skip

PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in (28, 27, 26, 24, 17, 12, 5)] + [
    "manylinux2014_x86_64", "manylinux1_x86_64"]

SETS = {
    "emoji-train": "emoji:train", "emoji-val_vendor": "emoji:val_vendor[:1000]",
    "emoji-val_concept": "emoji:val_concept", "emoji-val_both": "emoji:val_both",
    "icons-train": "icons:train[:6000]", "icons-val_both": "icons:val_both[:500]",
}
"""Folder -> source; those that end with "-train" are trained on, the others held out."""

SIDE, QUALITY = 128, 75
LIMIT = 60e6
"""Bytes of the whole folder."""


def download(folder: Path, names: Sequence[str] = WHEELS) -> None:
    """Download wheels for CPython 3.12 on x86-64, in the versions that are installed here."""
    subprocess.run(
        [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--python-version",
         "3.12", "--implementation", "cp", *(word for one in PLATFORMS for word in ("--platform", one)), "--dest",
         str(folder), *(f"{name}=={version(name)}" for name in names)], check=True)


def pack_sets(archive: Path, sets: Mapping[str, str]) -> None:
    """Write sets as shards into one compressed archive, as a third of small shards is padding."""
    with tempfile.TemporaryDirectory() as folder:
        for name, source in sets.items():
            pack(source, output=f"{folder}/{name}", side=SIDE, quality=QUALITY)
        with tarfile.open(archive, "w:gz") as file:
            file.add(folder, ".")


def main() -> None:
    """Fill the folder, and say what it holds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--sets", nargs="+", default=[f"{name}={source}" for name, source in SETS.items()],
                        metavar="NAME=SOURCE", help="(default: emoji, and a part of icons)")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    download(args.output / "wheels")
    pack_sets(args.output / "data.tar.gz", dict(one.split("=", 1) for one in args.sets))
    sizes = {path.relative_to(args.output): path.stat().st_size for path in sorted(args.output.rglob("*.*"))
             if path.is_file()}
    for path, size in sizes.items():
        sys.stdout.write(f"{size / 1e6:8.2f} MB  {path}\n")
    total = sum(sizes.values())
    sys.stdout.write(f"{total / 1e6:8.2f} MB in all, {LIMIT / 1e6:.0f} allowed\n")
    if total > LIMIT:
        raise SystemExit("gpu_bundle.py: too large: give fewer --sets, or fewer samples of them, as icons:train[:3000]")


if __name__ == "__main__":
    main()
