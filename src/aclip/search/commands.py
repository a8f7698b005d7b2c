"""`aclip index`, `aclip search` and `aclip serve`; they import torch and the like only when called."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aclip.models import LoadedModel
    from aclip.search.store import Hit, Index

    ModelLike = str | Path | LoadedModel
    PathLike = str | Path
    Words = str | Path | Sequence[str]
else:  # what the command line parses
    ModelLike, PathLike, Words = str, str, tuple[str, ...]

CELL = 224  # pixels: side of an image on a contact sheet
_GROUPS = 20  # of near-duplicates that a table or sheet shows


def index(
    model: ModelLike, source: Words, *, output: PathLike, weights: Literal["online", "ema"] = "online",
    device: str = "auto", workers: int | None = None,
) -> Index:
    """Encode images so that they can be searched: features, names and captions in a folder.

    Called again, it encodes only images that are new or changed, and forgets those that are gone. An image is unchanged
    if its file has the same path, size and modification time; in shards and tables, the same bytes. A call that was
    killed is continued by the next one, with the same result.

    Args:
        model: a run's folder, any model that training starts from (NAME:TAG, NAME:FILE, a folder), or a loaded model.
        source: images of every kind that training takes, captions or not; one or several.
        output: folder of the index.
        weights: of a run: the trained model, or its image tower's moving average (ema).
        device: auto, cpu, cuda, cuda:1, mps.
        workers: processes that read images; default: what suits the cores and the device.

    Returns:
        The index. Images that cannot be read are counted, logged and named in its skipped.jsonl.

    Raises:
        ConfigError: an output that holds something else.
        DataError: no usable image, a source that cannot be read, or a full disk; what was encoded stays.
        CheckpointError: features that are NaN or inf.
        MissingDependencyError: pyarrow is not installed.

    Example:
        >>> index = aclip.index("runs/first", ["photos", "more.csv"], output="photos.index")
    """
    from aclip.search.build import build

    return build(model, source, Path(output), weights, device, workers)


def search(
    index: str, query: tuple[str, ...] = (), *, not_: tuple[str, ...] = (), top: int = 20, duplicates: bool = False,
    threshold: float = 0.97, sheet: str | None = None, model: str | None = None,
    device: str = "auto",
) -> list[Hit] | list[list[Hit]]:
    """Search an index by text or image, or for near-duplicates.

    Args:
        index: folder that `aclip index` wrote.
        query: a text, an image file, or several of both, which are added up.
        not_: texts that the images should not be like.
        top: number of images.
        duplicates: list groups of images that look nearly the same instead.
        threshold: of near-duplicates: least cosine of their features.
        sheet: write the images found to this PNG or JPEG file as well.
        model: where the model lies if it has been moved.
        device: auto, cpu, cuda, cuda:1, mps.

    Returns:
        The images found, the most similar first; or groups of near-duplicates, the largest first.
    """
    from aclip.errors import ConfigError
    from aclip.search.store import Index

    if duplicates and (query or not_):
        raise ConfigError("--duplicates compares the images of the index with each other: leave the query out")
    if sheet is not None and Path(sheet).suffix.lower() not in (".png", ".jpg", ".jpeg"):
        raise ConfigError(f"--sheet is the name of a .png or .jpg file, not '{sheet}'")
    opened = Index(index, model=model, device=device)
    groups = opened.duplicates(threshold) if duplicates else [opened.search(*query, not_=not_, top=top)]
    _print_table(opened, groups, duplicates)
    if sheet is not None and groups:
        write_sheet(opened, groups[:_GROUPS], Path(sheet))
    return groups if duplicates else groups[0]


def serve(
    index: PathLike, *, host: str = "127.0.0.1", port: int = 8000, password: str | None = None,
    model: str | None = None, device: str = "auto",
) -> None:
    """Serve a page to search an index with, until it is interrupted.

    Text and images in, a grid of images out; each opens large with the map of a text over it, the patches kept, and
    what is similar. Nothing is loaded from elsewhere.

    Args:
        index: folder that `aclip index` wrote.
        host: address to listen on; another than this machine's own needs a password.
        port: to listen on; 0 takes a free one.
        password: asked for by the browser, with any user name; also from the variable ACLIP_PASSWORD.
        model: where the model lies if it has been moved.
        device: auto, cpu, cuda, cuda:1, mps.

    Raises:
        ConfigError: no index, no password for others, or a port that is taken.
        MissingDependencyError: starlette or uvicorn is not installed.

    Example:
        >>> aclip.serve("photos.index", port=8000)  # doctest: +SKIP
    """
    import os

    from aclip.errors import ConfigError, MissingDependencyError
    from aclip.search.store import Index

    password = password or os.environ.get("ACLIP_PASSWORD") or None
    if host not in ("127.0.0.1", "localhost", "::1") and password is None:
        raise ConfigError(f"--host {host} lets others in: set a --password, or leave --host out")
    try:
        from aclip.search import server
    except ModuleNotFoundError as error:
        raise MissingDependencyError("aclip serve needs starlette and uvicorn: pip install 'attentive-clip[serve]'"
                                     ) from error
    server.run(Index(index, model=model, device=device), host, port, password)


def _print_table(index: Index, groups: Sequence[Sequence[Hit]], duplicates: bool) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from aclip.examination.glance import one_line

    console = Console(highlight=False)
    if duplicates:
        console.print(f"{len(groups):,} groups of near-duplicates, {sum(map(len, groups)):,} of {len(index):,} images"
                      + (f"; the largest {_GROUPS}:" if len(groups) > _GROUPS else ""))
    for number, group in enumerate(groups[:_GROUPS]):
        table = Table("similarity", "image", "caption", box=None, pad_edge=False, show_header=number == 0)
        for hit in group:
            table.add_row(f"{hit.similarity:.3f}", Text(hit.path or hit.name, overflow="fold"),
                          Text(one_line(hit.captions[0] if hit.captions else "")))
        console.print(table)
        if number + 1 < len(groups[:_GROUPS]):
            console.print()


def write_sheet(index: Index, groups: Sequence[Sequence[Hit]], path: Path) -> None:
    """Write the images of groups, similarity and caption below each, to an image file; each group begins a row."""
    from PIL import Image, ImageOps

    from aclip.report.sheet import Panel, draw_sheet

    sheets = [draw_sheet([
        Panel(ImageOps.pad(index.thumbnail(hit.row, CELL), (CELL, CELL), color="white"),
              hit.captions[0] if hit.captions else Path(hit.name).name, f"{hit.similarity:.3f}")
        for hit in group], columns=5, side=CELL) for group in groups]
    page = Image.new("RGB", (max(sheet.width for sheet in sheets), sum(sheet.height for sheet in sheets)), "white")
    top = 0
    for sheet in sheets:
        page.paste(sheet, (0, top))
        top += sheet.height
    path.parent.mkdir(parents=True, exist_ok=True)
    page.save(path)
