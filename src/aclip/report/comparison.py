"""Put the tables and the page of a comparison together."""

from pathlib import Path
from statistics import fmean

from aclip.files import write_atomically
from aclip.report.comparison_curves import curves
from aclip.report.comparison_files import ComparisonFiles, Results
from aclip.report.comparison_pictures import kept
from aclip.report.comparison_table import (
    cost_rows,
    detail_rows,
    full_words,
    gigabytes,
    groups,
    is_share,
    leading,
    metric_cell,
    milliseconds,
    ratio,
    summary_rows,
    to_csv,
    to_markdown,
)
from aclip.report.formats import MISSING, compact, count, duration
from aclip.report.frame import frame
from aclip.report.markup import Html, join, table, tag
from aclip.report.outcomes import Metric, exceeds_spread, primary
from aclip.report.run_files import mapping, number

PAGE = "index.html"
MANY = 8  # more recipes than this are shown in tables alone, and numbered where their names are too wide

_SPREAD = ("A row's recipe minus a column's, in percentage points, or in ranks. Bold where it exceeds twice the "
           "spread: |mean - mean| > 2 s, with s the pooled sample standard deviation over the seeds, s² = ((n - 1) s₁² "
           "+ (m - 1) s₂²) / (n + m - 2). A rule of thumb, not a test of significance.")


def write_comparison(comparison: ComparisonFiles) -> Path:
    """Write `table.md`, `table.csv` and the page into a comparison's folder; return the page."""
    write_atomically(comparison.path / "table.md", to_markdown(comparison))
    write_atomically(comparison.path / "table.csv", to_csv(comparison))
    write_atomically(comparison.path / PAGE, render(comparison))
    return comparison.path / PAGE


def render(comparison: ComparisonFiles) -> str:
    """Return the page."""
    sections = [
        ("results", "Results", results(comparison)),
        ("differences", "Differences", differences(comparison)),
        ("curves", "Curves", curves(comparison)),
        ("kept", "What each recipe keeps", kept(comparison)),
        ("cost", "Time, arithmetic, memory", cost(comparison)),
        ("lr", "Learning rates", learning_rates(comparison)),
        ("runs", "Runs", runs(comparison)),
        ("recipe", "Command", command(comparison)),
    ]
    notes = comparison.notes()
    folder = comparison.path.resolve().name
    return frame(f"{folder}: a comparison", headline(comparison), sections, folder,
                 tag("ul", *(tag("li", note) for note in notes), class_="notes") if notes else None)


def headline(comparison: ComparisonFiles) -> Html:
    """Return the header: what was compared on what, and the main number of every recipe."""
    raw, metric = comparison.raw, comparison.primary()
    names = [one.name for one in comparison.results]
    data = raw.get("data")
    sources = ", ".join(map(str, data)) if isinstance(data, list) else str(data)
    facts = [
        ("budget", comparison.budget()),
        ("seeds", ", ".join(map(str, comparison.seeds()))),
        ("pairs in the data", count(number(raw, "num_pairs"))),
        ("batch size", count(number(raw, "batch_size"))),
        ("precision", str(raw.get("precision", MISSING))),
        ("device", f"{raw.get('device', MISSING)}, {threads(raw.get('threads'))} a run"),
    ]
    return tag(
        "header",
        tag("p", "attentive-clip · comparison", class_="kicker"),
        tag("h1", f"{len(names)} recipes" if len(names) > 3 else " · ".join(names)),
        tag("p", f"{raw.get('model')} on {sources}", class_="lead"),
        tag("p", f"{full_words(metric)}, mean and sample standard deviation over the seeds; time and arithmetic of a "
                 f"step relative to {comparison.baseline}", class_="sub") if metric else None,
        tag("div", *(_tile(one, metric) for one in comparison.results), class_="tiles")
        if metric and len(names) <= MANY else None,
        tag("dl", *(tag("div", tag("dt", k), tag("dd", v)) for k, v in facts), class_="facts"),
    )


def results(comparison: ComparisonFiles) -> Html:
    """Return the summary, and all metrics of every set and evaluator."""
    details = [join(tag("h3", f"{held}, {evaluator.replace('_', ' ')}"), table(*detail_rows(comparison, metrics)))
               for (held, evaluator), metrics in groups(comparison).items()]
    rule = ("Mean ± sample standard deviation over the seeds, of the last evaluation of the trained weights; nothing "
            f"is masked in it. Time and arithmetic (MACs) of a training step are relative to {comparison.baseline}, "
            "the time as measured in turns with it.")
    return join(table(*summary_rows(comparison, brief=True)), tag("p", rule, class_="note"),
                tag("details", tag("summary", "All metrics"), *details) if details else None)


def differences(comparison: ComparisonFiles) -> Html:
    """Return a matrix of differences for the leading metric of every set and evaluator."""
    parts = []
    for metric in leading(comparison):
        measured = [one for one in comparison.results if one.metrics.get(metric)]
        if len(measured) > 1:
            names = columns = [one.name for one in measured]
            if len(measured) > MANY:  # as wide as numbers, not as names
                columns = [str(number) for number in range(1, len(measured) + 1)]
                names = [" ".join(pair) for pair in zip(columns, names, strict=True)]
            rows = [[name, *(_difference(one, other, metric) for other in measured)]
                    for name, one in zip(names, measured, strict=True)]
            parts.append(tag("div", tag("h3", full_words(metric)), table(["", *columns], rows)))
    if not parts:
        return tag("p", "Fewer than two recipes have been measured alike.", class_="missing")
    unknown = any(len(one.runs) < 2 for one in comparison.results if one.runs)
    note = " Where a recipe has fewer than two seeds, no spread is known and nothing is bold." if unknown else ""
    recipes = len(comparison.results)
    return join(tag("div", *parts, class_="tables many" if recipes > MANY else "tables",
                    style=f"--columns:{recipes + 1}"),
                tag("p", _SPREAD + note, class_="note"))


def cost(comparison: ComparisonFiles) -> Html:
    """Return measured step times with their quartiles, the arithmetic, and peak memory."""
    timing = mapping(comparison.raw, "timing")
    rows = []
    shown = {comparison.baseline, *(one.name for one in comparison.results)}
    steps = {label: step for label, step in mapping(timing, "steps").items() if label.split(", ")[0] in shown}
    for label, step in steps.items():
        low, median, high = (milliseconds(number(step, key)) for key in ("first_quartile", "median", "third_quartile"))
        rows.append([str(label), median, f"{low} to {high}", count(number(step, "rounds"))])
    base = comparison.baseline
    head, by_recipe = cost_rows(comparison)
    text = compact(number(comparison.raw, "text_tokens"))
    device = timing.get("device", comparison.raw.get("device"))
    words = (f"Before training, one process took optimizer steps of all recipes in turns (A B C, A B C, ...), {base} "
             f"among them, after {timing.get('warmup_rounds', '?')} rounds that do not count: whatever else the "
             f"machine did met all of them. Batches of {count(number(comparison.raw, 'batch_size'))} were read "
             f"beforehand; {device}, {threads(timing.get('threads'))}. Training is the time of the steps as they ran, "
             "with whatever else ran then.")
    arithmetic = (f"Arithmetic is multiply-accumulates of towers and decoders for each pair in a training step, with "
                  f"text of {text} tokens, the mean length to which batches of this data are cut; a trained module "
                  "counts three times its forward pass, an averaged encoder once. Memory is the peak of the training "
                  "process, on CUDA that of its tensors.")
    return join(
        table(head, by_recipe),
        tag("p", words, class_="note") if rows else tag("p", "The steps have not been timed.", class_="missing"),
        table(["steps of", "median", "quartiles", "rounds"], rows) if rows else None,
        tag("p", arithmetic, class_="note"))


def learning_rates(comparison: ComparisonFiles) -> Html:
    """Return every learning rate that was tried, with its result, and which one was taken."""
    lrs = comparison.lrs()
    if not comparison.searched():
        words = f"All were trained at {lrs[0]:g}" if len(lrs) == 1 else "Each recipe was trained at its own rate"
        return tag("p", f"{words}: none was searched for.", class_="missing")
    metric = comparison.primary()
    rows = []
    for one in comparison.results:
        cells = {run["lr"]: primary(run, comparison.sets) for run in one.search}
        row = [one.name]
        for lr in lrs:
            found = cells.get(lr)
            text = MISSING if found is None else f"{100 * found[1]:.1f} %"
            row.append(tag("b", f"{text} ✓") if lr == one.lr else join(text))
        rows.append(row)
    words = (f"All runs of the first seed ({comparison.seeds()[0]}), each with the full budget; the other seeds took "
             f"the best (✓) by {full_words(metric) if metric else 'the first set'}, or by what was measured first of a "
             "recipe that has none. The first seed's run counts among a recipe's seeds, so its mean is favoured a "
             "little, alike for all" + (": with one seed, every number is the best of its rates." if
                                        len(comparison.seeds()) == 1 else "."))
    return join(table(["recipe", *(f"{lr:g}" for lr in lrs)], rows), tag("p", words, class_="note"))


def runs(comparison: ComparisonFiles) -> Html:
    """Return every run with its state, and a link to its own report."""
    rows = []
    for run in comparison.raw.get("runs", []):
        name, found = str(run.get("name")), primary(run, comparison.sets)
        report = comparison.path / "runs" / name / "report.html"
        state = "failed" if run.get("error") else "done" if run.get("finished") else "not finished"
        rows.append([
            tag("a", name, href=f"runs/{name}/report.html") if report.exists() else join(name),
            f"{state}: {run['error']}" if run.get("error") else state,
            f"{100 * found[1]:.1f} %" if found else MISSING, count(number(run, "samples_seen")),
            duration(number(run, "training_seconds")), gigabytes(number(run, "peak_memory"))])
    return table(["run", "state", "main metric", "samples", "training", "memory"], rows, numeric_from=2)


def command(comparison: ComparisonFiles) -> Html:
    """Return the command that continues or repeats the comparison."""
    return tag("div", tag("button", "Copy", type="button", data_copy="command"),
               tag("pre", str(comparison.raw.get("command", "")), id="command", tabindex="0"), class_="code")


def threads(number_of: object) -> str:
    """Return a number of threads in words."""
    return f"{MISSING if number_of is None else number_of} {'thread' if number_of == 1 else 'threads'}"


def _tile(one: Results, metric: Metric) -> Html:
    cell = metric_cell(one, metric).partition(" (n")[0]
    value, _, around = cell.removesuffix(" %").partition(" ± ")
    return tag(
        "div",
        tag("h3", one.name),
        tag("p", tag("b", f"{value} %" if cell.endswith("%") else value),
            tag("span", f"± {around}") if around else None, class_="big"),
        tag("p", tag("span", f"time {ratio(one.relative_time)} · MACs {ratio(one.relative_cost)}")),
        class_="tile")


def _difference(one: Results, other: Results, metric: Metric) -> Html:
    if one is other:
        return tag("span", MISSING, class_="again")
    first, second = one.metrics[metric], other.metrics[metric]
    points = round((100.0 if is_share(metric) else 1.0) * (fmean(first) - fmean(second)), 1)
    text = f"{points + 0.0:+.1f}"  # + 0.0: no negative zero
    return tag("b", text) if exceeds_spread(first, second) else tag("span", text, class_="within")
