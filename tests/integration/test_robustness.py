"""The scripts of benchmarks/robustness on a few trials each; docs/reliability.md has the figures of more."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "benchmarks" / "robustness"
TRIALS: dict[str, list[str]] = {
    "crash.py": ["--kills", "3"],
    "damage.py": [],
    "faults.py": ["--only", "SlowDown, 12", "reset, 12", "disk"],
    "full_disk.py": ["--places", "3", "2", "4", "3"],
    "hostile_checkpoints.py": [],
    "long_run.py": ["--steps", "400", "--stores", "zarr"],
    "paused_runs.py": ["--trials", "2", "--parallel", "6"],
    "power_loss.py": ["--trials", "2", "--ends", "1"],
    "ray_kills.py": ["--kills", "2", "--per-job", "2"],
    "relocated_runs.py": [],
    "stop_signals.py": ["--trials", "3", "2", "2"],
}


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("script", TRIALS)
def test_all_trials_of_a_script_pass(script: str, tmp_path: Path) -> None:
    arguments = TRIALS[script]
    if script in ("full_disk.py", "power_loss.py") and os.geteuid() != 0:
        pytest.skip("mounting needs root")
    if script == "power_loss.py":
        if not Path("/dev/loop-control").exists():
            pytest.skip("there are no loop devices")
        made = {"ext4": "mkfs.ext4", "xfs": "mkfs.xfs", "btrfs": "mkfs.btrfs"}
        arguments = [*arguments, "--file-systems", *(name for name, tool in made.items() if shutil.which(tool))]
    environment = {**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": str(SCRIPTS.parents[1])}
    done = subprocess.run(
        [sys.executable, str(SCRIPTS / script), *arguments],
        env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=1100,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_script_has_its_trials() -> None:
    assert set(TRIALS) == {path.name for path in SCRIPTS.glob("*.py") if "ArgumentParser" in path.read_text()}
