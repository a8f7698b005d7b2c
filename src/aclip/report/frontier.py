"""The page of a sweep over interpolated weights: what each share of the second model gains and loses."""

from pathlib import Path

from aclip.report.figures import Series, line_chart
from aclip.report.journals import Record
from aclip.report.page import percent, write_page
from aclip.report.tables import metric_words


def write_frontier(path: Path, frontier: Record) -> Path:
    """Write the page of a sweep (`frontier.json`) to `path`, and return it."""
    (old, new), points, words = frontier["sets"], frontier["points"], metric_words(frontier["metric"])
    by_share = [Series(name, [(100 * point["alpha"], point[key]) for point in points], colour)
                for name, key, colour in ((old, "old", 1), (new, "new", 2))]
    limit = 100 * points[0]["old"] - frontier["lose"]
    values = [point["new"] for point in points]
    against = [Series(new, sorted((100 * point["old"], point["new"]) for point in points), 2),
               Series(f"{frontier['lose']:g} points lost on {old}", [(limit, min(values)), (limit, max(values))], 0,
                      "dashed")]
    before, after = frontier["models"]
    best = next(point for point in points if point["alpha"] == frontier["alpha"])
    return write_page(
        path, "frontier", name="Merged models", folder=path.parent.name,
        sections=[("frontier", "Frontier"), ("numbers", "Numbers")],
        facts_shown=[("alpha 0", before), ("alpha 1", after), ("chosen alpha", f"{frontier['alpha']:g}"),
                     (f"{words}, {old}", percent(best["old"])), (f"{words}, {new}", percent(best["new"]))],
        figures=[
            line_chart("Gain against loss", against, unit="%", note=words, x_label=f"{old}, %", last_values=False),
            line_chart("Both sets over alpha", by_share, unit="%", note=words, x_label="100 alpha", last_values=False)],
        head=["alpha", old, new, f"change, {old}", f"change, {new}"],
        rows=[[f"{point['alpha']:g}", percent(point["old"]), percent(point["new"]),
               *(f"{100 * (point[key] - points[0][key]):+.1f}" for key in ("old", "new"))] for point in points])
