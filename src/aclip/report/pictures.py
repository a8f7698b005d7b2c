"""What the model looks at: score heat maps and kept patches of the same pictures over training."""

import base64
import io

from PIL import Image

from aclip.report.formats import count, percent
from aclip.report.markup import Html, join, tag
from aclip.report.overlays import heat_layer, to_image, veil_layer
from aclip.report.run_files import RunFiles
from aclip.report.snapshots import Snapshot

PICTURES = 10
SIDE = 224  # pixels; more is not visible at the size shown


def looks(run: RunFiles) -> Html:
    """Return a row for every picture that all snapshots hold: the picture, and its scores at each step."""
    if not run.snapshots:
        return tag("p", "No snapshots were taken: this recipe scores no patches, or the run has just begun.",
                   class_="missing")
    last = run.snapshots[-1]
    shots = [s for s in run.snapshots if s.captions == last.captions]
    kept, patches = last.keep_indices.shape[1], last.scores.shape[1]
    times = "one step" if len(shots) == 1 else f"{len(shots)} steps"
    explanation = (
        f"Attention of the CLS token to each patch, averaged over layers and heads, and the {kept} of "
        f"{patches} patches that the masking keeps: the same held-out pictures at {times} of training. Under "
        f"each pair stands the share of the attention that falls on what is kept; spread evenly it would be "
        f"{percent(kept / patches, 0)}."
    )
    legend = tag("p", tag("span", "little"), tag("i", class_="scale"), tag("span", "much attention"),
                 tag("i", class_="swatch"), tag("span", "removed"), class_="key")
    head = tag("div", tag("span", "picture"), *(tag("span", _when(i, shots)) for i in range(len(shots))),
               class_="look head", style=f"--steps:{len(shots)}", aria_hidden="true")
    rows = [_row(i, shots) for i in range(min(PICTURES, len(last.captions)))]
    return join(tag("p", explanation), legend, tag("div", head, *rows, class_="looks"))


def data_uri(image: Image.Image) -> str:
    """Return an image as a PNG data URI."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _when(i: int, shots: list[Snapshot]) -> str:
    step = f"step {count(shots[i].step)}"
    if len(shots) == 1:
        return step
    return f"early · {step}" if i == 0 else f"late · {step}" if i == len(shots) - 1 else step


def _row(i: int, shots: list[Snapshot]) -> Html:
    picture = to_image(shots[-1].images[i])
    picture.thumbnail((SIDE, SIDE))
    caption = shots[-1].captions[i]
    columns = []
    for shot in shots:
        scores, keep = shot.scores[i].double(), shot.keep_indices[i]
        total = float(scores.sum())
        share = float(scores[keep].sum()) / total if total > 0 else None
        columns.append(tag(
            "figure",
            tag("div", tag("i"), tag("img", src=data_uri(heat_layer(scores, shot.grid)), alt=""),
                class_="picture heat", role="img", aria_label=f"attention at step {shot.step}: {caption}"),
            tag("div", tag("img", src=data_uri(veil_layer(keep, shot.grid)), alt=""),
                class_="picture kept", role="img", aria_label=f"patches kept at step {shot.step}: {caption}"),
            tag("figcaption", tag("b", percent(share, 0))),
        ))
    # The picture is written once, as a property that every copy in the row takes as its background.
    return tag("div", tag("figure", tag("div", class_="picture", role="img", aria_label=caption),
                          tag("figcaption", caption), class_="source"), *columns,
               class_="look", style=f"--steps:{len(shots)};--picture:url({data_uri(picture)});"
                                    f"--ratio:{picture.width}/{picture.height}")
