"""The notebook: its outputs are there, and it runs from its first cell to its last on a few pictures of noise."""

import json
from pathlib import Path

import pytest

from aclip.data import SETS, open_source
from aclip.data.packing import write_shards
from aclip.data.spec import DESCRIPTION
from made_pictures import captioned_noise

NOTEBOOK = Path(__file__).parents[2] / "docs" / "tutorial.ipynb"


def test_outputs_are_there_and_small() -> None:
    nbformat = pytest.importorskip("nbformat")
    cells = [cell for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not [output for cell in cells for output in cell.outputs if output.output_type == "error"]
    assert NOTEBOOK.stat().st_size < 300_000


def stand_in(folder: Path) -> None:
    """Write what `aclip data fetch emoji` would leave as it is, with noise for drawings."""
    (folder / "noise").mkdir(parents=True)
    source = open_source(str(captioned_noise(folder / "noise", 32 * [(40, 40)])))
    for split in ("train", "val_vendor"):
        write_shards(source, folder / "emoji" / split, workers=1)
    pins = {package.spec: package.sha256 for package in SETS["emoji"].packages}
    (folder / "emoji" / DESCRIPTION).write_text(json.dumps({
        "name": "emoji", "packages": pins, "splits": {name: {"samples": 32} for name in ("train", "val_vendor")}}))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of Jupyter's
def test_runs_on_a_few_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    stand_in(tmp_path / "data")
    monkeypatch.setenv("ACLIP_DATA", str(tmp_path / "data"))
    for name, value in {"PICTURES": "32", "MODEL": "vit-micro", "FOLDER": str(tmp_path / "tutorial")}.items():
        monkeypatch.setenv(f"TUTORIAL_{name}", value)
    notebook = nbclient.NotebookClient(nbformat.read(NOTEBOOK, as_version=4), timeout=600).execute()
    assert "largest difference" in notebook.cells[-1].outputs[-1].text
