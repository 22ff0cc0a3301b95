"""The notebooks run from top to bottom."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"
if not FOLDER.is_dir():
    pytest.skip("needs the source tree", allow_module_level=True)
nbclient = pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")
pytest.importorskip("ipykernel")
pytest.importorskip("gym_pusht")


@pytest.mark.slow  # a process of its own: nothing to see for a sanitizer
@pytest.mark.parametrize("name", sorted(path.name for path in FOLDER.glob("*.ipynb")))
def test_a_notebook_runs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEEDS", "1")
    notebook = nbformat.read(FOLDER / name, as_version=4)
    nbclient.NotebookClient(
        notebook, timeout=300, resources={"metadata": {"path": FOLDER}}
    ).execute()
    pictures = [
        output
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if "image/png" in output.get("data", {})
    ]
    assert len(pictures) >= 3
    if name.startswith("lerobot"):  # which it times where it is installed
        said = "".join(
            output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", [])
        )
        installed = importlib.util.find_spec("lerobot") is not None
        assert ("LeRobot is not installed here" in said) != installed
