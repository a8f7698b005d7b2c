"""A parsed page, and journals of any content, for tests."""

import json
import re
from collections.abc import Iterable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

EVIL = "<script>alert('x')</script>\"><img src=http://evil.example/x.png> | & {{ 7*7 }} </style>"
"""Text from data that must stay text."""

_VOID = {"meta", "link", "img", "br", "hr"}


class Page(HTMLParser):
    """Elements and visible text of a page; asserts that it is well formed, self-contained and shows `EVIL` as text.

    Attributes:
        source: the file's text.
        elements: (tag, attributes) in order.
        text: section -> its text, "" for what precedes the first.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: dict[str, str] = {}
        self._open: list[str] = []
        self._section = ""
        self.feed(self.source)
        assert not self._open, "unclosed elements"
        assert len(self.named("script")) == 1
        assert EVIL not in self.source
        self._check_requests()

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def words(self, section: str | None = None) -> str:
        """Return the text of a section, or of the whole page, white space collapsed."""
        return " ".join((" ".join(self.text.values()) if section is None else self.text[section]).split())

    def charts(self) -> int:
        return sum((attributes.get("class") or "") == "chart" for attributes in self.named("figure"))

    def _check_requests(self) -> None:
        for _, attributes in self.elements:
            for name in ("src", "href", "srcset", "action", "data", "poster"):
                value = attributes.get(name)
                assert value is None or value.startswith(("data:", "#", "runs/")), value
        styles = re.findall(r"<style>(.*?)</style>", self.source, re.S)
        styles += [attributes.get("style") or "" for _, attributes in self.elements]
        assert "@import" not in "".join(styles)
        assert all(url.startswith("data:") for url in re.findall(r"url\(([^)]*)", "".join(styles)))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag == "section":
            self._section = str(dict(attrs)["id"])
        if tag not in _VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] not in ("script", "style"):
            self.text[self._section] = f"{self.text.get(self._section, '')} {data}"


def write_lines(path: Path, records: Iterable[Any]) -> None:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
