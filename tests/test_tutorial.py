"""Does the tutorial run, and does it show what came out? `python tests/test_tutorial.py` renews what it shows."""

from __future__ import annotations

import os
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat import NotebookNode

REPOSITORY = Path(__file__).resolve().parent.parent
TUTORIAL = REPOSITORY / "docs" / "tutorial.ipynb"


def execute(notebook: NotebookNode) -> NotebookNode:
    """Run every cell in a new kernel of this Python; a cell that fails raises its error."""
    client = NotebookClient(notebook, timeout=600, kernel_name="python3", record_timing=False, coalesce_streams=True)
    # tqdm advises to install widgets, naming a file of this machine.
    environment = {"PYTHONPATH": str(REPOSITORY), "PYTHONWARNINGS": "ignore:IProgress not found"}
    return client.execute(env=os.environ | environment)


def code_cells() -> list[NotebookNode]:
    return [cell for cell in nbformat.read(TUTORIAL, as_version=4).cells if cell.cell_type == "code"]


@pytest.mark.filterwarnings("default")  # the client's, which are not ours to mend
def test_every_cell_of_the_tutorial_runs(monkeypatch, tmp_path):
    for variable in ("TMPDIR", "IPYTHONDIR", "JUPYTER_RUNTIME_DIR"):
        monkeypatch.setenv(variable, str(tmp_path))
    before = nbformat.read(TUTORIAL, as_version=4)
    kinds = [[output.output_type for output in cell.outputs] for cell in code_cells()]
    after = [cell for cell in execute(before).cells if cell.cell_type == "code"]
    assert [[output.output_type for output in cell.outputs] for cell in after] == kinds
    assert len(list(tmp_path.glob("mitofm-tutorial-*/runs/*/run.json"))) == 3


def test_the_tutorial_is_kept_as_executed_from_top_to_bottom():
    cells = code_cells()
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert all(cell.outputs for cell in cells)
    assert sum("image/jpeg" in output.get("data", {}) for cell in cells for output in cell.outputs) == 2


def test_the_tutorial_names_no_place_of_the_machine_that_executed_it():
    text = TUTORIAL.read_text(encoding="utf-8")
    assert not re.findall(r"(?<![\w.])/(?:home|tmp|root|work|usr|var|Users|opt)/", text)


def test_the_tutorial_imports_public_names_alone():
    imports = re.findall(
        r"^from ((?:extract|features|finetune|probe)\S*) import", "\n".join(cell.source for cell in code_cells()), re.M
    )
    assert imports
    assert set(imports) <= {"extract", "features", "finetune", "probe"}


if __name__ == "__main__":
    renewed = execute(nbformat.read(TUTORIAL, as_version=4))
    renewed.metadata.language_info = {"name": "python"}  # whatever the version of Python
    nbformat.write(renewed, TUTORIAL)
