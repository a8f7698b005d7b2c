"""Put the report of a run together: one HTML file that needs nothing else and loads nothing."""

from pathlib import Path

from aclip.files import write_atomically
from aclip.report.about import environment, recipe, skipped
from aclip.report.classes import class_by_class
from aclip.report.curves import curves
from aclip.report.frame import frame
from aclip.report.incidents import incidents
from aclip.report.markup import tag
from aclip.report.pictures import looks
from aclip.report.results import headline, results
from aclip.report.retrievals import retrievals
from aclip.report.robustness import robustness
from aclip.report.run_files import RunFiles, mapping, read_run

SECTIONS = (
    ("results", "Results", results),
    ("classes", "Class by class", class_by_class),
    ("robustness", "With fewer patches", robustness),
    ("looks", "What the model looks at", looks),
    ("curves", "Training curves", curves),
    ("retrievals", "Best and worst retrievals", retrievals),
    ("recipe", "Recipe and command", recipe),
    ("skipped", "Skipped samples", skipped),
    ("incidents", "Incidents", incidents),
    ("environment", "Environment", environment),
)


def write_report(run_folder: Path) -> Path:
    """Write `report.html` into a run folder from the files that lie there.

    What is missing or damaged is named on the page. The page holds its styles, script and pictures itself,
    its content policy forbids it to load anything or to run any other script, and all text from data is
    escaped.

    Args:
        run_folder: the run's folder, in any state.

    Returns:
        The path of the report.

    Raises:
        ConfigError: there is no such folder.
    """
    run = read_run(run_folder)
    path = run_folder / "report.html"
    write_atomically(path, render(run))
    return path


def render(run: RunFiles) -> str:
    """Return the page for what was read from a run folder."""
    notes = tag("ul", *(tag("li", note) for note in run.notes), class_="notes") if run.notes else None
    optional = {"classes": run.details, "robustness": run.robustness, "incidents": run.incidents}
    sections = [(anchor, title, build(run)) for anchor, title, build in SECTIONS if optional.get(anchor, True)]
    folder = run.path.resolve().name
    name = str(mapping(run.config, "recipe").get("name") or folder)
    return frame(name, headline(run), sections, folder, notes)
