"""The notebook, from top to bottom in a kernel of its own, with random weights of tiny size."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests.tiny import write_tiny_weights

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "notebooks" / "sampling.ipynb"


def this_interpreter(folder: Path) -> str:
    """Where Jupyter finds a kernel `python3` that is the interpreter of the tests."""
    kernel = folder / "kernels" / "python3" / "kernel.json"
    kernel.parent.mkdir(parents=True)
    command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    kernel.write_text(json.dumps({"argv": command, "display_name": "tests", "language": "python"}))
    return str(folder)


def test_every_cell_runs_and_every_section_shows_a_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tiny_weights(tmp_path / "weights")
    monkeypatch.setenv("SVG_NOTEBOOK_CHECKPOINT", str(tmp_path / "weights"))
    monkeypatch.setenv("JUPYTER_PATH", this_interpreter(tmp_path / "jupyter"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("XLA_FLAGS", "")  # one device, as most readers have
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(NOTEBOOK.parent)}}).execute()

    section, shown = "", {}
    for cell in notebook.cells:
        if cell.cell_type == "markdown" and cell.source.startswith("#"):
            section = cell.source.splitlines()[0].lstrip("# ")
        for output in cell.get("outputs", ()):
            assert output.output_type != "error"
            shown[section] = shown.get(section, 0) + ("image/png" in output.get("data", {}))
    assert shown == {
        "Load": 0,
        "Draw": 1,
        "Guidance and steps": 1,
        "Latents as pictures": 1,
        "Reconstruct a photograph": 1,
    }


def test_outputs_and_machine_paths_are_not_kept() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    for cell in notebook.cells:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None
        assert not any(path in cell.source for path in ("/home", "/root", "/Users", "/tmp"))
