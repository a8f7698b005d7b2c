"""Draw the README's figure from a run: held-out images, where the model looks, what it keeps.

    python docs/make_pictures.py runs/demo docs/images/kept.png
"""

import sys
from pathlib import Path

from PIL import Image

from aclip.report.snapshots import heat_map, kept_patches, read_snapshot

CELL, GAP = 132, 10


def main(run: Path, target: Path) -> None:
    """Write `target`: one column an image; rows are the image, its score map, the patches kept."""
    snapshot = read_snapshot(max((run / "snapshots").glob("step-*.safetensors")))
    count = len(snapshot.captions)
    sheet = Image.new("RGB", (count * (CELL + GAP) - GAP, 3 * (CELL + GAP) - GAP), "white")
    for column in range(count):
        image = Image.fromarray(snapshot.images[column].permute(1, 2, 0).numpy())
        image = image.resize((CELL, CELL), Image.Resampling.BICUBIC)
        rows = (
            image,
            heat_map(image, snapshot.scores[column], snapshot.grid),
            kept_patches(image, snapshot.keep_indices[column], snapshot.grid),
        )
        for row, cell in enumerate(rows):
            sheet.paste(cell, (column * (CELL + GAP), row * (CELL + GAP)))
    target.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(target, optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
