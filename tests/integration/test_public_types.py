"""A type checker sees the same public API as Python: wrong names and options are errors."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "udddm"
LINES = {
    "import udddm": "",
    "udddm.trian": 'Module has no attribute "trian"',
    'udddm.train({}, run_dir="x", max_failure=1)': 'Unexpected keyword argument "max_failure"',
    'udddm.train({}, run_dir="x", workers="2")': 'Argument "workers"',
    'udddm.train({}, run_dir="x", max_failures=1, store="zarr").steps': "",
}


def test_mypy_sees_the_public_names(tmp_path: Path) -> None:
    """Only the two modules that define the API are followed, which takes seconds."""
    pytest.importorskip("mypy")
    program = tmp_path / "program.py"
    program.write_text("\n".join(LINES))
    modules = [str(PACKAGE / "__init__.py"), str(PACKAGE / "api.py"), str(program)]
    command = [sys.executable, "-m", "mypy", "--config-file=", "--follow-imports=skip", "--cache-dir", str(tmp_path)]
    done = subprocess.run([*command, *modules], cwd=PACKAGE.parent, capture_output=True, text=True, timeout=200)
    for number, (line, error) in enumerate(LINES.items(), 1):
        found = [each for each in done.stdout.splitlines() if f"program.py:{number}: error:" in each]
        assert [error in each for each in found] == ([True] if error else []), (line, done.stdout, done.stderr)
