"""The notebook runs from its first cell to its last, on a few pictures."""

from pathlib import Path

import pytest

from aclip.data.spec import split_sizes
from aclip.files import data_root

NOTEBOOK = Path(__file__).parents[2] / "docs" / "tutorial.ipynb"


def test_outputs_are_there_and_small() -> None:
    nbformat = pytest.importorskip("nbformat")
    cells = [cell for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not [output for cell in cells for output in cell.outputs if output.output_type == "error"]
    assert NOTEBOOK.stat().st_size < 300_000


@pytest.mark.slow
@pytest.mark.skipif(not split_sizes(data_root() / "emoji"), reason="needs `aclip data fetch emoji`")
@pytest.mark.filterwarnings("ignore")  # of Jupyter's
def test_runs_on_a_few_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    for name, value in {"PICTURES": "32", "MODEL": "vit-micro", "FOLDER": str(tmp_path / "tutorial")}.items():
        monkeypatch.setenv(f"TUTORIAL_{name}", value)
    notebook = nbclient.NotebookClient(nbformat.read(NOTEBOOK, as_version=4), timeout=600).execute()
    assert "largest difference" in notebook.cells[-1].outputs[-1].text
