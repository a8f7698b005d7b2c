"""What the recipes of a comparison keep of the same pictures."""

from aclip.errors import CheckpointError
from aclip.report.comparison_files import ComparisonFiles, Results
from aclip.report.formats import count
from aclip.report.markup import Html, join, tag
from aclip.report.overlays import to_image, veil_layer
from aclip.report.pictures import data_uri
from aclip.report.snapshots import Snapshot, read_snapshot

PICTURES = 6
SIDE = 160  # pixels


def kept(comparison: ComparisonFiles) -> Html:
    """Return a block for every picture: as it is, and with what each recipe removed veiled.

    The pictures are those of the first seed, the same in all of its runs; shown is the end of training. Recipes that
    remove nothing are named, not shown.
    """
    shots = {one.name: shot for one in comparison.results if (shot := last_snapshot(comparison, one)) is not None}
    masking = {name: shot for name, shot in shots.items() if shot.keep_indices.shape[1] < shot.scores.shape[1]}
    if not masking:
        return tag("p", "None of the finished runs removes patches, or has kept a picture of it.", class_="missing")
    first = next(iter(masking.values()))
    shown = {name: shot for name, shot in masking.items() if shot.captions == first.captions}
    whole = [name for name in shots if name not in masking]
    words = [f"Patches that the last step of training keeps of {min(PICTURES, len(first.captions))} pictures that it "
             "was not trained on; what is removed is grey."]
    if whole:
        words.append(f"{', '.join(whole)} {'sees' if len(whole) == 1 else 'see'} all of them.")
    blocks = (_block(i, shown) for i in range(min(PICTURES, len(first.captions))))
    return join(tag("p", " ".join(words)),
                tag("div", *blocks, class_="keeps", style=f"--figures:{min(len(shown) + 1, 8)}"))


def last_snapshot(comparison: ComparisonFiles, one: Results) -> Snapshot | None:
    """Return what the first of a recipe's runs has last looked at, if it can be read."""
    for run in one.runs[:1]:
        paths = sorted((comparison.path / "runs" / str(run["name"]) / "snapshots").glob("step-*.safetensors"))
        if paths:
            try:
                return read_snapshot(paths[-1])
            except CheckpointError:
                return None
    return None


def _block(i: int, shown: dict[str, Snapshot]) -> Html:
    first = next(iter(shown.values()))
    picture = to_image(first.images[i])
    picture.thumbnail((SIDE, SIDE))
    caption = first.captions[i]
    figures = [tag("figure", tag("div", class_="picture", role="img", aria_label=caption), tag("figcaption", caption),
                   class_="source")]
    for name, shot in shown.items():
        number = f"{count(shot.keep_indices.shape[1])} of {count(shot.scores.shape[1])}"
        layer = data_uri(veil_layer(shot.keep_indices[i], shot.grid))
        figures.append(tag(
            "figure", tag("div", tag("img", src=layer, alt=""), class_="picture kept", role="img",
                          aria_label=f"patches that {name} keeps: {caption}"),
            tag("figcaption", tag("b", name), " ", number)))
    # written once, as a property that every copy takes as its background
    return tag("div", *figures, class_="keep", style=f"--picture:url({data_uri(picture)});"
                                                     f"--ratio:{picture.width}/{picture.height}")
