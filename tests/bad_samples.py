"""A hundred good pairs, and one of every kind that the internet has to offer."""

from pathlib import Path

import numpy as np
from PIL import Image

from made_pictures import encode, giant_png, picture

SKIPPED = {
    "truncated.jpg": "truncated or damaged JPEG image",
    "zero_bytes.jpg": "empty file",
    "text.jpg": "not an image in a known format",
    "giant.png": "image too large",
    "empty_caption.png": "empty caption",
    "missing_caption.png": "missing caption",
}
USED = {"animated.gif", "cmyk.jpg", "sixteen_bit.png", "palette.png", "long_caption.png", "chinese.png"}


def make_mixed_folder(folder: Path) -> Path:
    """Write the pairs into a new folder and return it."""
    folder.mkdir()
    pictures = {f"good_{number:03}.png": encode(picture(number)) for number in range(100)}
    frames = [Image.new("RGB", (24, 24), colour) for colour in ("red", "lime")]
    palette = Image.new("P", (24, 24), 0)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    pictures |= {
        "truncated.jpg": encode(picture(1, 64), "JPEG")[:900],
        "zero_bytes.jpg": b"",
        "text.jpg": b"I am not a picture.\n" * 9,
        "giant.png": giant_png(),
        "animated.gif": encode(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "cmyk.jpg": encode(Image.new("CMYK", (24, 24), (255, 0, 255, 0)), "JPEG", quality=100),
        "sixteen_bit.png": encode(Image.fromarray(np.full((24, 24), 128 * 257, dtype=np.uint16))),
        "palette.png": encode(palette, transparency=0),
        "empty_caption.png": encode(picture(2)),
        "long_caption.png": encode(picture(3)),
        "chinese.png": encode(picture(4)),
        "missing_caption.png": encode(picture(5)),
    }
    captions = {"empty_caption": " \n", "long_caption": "word " * 10_000, "chinese": "一只在雪地里奔跑的狗"}
    for name, data in pictures.items():
        (folder / name).write_bytes(data)
        stem = name.partition(".")[0]
        if stem != "missing_caption":
            (folder / f"{stem}.txt").write_text(captions.get(stem, f"a picture called {stem}"))
    return folder


def check_skipped(skipped: set[tuple[str, str]]) -> None:
    assert {name for name, _ in skipped} == set(SKIPPED)
    assert len(skipped) == len(SKIPPED)
    for name, reason in skipped:
        assert reason.startswith(SKIPPED[name]), (name, reason)
