"""Pages about a source: of `aclip data doctor`, what was found in it; of `aclip data look`, what it is read as."""

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from aclip.files import write_atomically
from aclip.report.page import count, percent, write_page

if TYPE_CHECKING:
    from aclip.examination import Examination, Example

_SIDES = (32, 64, 128, 224, 336, 512, 768, 1024, 2048)
_RATIOS = {1 / 4: "taller than 4:1", 1 / 2: "4:1 to 2:1", 0.8: "2:1 to 5:4", 1.25: "about square",
           2: "5:4 to 2:1, wide", 4: "2:1 to 4:1, wide"}
_TOKENS = (8, 16, 24, 32, 48, 64, 96, 128, 192, 256)


def write_data_page(examined: "Examination", folder: Path) -> Path:
    """Write `data.html`, with the images of the examples, and the same numbers in `data.json`; return the page."""
    shown = examined.load_examples()
    write_atomically(folder / "data.json", json.dumps(to_record(examined, shown), indent=2, ensure_ascii=False) + "\n")
    name, *against = (str(one.source.spec) for one in examined.measured)
    return write_page(
        folder / "data.html", "data", name=f"{name}: data doctor", folder=name,
        title=Path(name).name or name,
        sections=[("findings", "Findings"), ("images", "Images"), ("captions", "Captions")],
        source=examined.measured[0], spec=name, against=against, limits=examined.limits, usable=examined.usable,
        findings=list(zip(examined.findings, shown, strict=True)), image_histograms=image_histograms(examined),
        caption_histograms=caption_histograms(examined))


def write_look_page(
    path: Path, title: str, facts: list[tuple[str, str]],
    samples: list[tuple[Image.Image, str, tuple[str, ...]]], advice: list[str],
) -> Path:
    """Write the page of `aclip data look`: facts about a source, image, name and captions of samples, and advice."""
    cards = []
    for image, name, captions in samples:
        small = image.convert("RGB")
        small.thumbnail((320, 320))
        cards.append({"image": small, "name": name, "captions": captions, "size": f"{image.width}x{image.height}"})
    sections = [("samples", "Samples"), *([("advice", "Advice")] if advice else [])]
    return write_page(path, "look", name=f"{title}: data look", folder=title, sections=sections, title=title,
                      facts_shown=facts, samples=cards, advice=advice)


def to_record(examined: "Examination", shown: Sequence[Sequence[Sequence["Example"]]]) -> dict[str, Any]:
    source, *against = examined.measured
    return {
        "source": str(source.source.spec), "samples": len(source.source), "examined": len(source.samples),
        "usable": examined.usable, "captions": len(source.captions), "model": examined.limits.model,
        "against": [str(one.source.spec) for one in against],
        "findings": [vars(finding) | {"details": dict(finding.details), "examples": [
            [{"source": one.source, "index": one.index, "key": one.key} for one in group] for group in groups]}
            for finding, groups in zip(examined.findings, shown, strict=True)],
    }


def image_histograms(examined: "Examination") -> list[dict[str, Any]]:
    samples = examined.measured[0].samples
    samples = samples[samples["decoded"]]
    if not len(samples):
        return []
    shorter = np.minimum(samples["width"], samples["height"])
    smallest, middle, largest = (int(value) for value in np.quantile(shorter, [0, 0.5, 1], method="nearest"))
    sides = [f"below {_SIDES[0]}", *(f"{low} to {high - 1}" for low, high in pairwise(_SIDES)),
             f"{_SIDES[-1]} and more"]
    return [
        _histogram("Shorter side, pixels", f"{smallest} to {largest}, half of them up to {middle}", sides,
                   np.searchsorted(_SIDES, shorter, side="right")),
        _histogram("Aspect ratio", "width against height, upright", [*_RATIOS.values(), "wider than 4:1"],
                   np.searchsorted(list(_RATIOS), samples["width"] / samples["height"])),
    ]


def caption_histograms(examined: "Examination") -> list[dict[str, Any]]:
    source, context = examined.measured[0], examined.limits.context_length
    each = source.samples["captions"][source.samples["decoded"]]
    charts = [_histogram("Captions of an image", "empty ones not counted",
                         ["none", "1", "2", "3", "4", "5", "6 and more"], np.minimum(each, 6))]
    tokens = source.captions["tokens"]
    if context is not None and len(tokens):
        edges = sorted({*(edge for edge in _TOKENS if edge < context), context})
        words = [f"up to {edges[0]}", *(f"{low + 1} to {high}" for low, high in pairwise(edges)),
                 f"over {context}: cut"]
        about = f"start and end included; {percent(float((tokens > context).mean()))} are cut at {context}"
        charts.append(_histogram("Tokens of a caption", about, words, np.searchsorted(edges, tokens)))
    return charts


def _histogram(title: str, about: str, words: list[str], bins: np.ndarray) -> dict[str, Any]:
    counts = np.bincount(bins, minlength=len(words))
    filled = np.flatnonzero(counts)
    bars = [(f"{100 * counts[i] / counts.max():.1f}", words[i],
             f"{count(int(counts[i]))} · {percent(counts[i] / counts.sum())}")
            for i in (range(filled[0], filled[-1] + 1) if len(filled) else ())]
    return {"title": title, "about": about, "bars": bars}
