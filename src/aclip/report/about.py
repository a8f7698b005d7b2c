"""How the run was made: its command and dataflow, its configuration, what it skipped, and on what it ran."""

import json
from collections import Counter

from aclip.errors import category
from aclip.report.formats import count
from aclip.report.markup import Html, join, table, tag
from aclip.report.run_files import RunFiles, mapping

MAX_SKIPPED = 200


def recipe(run: RunFiles) -> Html:
    """Return the command, the dataflow as text, and the whole configuration folded away."""
    if not run.config:
        return tag("p", "The configuration (config.json) is missing.", class_="missing")
    command, dataflow = run.config.get("command"), run.config.get("dataflow")
    paper = mapping(run.config, "recipe").get("paper")
    rest = {key: value for key, value in run.config.items() if key not in ("dataflow", "command", "versions")}
    return join(
        _block("command", str(command)) if command else None,
        tag("p", f"Method: {paper}", class_="note") if paper else None,
        _block("dataflow", str(dataflow)) if dataflow else None,
        tag("details", tag("summary", "The resolved configuration"),
            _block("configuration", json.dumps(rest, indent=2, ensure_ascii=False))),
    )


def skipped(run: RunFiles) -> Html:
    """Return the samples that could not be used, by name, and how many for which reason."""
    names: dict[str, str] = {}
    for record in run.skipped:
        names.setdefault(str(record.get("key", "?")), str(record.get("reason", "?")))
    if not names:
        return tag("p", "No sample was skipped.", class_="missing")
    reasons = ", ".join(f"{reason} ({count(n)})" for reason, n in Counter(map(category, names.values())).most_common(8))
    shown = [[key, reason] for key, reason in list(names.items())[:MAX_SKIPPED]]
    more = len(names) - len(shown)
    return join(
        tag("p", f"{count(len(names))} {'sample' if len(names) == 1 else 'samples'} could not be used; "
                 f"good ones took their places. Reasons: {reasons}."),
        tag("details", tag("summary", "Their names"), table(["sample", "reason"], shown, numeric_from=2),
            tag("p", f"… and {count(more)} more, in skipped.jsonl.") if more else None),
    )


def environment(run: RunFiles) -> Html:
    """Return versions and machine as far as the configuration holds them."""
    versions = mapping(run.config, "versions")
    if not versions:
        return tag("p", "The configuration names no versions.", class_="missing")
    pairs = (tag("div", tag("dt", str(name)), tag("dd", str(value))) for name, value in versions.items())
    return tag("dl", *pairs, class_="facts versions")


def _block(name: str, text: str) -> Html:
    """Return preformatted text with a button that copies it."""
    return tag("div", tag("button", "Copy", type="button", data_copy=name),
               tag("pre", text, id=name, tabindex="0"), class_="code")
