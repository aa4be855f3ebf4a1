"""The cluster files in examples/: their commands are valid, and the Slurm script trains, stops and resumes.

`srun` and `scontrol` stand in here for Slurm's: they start the ranks, pass SIGTERM on, and note a requeue.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from udddm import config
from udddm.cli.train import _parser
from udddm.order import most_lanes

EXAMPLES = Path(__file__).parents[2] / "examples"
SRUN = """#!{python}
import os, signal, subprocess, sys
command = [a for i, a in enumerate(sys.argv[1:]) if not (a.startswith("--") and "bash" in sys.argv[i + 1:])]
tasks = [{{**os.environ, "SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)}} for i in (0, 1)]
ranks = [subprocess.Popen(command, env=task) for task in tasks]
signal.signal(signal.SIGTERM, lambda number, frame: [rank.terminate() for rank in ranks])
sys.exit(max(rank.wait() for rank in ranks))
"""
SCONTROL = """#!/bin/sh
if [ "$1" = show ]; then echo 127.0.0.1; else echo "$@" >> {log}; fi
"""
SETTINGS = [
    "network={base_channels: 8, channel_mult: [1], blocks_per_level: 1, attention_resolutions: [], "
    "dropout: 0, condition: none}",
    "train={steps: 80, batch_size: 64, learning_rate: 0.001, ema: [0.9]}",
    "checkpoint.every_steps=10",
    "sample={every_steps: 0, final: 0}",
]


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """The environment of a job on one node with two tasks."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        program = programs / name
        program.write_text(text.format(python=sys.executable, log=tmp_path / "requeued"))
        program.chmod(0o755)
    return {
        **os.environ,
        "PATH": f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "SLURM_JOB_NODELIST": "here",
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_NTASKS": "2",
        "SLURM_CPUS_PER_TASK": "1",
    }


def test_the_slurm_script_stops_requeues_and_resumes(slurm: dict[str, str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = [str(EXAMPLES / "slurm.sh"), f"--run-dir={run}", "--store=zarr", "--device=cpu"]
    command += [f"--set={setting}" for setting in SETTINGS]
    first = subprocess.Popen(command, env=slurm, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (run / "checkpoints" / "step-00000020").exists():
        if first.poll() is not None or time.monotonic() > deadline:
            first.kill()
            raise AssertionError(first.communicate()[1])
        time.sleep(0.02)
    children = Path(f"/proc/{first.pid}/task/{first.pid}/children").read_text().split()
    os.kill(int(children[0]), signal.SIGTERM)  # Slurm signals the steps of a job, not the script
    said = first.communicate(timeout=60)[1]
    assert first.returncode == 143 and "requeue" in (tmp_path / "requeued").read_text(), said
    assert not (run / "result.json").exists(), said
    assert "stopped by SIGTERM" in said
    second = subprocess.run(command, env=slurm, stderr=subprocess.PIPE, text=True, timeout=120)
    assert second.returncode == 0, second.stderr
    assert "2 ranks" in second.stderr and "resuming from step-" in second.stderr
    assert json.loads((run / "result.json").read_text())["steps"] == 80


def test_the_slurm_script_requeues_a_preempted_job(slurm: dict[str, str], tmp_path: Path) -> None:
    program = tmp_path / "bin" / "srun"
    for code, requeued in ((143, True), (1, False), (0, False)):
        (tmp_path / "requeued").unlink(missing_ok=True)
        program.write_text(f"#!/bin/sh\nexit {code}\n")
        done = subprocess.run([str(EXAMPLES / "slurm.sh")], env=slurm, timeout=60)
        assert done.returncode == code
        assert (tmp_path / "requeued").exists() == requeued


def manifest() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((EXAMPLES / "rayjob.yaml").read_text())
    return found


def test_the_command_of_the_rayjob_is_valid() -> None:
    entry = shlex.split(manifest()["spec"]["entrypoint"])
    assert entry[0] == "udddm-train"
    arguments = _parser().parse_args(entry[1:])
    loaded = config.load_config(arguments.config)
    lanes = most_lanes(loaded.order, loaded.train.batch_size)
    assert any(lanes % workers == 0 for workers in range(arguments.workers[0], arguments.workers[1] + 1))


def test_ray_is_the_same_version_everywhere() -> None:
    pinned = next(
        line.split("==")[1]
        for line in (EXAMPLES.parent / "constraints.txt").read_text().splitlines()
        if line.startswith("ray==")
    )
    assert manifest()["spec"]["rayClusterSpec"]["rayVersion"] == pinned
    assert f"rayproject/ray:{pinned}-" in (EXAMPLES / "Dockerfile").read_text()


def test_the_guide_makes_the_token_that_a_fresh_machine_lacks(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    guide = (EXAMPLES.parent / "docs" / "cluster.md").read_text()
    token, start = (guide.index(command) for command in ("ray get-auth-token --generate", "ray start --head"))
    assert token < start
    command = [str(Path(sys.executable).with_name("ray")), "get-auth-token", "--generate"]
    environment = {**os.environ, "HOME": str(tmp_path)}
    subprocess.run(command, env=environment, check=True, capture_output=True, timeout=120)
    assert (tmp_path / ".ray" / "auth_token").read_text().strip()
