"""Ray Train on a real cluster, one for the whole module: `ray job submit`, a killed worker, preemption, refusals."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

pytest.importorskip("ray")
pytestmark = pytest.mark.timeout(280)
BIN = Path(sys.executable).parent
SETTINGS = [
    "network={width: 8, multipliers: [1], blocks: 1, attention: [], dropout: 0.1, condition: none}",
    "train={steps: 300, batch_size: 64, learning_rate: 0.001, ema: [0.9]}",
    "checkpoint.every_steps=10",
    "sample={every_steps: 0, final: 7}",
    "log_every_steps=10",
]


def arguments(*more: str) -> list[str]:
    given = ["udddm-train", "--device", "cpu", "--store", "zarr"]
    for setting in SETTINGS:
        given += ["--set", setting]
    return [*given, *more]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Cluster:
    environment: dict[str, str]
    token: str

    def submit(self, *more: str) -> subprocess.Popen[str]:
        command = [str(BIN / "ray"), "job", "submit", "--working-dir", str(self.place), "--", *arguments(*more)]
        return subprocess.Popen(
            command, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    place: Path = Path()

    def workers(self) -> list[int]:
        """The pids of this cluster's training workers."""
        return processes_with(self.token, b"ray::RayTrainWorker")


def processes_with(token: str, name: bytes = b"") -> list[int]:
    """The pids of processes whose environment has the token: the cluster's own and no other's."""
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            if (directory / "cmdline").read_bytes().startswith(name) and (
                token.encode() in (directory / "environ").read_bytes()
            ):
                found.append(int(directory.name))
        except OSError:
            continue
    return sorted(found)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    token = uuid.uuid4().hex
    dashboard = free_port()
    environment = {
        **os.environ,
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": token,
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ADDRESS": f"http://127.0.0.1:{dashboard}",
    }
    head = {k: v for k, v in environment.items() if k != "RAY_ADDRESS"}
    place = tmp_path_factory.mktemp("ray")
    log = (place / "head.log").open("wb")
    command = [str(BIN / "ray"), "start", "--head", "--block", "--num-cpus=2", f"--port={free_port()}"]
    command += ["--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"]
    process = subprocess.Popen(command, env=head, stdout=log, stderr=log, cwd=place)
    work = place / "work"
    work.mkdir()
    (work / "mine.py").write_text("from udddm.data.sources import digits\n\ndef data():\n    return digits()\n")
    try:
        deadline = time.monotonic() + 90
        listing = [str(BIN / "ray"), "job", "list"]
        while subprocess.run(listing, env=environment, capture_output=True, timeout=60).returncode:
            assert process.poll() is None and time.monotonic() < deadline, (place / "head.log").read_text()
            time.sleep(0.5)
        yield Cluster(environment, token, work)
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
        for pid in processes_with(token):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()
        log.close()


def fingerprints(run: Path) -> dict[str, str]:
    result = json.loads((run / "result.json").read_text())
    return {key: value for key, value in result.items() if key.endswith("sha256")}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The same run by two processes without Ray."""
    run = tmp_path_factory.mktemp("local") / "run"
    command = [str(BIN / "udddm-train"), *arguments("--workers", "2", "--run-dir", str(run))[1:]]
    subprocess.run(command, check=True, timeout=200, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return fingerprints(run)


def test_a_submitted_job_ends_as_the_local_run(cluster: Cluster, undisturbed: dict[str, str], tmp_path: Path) -> None:
    """With a data set factory from the submitted directory."""
    job = cluster.submit("--workers", "2", "--run-dir", str(tmp_path / "run"), "--set", "data.name=mine:data")
    said = job.communicate(timeout=250)[0]
    assert job.returncode == 0, said
    assert "this is a Ray job" in said and "step 300/300" in said
    assert f"run directory: {tmp_path / 'run'}; the same command resumes it" in said
    assert fingerprints(tmp_path / "run") == undisturbed


def reach(run: Path, step: int, job: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 150
    while not any(int(p.name[5:]) >= step for p in (run / "checkpoints").glob("step-*")):
        assert job.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)


def test_a_killed_worker_costs_one_failure(cluster: Cluster, undisturbed: dict[str, str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = cluster.submit("--workers", "2", "--run-dir", str(run), "--max-failures", "2")
    reach(run, 30, job)
    os.kill(cluster.workers()[-1], signal.SIGKILL)
    said = job.communicate(timeout=250)[0]
    assert job.returncode == 0, said
    assert "failure 1 of 2" in said
    assert fingerprints(run) == undisturbed


@pytest.mark.slow
def test_refusals_are_told_and_end_the_job(cluster: Cluster, tmp_path: Path) -> None:
    """Too many workers for the cluster, and a mistake that the workers find."""
    run = str(tmp_path / "run")
    many = cluster.submit("--workers", "4", "--timeout", "4", "--run-dir", run)
    wrong = cluster.submit("--workers", "2", "--max-failures", "9", "--run-dir", run, "--set", "data.name=mine:dota")
    said = many.communicate(timeout=150)[0]
    assert many.returncode == 1
    assert "error: --workers 4" in said and "room for 2" in said
    said = wrong.communicate(timeout=150)[0]
    assert wrong.returncode == 1
    assert "error: data set 'mine:dota'" in said and "did you mean data?" in said
    assert "failure 1" not in said


@pytest.mark.slow
def test_a_stopped_job_checkpoints_first_and_resumes(
    cluster: Cluster, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    more = ["--workers", "2", "--run-dir", str(run), "--set", "checkpoint.every_steps=1000"]
    job = cluster.submit(*more)
    deadline = time.monotonic() + 150
    while not (run / "metrics.jsonl").exists() or not (run / "metrics.jsonl").read_text():
        assert job.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    listed = subprocess.run(
        [str(BIN / "ray"), "job", "list"], env=cluster.environment, capture_output=True, text=True, timeout=60
    ).stdout
    running = next(part for part in listed.split("JobDetails(")[1:] if "RUNNING" in part)
    name = running.split("submission_id='")[1].split("'")[0]
    stop = [str(BIN / "ray"), "job", "stop", name]
    subprocess.run(stop, env=cluster.environment, capture_output=True, timeout=120)
    said = job.communicate(timeout=120)[0]
    checkpoints = list((run / "checkpoints").glob("step-*"))
    assert len(checkpoints) == 1, said
    again = cluster.submit(*more)
    said = again.communicate(timeout=250)[0]
    assert again.returncode == 0 and f"resuming from {checkpoints[0].name}" in said, said
    assert fingerprints(run) == undisturbed
