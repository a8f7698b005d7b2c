"""The frame of every page: one HTML file that needs nothing else and loads nothing."""

import base64
import hashlib
from collections.abc import Sequence
from importlib import resources
from string import Template

from aclip.report.markup import Html, join, tag


def frame(
    name: str, header: Html, sections: Sequence[tuple[str, str, Html]], folder: str, notes: Html | None = None
) -> str:
    """Return a page; its content policy forbids it to load anything or to run any script but its own.

    Args:
        name: of what the page is about.
        header: the page's head, to which links to the sections are added.
        sections: anchor, title and content of each.
        folder: from whose files the page was made.
        notes: shown before the sections.
    """
    script = _asset("report.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    links = [tag("a", title, href=f"#{anchor}") for anchor, title, _ in sections]
    return Template(_asset("template.html")).substitute(
        title=join(f"{name} · attentive-clip"),
        script_hash=f"sha256-{digest}",
        style=_asset("style.css"),
        script=script,
        header=join(header, tag("nav", *links, aria_label="Sections")),
        sections=join(notes, *(tag("section", tag("h2", title), body, id=anchor) for anchor, title, body in sections)),
        footer=join("Written by attentive-clip from the files of ", tag("code", folder), "."),
    )


def _asset(name: str) -> str:
    return resources.files("aclip.report").joinpath(name).read_text(encoding="utf-8")
