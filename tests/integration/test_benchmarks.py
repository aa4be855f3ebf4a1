"""The scripts in benchmarks/ start from any folder and report machine, commit, date and command in one form."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
RELEASE = "fashion-mnist/consistency/ema-0.9998.safetensors"  # the checkpoint from which the README samples
FOLDERS = ("quality", "store", "tools", "training", "robustness")
SCRIPTS = sorted(
    str(path.relative_to(BENCHMARKS))
    for folder in FOLDERS
    for path in (BENCHMARKS / folder).glob("*.py")
    if "ArgumentParser" in path.read_text()
)


def run(script: str, *arguments: str, where: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": str(BENCHMARKS.parent)}
    command = [sys.executable, str(BENCHMARKS / script), *arguments]
    done = subprocess.run(command, cwd=where, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def print_help(script: Path, where: Path, out: Path) -> None:
    """`python SCRIPT --help` in a process that is forked from the fork server, so that it has imported PyTorch."""
    with out.open("wb") as file:
        os.dup2(file.fileno(), 1)
    os.chdir(where)
    tests = Path(__file__).parents[1]
    own = [entry for entry in sys.path if tests not in (Path(entry), *Path(entry).parents)]
    sys.path[:] = [str(script.parent), str(BENCHMARKS.parent), *own]
    sys.argv = [str(script), "--help"]
    runpy.run_path(str(script), run_name="__main__")


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_starts_from_any_folder(script: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = multiprocessing.get_context("forkserver").Process(
        target=print_help, args=(BENCHMARKS / script, tmp_path, out)
    )
    process.start()
    process.join(120)
    assert process.exitcode == 0
    assert out.read_text().startswith(f"usage: {Path(script).name}")


def test_the_index_of_results_has_a_line_for_every_file() -> None:
    results = BENCHMARKS / "results"
    index = (results / "README.md").read_text()
    kept = {".json", ".txt", ".png"}
    files = {str(path.relative_to(results)) for path in results.rglob("*") if path.suffix in kept}
    assert files == set(re.findall(r"\]\((?!\.\.)([^)]*)\)", index)) - {RELEASE}
    assert (results / RELEASE).stat().st_size <= 7_000_000


def test_every_folder_has_scripts() -> None:
    assert {script.partition("/")[0] for script in SCRIPTS} == set(FOLDERS)


def test_a_report_records_date_machine_commit_and_command(tmp_path: Path) -> None:
    out = tmp_path / "new" / "startup.json"
    text = run("training/startup.py", "--rounds", "1", "--json", str(out), where=tmp_path)
    report = json.loads(out.read_text())
    assert set(report) > {"date", "commit", "command", "machine", "cores", "versions", "ratio"}
    assert report["command"] == "python benchmarks/training/startup.py --rounds 1"
    assert set(report["versions"]) == {"python", "torch"}
    first, second = text.splitlines()[:2]
    assert report["date"] in first and report["commit"] in first and report["machine"] in first
    assert second == report["command"] and str(tmp_path) not in json.dumps(report)
