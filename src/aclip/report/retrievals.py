"""The best and the worst retrievals, as pictures with the captions that the model preferred."""

import base64
import binascii
from collections.abc import Sequence

from aclip.files import as_file_name
from aclip.report.formats import count
from aclip.report.markup import Html, join, tag
from aclip.report.run_files import Record, RunFiles, number

KINDS = (("best", "Best", "Right, and by the widest margin over any other caption."),
         ("worst", "Worst", "The true caption came out furthest down."))


def retrievals(run: RunFiles) -> Html:
    """Return, for every set, cards of its best and worst pictures."""
    evaluated = {as_file_name(name): name for name in (str(record.get("set", "?")) for record in run.evaluations)}
    order = list(evaluated)
    files = sorted((file for file, examples in run.examples.items() if examples),
                   key=lambda file: order.index(file) if file in evaluated else len(order))
    sets = [(evaluated.get(file, file), run.examples[file]) for file in files]
    if not sets:
        return tag("p", "No examples were kept: retrieval on a held-out set writes them.", class_="missing")
    blocks = []
    for i, (name, examples) in enumerate(sets):
        groups = [_group(title, words, [e for e in examples if e.get("kind") == kind])
                  for kind, title, words in KINDS]
        # All sets but the first are folded away: the page stays short, and nothing is lost.
        blocks.append(tag("details", tag("summary", name), *groups, open="" if i == 0 else None))
    return join(*blocks)


def _group(title: str, words: str, examples: Sequence[Record]) -> Html:
    cards = [_card(example) for example in examples]
    body = tag("div", *cards, class_="cards") if cards else tag("p", "None.", class_="missing")
    return join(tag("h3", title, " ", tag("small", words)), body)


def _card(example: Record) -> Html:
    caption, rank = str(example.get("caption", "")), number(example, "rank")
    top = example.get("top")
    items = [item for item in top if isinstance(item, dict)] if isinstance(top, list) else []
    return tag(
        "article",
        tag("div", _thumbnail(example, caption),
            tag("div", tag("h4", caption),
                tag("p", tag("b", f"rank {count(rank)}", class_="rank right" if rank == 1 else "rank"),
                    tag("span", str(example.get("key", "")), class_="name")),
                class_="words"),
            class_="top"),
        tag("ol", *(_candidate(item, caption) for item in items)),
        class_="card",
    )


def _thumbnail(example: Record, caption: str) -> Html | None:
    data = str(example.get("thumbnail", ""))
    try:
        base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError):
        return None
    return tag("img", src=f"data:image/png;base64,{data}", alt=caption) if data else None


def _candidate(item: Record, caption: str) -> Html:
    words, similarity = str(item.get("caption", "")), number(item, "similarity") or 0.0
    right = words.casefold().split() == caption.casefold().split()
    width = 100.0 * min(max(similarity, 0.0), 1.0)
    return tag("li", tag("i", style=f"width:{width:.1f}%"), tag("span", words), tag("b", f"{similarity:.2f}"),
               class_="right" if right else None)
