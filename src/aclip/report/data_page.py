"""The page of `aclip data doctor`: what was found in a source, with pictures, and what to do about it."""

import base64
import io
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from aclip.data.doctor import Examination, Example, Finding, load_example
from aclip.data.doctor.findings import Severity
from aclip.files import write_atomically
from aclip.report.formats import count, percent
from aclip.report.frame import frame
from aclip.report.markup import Html, join, tag

PAGE = "data.html"
NUMBERS = "data.json"

_SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")
_SIDES = (32, 64, 128, 224, 336, 512, 768, 1024, 2048)
_RATIOS = ((1 / 4, "taller than 4:1"), (1 / 2, "4:1 to 2:1"), (0.8, "2:1 to 5:4"), (1.25, "about square"),
           (2, "5:4 to 2:1, wide"), (4, "2:1 to 4:1, wide"))


def write_data_page(examined: Examination, folder: Path) -> Path:
    """Write `data.html` and the same in numbers, `data.json`, into a folder, and return the page.

    The pictures of the examples are read again, and are in the page. All text from data is escaped.
    """
    shown = [[[load_example(examined, place) for place in group] for group in finding.examples]
             for finding in examined.findings]
    write_atomically(folder / NUMBERS, json.dumps(to_record(examined, shown), indent=2, ensure_ascii=False) + "\n")
    write_atomically(folder / PAGE, render(examined, shown))
    return folder / PAGE


def render(examined: Examination, shown: list[list[list[Example]]]) -> str:
    """Return the page; `shown` holds the examples of each finding, in groups."""
    name = examined.measured[0].source.name
    sections = [
        ("findings", "Findings", findings(examined, shown)),
        ("pictures", "Pictures", pictures(examined)),
        ("captions", "Captions", captions(examined)),
    ]
    return frame(f"{name}: data doctor", header(examined), sections, name)


def to_record(examined: Examination, shown: list[list[list[Example]]]) -> dict[str, Any]:
    """Return counts, findings and the names of their examples, as JSON has them."""
    source, *against = examined.measured
    return {
        "source": source.source.name, "samples": len(source.source), "examined": len(source.samples),
        "usable": usable(examined), "captions": len(source.captions), "model": examined.limits.model,
        "against": [one.source.name for one in against],
        "findings": [
            {"name": finding.name, "severity": finding.severity, "title": finding.title, "count": finding.count,
             "total": finding.total, "unit": finding.unit, "advice": finding.advice, "details": dict(finding.details),
             "examples": [[{"source": one.source, "index": one.index, "key": one.key} for one in group]
                          for group in groups]}
            for finding, groups in zip(examined.findings, shown, strict=True)],
    }


def usable(examined: Examination) -> int:
    """Return how many of the samples examined training can use."""
    samples = examined.measured[0].samples
    return int((samples["decoded"] & (samples["captions"] > 0)).sum())


def header(examined: Examination) -> Html:
    """Return the page's head: how much there is, and how much of it is good."""
    source, *against = examined.measured
    total = len(source.samples)
    seen = f"{count(total)} samples"
    if total < len(source.source):
        seen = f"{count(total)} of {count(len(source.source))} samples, drawn at random"
    severities = [finding.severity for finding in examined.findings]
    good = usable(examined)
    tiles = [("usable samples", percent(good / max(total, 1)), f"{count(good)} of {count(total)}")]
    tiles += [(f"{severity}s", count(severities.count(severity)), _names(examined, severity))
              for severity in _SEVERITIES]
    sizes = source.samples["bytes"][source.samples["decoded"]]
    limits = examined.limits
    facts = [
        ("captions", count(len(source.captions))),
        ("size of the pictures' files", f"{sizes.sum() / 1e6:,.1f} MB"),
        ("compared with", ", ".join(one.source.name for one in against) or "nothing else"),
        ("for the model", f"{limits.model}, {limits.image_size[1]} x {limits.image_size[0]} pixels"
                          + (f", {limits.context_length} tokens" if limits.context_length is not None else "")),
    ]
    return tag(
        "header",
        tag("p", "attentive-clip · data doctor", class_="kicker"),
        tag("h1", Path(source.source.name).name or source.source.name),
        tag("p", seen, class_="lead"),
        tag("p", source.source.name, class_="sub"),
        tag("div", *(tag("article", tag("h3", title), tag("p", tag("b", value), class_="big"),
                         tag("span", words, class_="chance"), class_="tile") for title, value, words in tiles),
            class_="tiles"),
        tag("dl", *(tag("div", tag("dt", k), tag("dd", v)) for k, v in facts), class_="facts"),
    )


def findings(examined: Examination, shown: list[list[list[Example]]]) -> Html:
    """Return every finding with its advice and examples."""
    if not examined.findings:
        return tag("p", "Nothing to complain about.")
    return join(*(_finding(finding, groups) for finding, groups in zip(examined.findings, shown, strict=True)))


def pictures(examined: Examination) -> Html:
    """Return histograms of the pictures' sizes and shapes."""
    samples = examined.measured[0].samples
    samples = samples[samples["decoded"]]
    if not len(samples):
        return tag("p", "None could be decoded.", class_="missing")
    shorter = np.minimum(samples["width"], samples["height"])
    ratio = samples["width"] / samples["height"]
    sides = [f"below {_SIDES[0]}", *(f"{low} to {high - 1}" for low, high in pairwise(_SIDES)),
             f"{_SIDES[-1]} and more"]
    shapes = [*(words for _, words in _RATIOS), "wider than 4:1"]
    smallest, middle, largest = (int(value) for value in np.quantile(shorter, [0, 0.5, 1], method="nearest"))
    return tag(
        "div",
        _histogram("Shorter side, pixels", f"{smallest} to {largest}, half of them up to {middle}", sides,
                   np.bincount(np.searchsorted(_SIDES, shorter, side="right"), minlength=len(sides))),
        _histogram("Shape, as long as wide", "width against height, upright", shapes,
                   np.bincount(np.searchsorted([edge for edge, _ in _RATIOS], ratio), minlength=len(shapes))),
        class_="cards",
    )


def captions(examined: Examination) -> Html:
    """Return histograms of captions per picture and of their lengths in tokens."""
    source, limits = examined.measured[0], examined.limits
    each = source.samples["captions"][source.samples["decoded"]]
    numbers = ["none", "1", "2", "3", "4", "5", "6 and more"]
    charts = [_histogram("Captions of a picture", "empty ones not counted", numbers,
                         np.bincount(np.minimum(each, 6), minlength=7))]
    tokens = source.captions["tokens"]
    if limits.context_length is not None and len(tokens):
        context = limits.context_length
        edges = sorted({*(edge for edge in (8, 16, 24, 32, 48, 64, 96, 128, 192, 256) if edge < context), context})
        words = [f"up to {edges[0]}", *(f"{low + 1} to {high}" for low, high in pairwise(edges)),
                 f"over {context}: cut"]
        about = f"start and end included; {percent(float((tokens > context).mean()))} are cut at {context}"
        charts.append(_histogram("Tokens of a caption", about, words,
                                 np.bincount(np.searchsorted(edges, tokens), minlength=len(words))))
    return tag("div", *charts, class_="cards")


def _names(examined: Examination, severity: str) -> str:
    return ", ".join(finding.name for finding in examined.findings if finding.severity == severity) or "none"


def _finding(finding: Finding, groups: list[list[Example]]) -> Html:
    number = f"{count(finding.count)} of {count(finding.total)} {finding.unit}, {percent(finding.share)}"
    details = " · ".join(f"{words}: {count(number)}" for words, number in finding.details)
    return tag(
        "div",
        tag("h3", tag("span", finding.severity, class_=f"rank {finding.severity}"), " ", finding.title, " ",
            tag("small", number)),
        tag("p", finding.advice, class_="note"),
        tag("p", details, class_="note") if details else None,
        tag("div", *(_card(group) for group in groups), class_="cards"),
        id=finding.name,
    )


def _card(group: list[Example]) -> Html:
    images = [_image(one) for one in group]
    if len(group) == 1:
        key = tag("span", group[0].key, class_="name")
        words = tag("div", tag("h4", _caption(group[0])), tag("p", _mark(group[0]), key), class_="words")
        return tag("article", tag("div", *images, words, class_="top"), class_="card")
    items = [tag("li", tag("span", f"{_caption(one)} · {one.key}", title=f"{one.source}: {one.key}"),
                 tag("b", _size(one))) for one in group]
    return tag("article", tag("div", *images, class_="top", style="flex-wrap:wrap"), tag("ol", *items), class_="card")


def _caption(example: Example) -> str:
    return example.captions[0] if example.captions else "no caption"


def _size(example: Example) -> str:
    return f"{example.size[0]}x{example.size[1]}" if example.size else ""


def _mark(example: Example) -> Html | None:
    words = example.problem or _size(example)
    return tag("b", words, class_="rank") if words else None


def _image(example: Example) -> Html | None:
    if example.picture is None:
        return None
    return tag("img", src=_data_uri(example.picture), alt=_caption(example), loading="lazy")


def _data_uri(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _histogram(title: str, about: str, words: list[str], counts: np.ndarray) -> Html:
    """Return a card of bars; empty bins at either end are left out."""
    filled = np.flatnonzero(counts)
    bars = [
        tag("li", tag("i", style=f"width:{100 * counts[i] / counts.max():.1f}%"), tag("span", words[i]),
            tag("b", f"{count(int(counts[i]))} · {percent(counts[i] / counts.sum())}"))
        for i in (range(filled[0], filled[-1] + 1) if len(filled) else ())
    ]
    return tag("article", tag("h4", title), tag("small", about), tag("ol", *bars), class_="card")
