"""examples/quickstart.ipynb runs from its first cell to its last, and is stored without outputs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "examples" / "quickstart.ipynb"
EXECUTE = """
import sys, nbformat
from jupyter_client.manager import KernelManager
from nbclient import NotebookClient
source, target, folder, sockets = sys.argv[1:]
notebook = nbformat.read(source, as_version=4)
kernel = KernelManager(kernel_name="python3", transport="ipc", ip=sockets)
NotebookClient(notebook, km=kernel, timeout=240, resources={"metadata": {"path": folder}}).execute()
nbformat.write(notebook, target)
"""
"""In a separate process, because sockets that are closed by the garbage collector are warnings, which fail a test."""


@pytest.fixture(scope="module")
def executed(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The notebook with its outputs, run in `examples/` with one thread and an empty cache, without the network."""
    place = tmp_path_factory.mktemp("notebook")
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "TMPDIR": str(place),
        "XDG_CACHE_HOME": str(place / "cache"),
        "IPYTHONDIR": str(place / "ipython"),
    }
    arguments = [str(NOTEBOOK), str(place / "executed.ipynb"), str(NOTEBOOK.parent), str(place / "kernel")]
    command = [sys.executable, "-c", EXECUTE, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return nbformat.read(place / "executed.ipynb", as_version=4)


def outputs(notebook: Any, kind: str) -> list[Any]:
    return [each for cell in notebook.cells for each in cell.get("outputs", []) if each.output_type == kind]


def test_the_stored_notebook_has_no_outputs() -> None:
    cells = nbformat.read(NOTEBOOK, as_version=4).cells
    assert not [cell for cell in cells if cell.get("outputs") or cell.get("execution_count")]


def test_it_shows_pictures_of_the_data_the_samples_and_the_state(executed: Any) -> None:
    pictures = [each.data["image/png"] for each in outputs(executed, "display_data")]
    assert len(pictures) == len(set(pictures)) == 5


def test_more_evaluations_score_better(executed: Any) -> None:
    printed = "".join(each.text for each in outputs(executed, "stream") if each.name == "stdout")
    distances = [float(value) for value in re.findall(r"evaluations: fd (\d+)", printed)]
    assert len(distances) == 3 and sorted(distances, reverse=True) == distances
    assert distances[0] < 200  # pure noise has 835


def test_links_of_the_notebook_resolve() -> None:
    cells = nbformat.read(NOTEBOOK, as_version=4).cells
    text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    links = re.findall(r"\]\(([^)#]+)", text)
    assert links and not [link for link in links if not (NOTEBOOK.parent / link).exists()]
