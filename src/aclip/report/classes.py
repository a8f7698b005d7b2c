"""Class by class: how often each is recognised, what it is taken for, and whether confidence can be trusted."""

from collections.abc import Sequence

from aclip.report.charts import Series, line_chart
from aclip.report.formats import compact, count, percent
from aclip.report.markup import Html, join, table, tag
from aclip.report.run_files import Record, RunFiles, number

MAX_CELLS = 30
"""Most classes that the picture of confusions shows; of more, those with the most wrong pictures."""

ROWS = 12
"""Classes and confusions that a table lists."""


def class_by_class(run: RunFiles) -> Html:
    """Return, for every set and evaluator, confusions as a picture and the worst classes, or a reliability diagram."""
    blocks = [block for details in run.details if (block := _confusions(details))]
    diagrams = [diagram for details in run.details if (diagram := _reliability(details))]
    if not blocks and not diagrams:
        return tag("p", "No classifier has been measured: zero_shot and probes write this.", class_="missing")
    # all but the first are folded away, as the retrievals are
    return join(*(tag("details", tag("summary", title), body, open="" if i == 0 else None)
                  for i, (title, body) in enumerate(blocks)),
                tag("h3", "Calibration") if diagrams else None,
                tag("div", *diagrams, class_="charts") if diagrams else None)


def _confusions(details: Record) -> tuple[str, Html] | None:
    names = [str(name) for name in _list(details, "classes")]
    pictures, right = ([int(n) for n in _list(details, part) if isinstance(n, int)] for part in ("pictures", "right"))
    wrong = _cells(details, len(names))
    if not names or not len(names) == len(pictures) == len(right):
        return None
    there = [i for i, n in enumerate(pictures) if n]
    worst = sorted(there, key=lambda i: (right[i] / pictures[i], -pictures[i], i))
    rows = [[names[i], percent(right[i] / pictures[i]), count(pictures[i])] for i in worst[:ROWS]]
    taken = [[names[i], names[j], count(n), percent(n / pictures[i])] for i, j, n in wrong[:ROWS] if pictures[i]]
    shown = sorted(sorted(there, key=lambda i: (right[i] - pictures[i], i))[:MAX_CELLS])
    title = f"{details.get('set', '?')}, {str(details.get('evaluator', '?')).replace('_', ' ')}"
    note = f"the {len(shown)} of {count(len(there))} classes with the most errors" if len(shown) < len(there) else ""
    return title, join(
        _matrix(title, shown, names, pictures, right, wrong, note),
        tag("div", tag("div", tag("h3", "Least often right"), table(["class", "right", "pictures"], rows)),
            tag("div", tag("h3", "Most often confused"),
                table(["class", "taken for", "pictures", "of the class"], taken, numeric_from=2)
                if taken else tag("p", "Nothing is.", class_="missing")),
            class_="charts wide"))


def _matrix(
    title: str, shown: Sequence[int], names: Sequence[str], pictures: Sequence[int], right: Sequence[int],
    wrong: Sequence[tuple[int, int, int]], note: str,
) -> Html:
    """Return the matrix as a picture: a row a class, a column what it was taken for, the darker the more."""
    place = {number: i for i, number in enumerate(shown)}
    cells = [(i, i, right[i]) for i in shown] + [cell for cell in wrong if cell[0] in place and cell[1] in place]
    squares = [
        tag("rect", tag("title", f"{names[i]} taken for {names[j]}: {count(n)} of {count(pictures[i])}"
                                 if i != j else f"{names[i]}: {count(n)} of {count(pictures[i])} right"),
            x=place[j], y=place[i], width=1, height=1, class_="right" if i == j else "wrong",
            opacity=f"{n / pictures[i]:.3f}")
        for i, j, n in cells if n and pictures[i]]
    size = len(shown)
    picture = tag("svg", tag("rect", x=0, y=0, width=size, height=size, class_="back"), *squares,
                  viewBox=f"0 0 {size} {size}", role="img", aria_label=f"confusions, {title}")
    labels = [tag("li", names[i]) for i in shown]
    words = "a row is a class, a column what it was taken for, in the same order" + (f"; {note}" if note else "")
    return tag("figure", tag("figcaption", "Confusions", tag("small", words)),
               tag("div", tag("ol", *labels), picture, class_="matrix", style=f"--size:{size}"), class_="chart")


def _reliability(details: Record) -> Html | None:
    bins = [one for one in _list(details, "reliability") if isinstance(one, dict)]
    points = [(100.0 * sure, right) for one in bins if (sure := number(one, "confidence")) is not None
              and (right := number(one, "accuracy")) is not None]
    if not points:
        return None
    scale = compact(number(details, "logit_scale"))
    return line_chart(
        str(details.get("set", "?")),
        [Series("accuracy", points), Series("as sure as right", [(0.0, 0.0), (100.0, 1.0)], 0, "dashed")],
        unit="%", from_zero=True, note=f"logit_scale {scale}", x_label="confidence, %",
        last_values=False)


def _list(record: Record, name: str) -> list[object]:
    value = record.get(name)
    return value if isinstance(value, list) else []


def _cells(details: Record, classes: int) -> list[tuple[int, int, int]]:
    """Return the confusions that are three whole numbers, the first two of them classes."""
    whole = [one for one in _list(details, "confusions")
             if isinstance(one, list) and len(one) == 3 and all(isinstance(n, int) for n in one)]
    return [(i, j, n) for i, j, n in whole if 0 <= i < classes and 0 <= j < classes]
