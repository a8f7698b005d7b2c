"""Markup that is safe by construction: a string becomes text unless it is `Html` already."""

from html import escape


class Html(str):
    """Markup that is ready to be written; anything else is escaped where it is used."""

    __slots__ = ()


def tag(name: str, *children: str | None, **attributes: str | float | None) -> Html:
    """Return an element.

    Args:
        name: of the element. `br`, `img` and the like take no children.
        children: `Html` as it is, other strings escaped, None left out.
        attributes: escaped; a trailing underscore is dropped (`class_`), other underscores become hyphens,
            None leaves the attribute out.

    >>> tag("p", "a < b", class_="note")
    '<p class="note">a &lt; b</p>'
    """
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in _VOID:
        return Html(f"<{name}{written}>")
    return Html(f"<{name}{written}>{join(*children)}</{name}>")


def join(*children: str | None) -> Html:
    """Return children one after the other, escaped where they are not `Html`."""
    return Html("".join(c if isinstance(c, Html) else escape(c) for c in children if c is not None))


def table(head: list[str], rows: list[list[str]], numeric_from: int = 1) -> Html:
    """Return a table that scrolls sideways where it is too wide.

    Args:
        head: column titles.
        rows: cells, `Html` or text.
        numeric_from: first column that is aligned as numbers; the words before it are dimmed where they
            repeat those of the row above.
    """
    titles = [tag("th", title, class_="num" if i >= numeric_from else None, scope="col")
              for i, title in enumerate(head)]
    lines = []
    for above, row in zip([[], *rows], rows, strict=False):
        repeated = next((i for i, pair in enumerate(zip(above, row, strict=False)) if pair[0] != pair[1]), 0)
        lines.append(tag("tr", *(
            tag("td", value, class_="num" if i >= numeric_from else "again" if i < repeated else None)
            for i, value in enumerate(row))))
    body = tag("tbody", *lines)
    return tag("div", tag("table", tag("thead", tag("tr", *titles)), body), class_="table", tabindex="0")


_VOID = frozenset({"br", "img", "hr", "meta", "link"})
