"""Ray Train on a real cluster, shared by this module: `ray job submit`, a killed worker, preemption, and errors."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from udddm.runs import remote
from udddm.storage import open_object_store
from udddm.testing.cluster import BIN, Cluster, free_port, running
from udddm.testing.s3 import BUCKET, S3Server

pytest.importorskip("ray")
pytestmark = pytest.mark.timeout(280)
SETTINGS = [
    "network={base_channels: 8, channel_mult: [1], blocks_per_level: 1, attention_resolutions: [], "
    "dropout: 0.1, condition: none}",
    "train={steps: 100, batch_size: 64, learning_rate: 0.001, ema: [0.9]}",
    "checkpoint.every_steps=10",
    "sample={every_steps: 0, final: 7}",
    "log_every_steps=10",
]


def arguments(*more: str) -> list[str]:
    given = ["udddm-train", "--device", "cpu", "--store", "zarr"]
    for setting in SETTINGS:
        given += ["--set", setting]
    return [*given, *more]


def submit(cluster: Cluster, *more: str, variables: dict[str, str] | None = None) -> subprocess.Popen[str]:
    return cluster.submit(*arguments(*more), variables=variables)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with running(tmp_path_factory.mktemp("ray"), cpus=2) as found:
        code = "from udddm.data.sources import digits\n\ndef data():\n    return digits()\n"
        (found.directory / "mine.py").write_text(code)
        yield found


def fingerprints(run: Path) -> dict[str, str]:
    result = json.loads((run / "result.json").read_text())
    return {key: value for key, value in result.items() if key.endswith("sha256")}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The same run with two processes without Ray."""
    run = tmp_path_factory.mktemp("local") / "run"
    command = [str(BIN / "udddm-train"), *arguments("--workers", "2", "--run-dir", str(run))[1:]]
    subprocess.run(command, check=True, timeout=200, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return fingerprints(run)


def reach(run: Path, step: int, job: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 150
    while not any(int(p.name[5:]) >= step for p in (run / "checkpoints").glob("step-*")):
        assert job.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("killed", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_submitted_job_gives_the_result_of_a_local_run(
    killed: bool, cluster: Cluster, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    """The data set factory is in the submitted directory. A killed worker counts as one failure."""
    run = tmp_path / "run"
    more = ["--run-dir", str(run), "--max-failures", "2", "--set", "data.name=mine:data"]
    job = submit(cluster, "--workers", "2", *more)
    if killed:
        reach(run, 20, job)
        os.kill(cluster.workers()[-1], signal.SIGKILL)
    said = job.communicate(timeout=250)[0]
    assert job.returncode == 0, said
    assert "this is a Ray job" in said and "step 100/100" in said
    assert f"run directory: {run}; the same command resumes it" in said
    assert ("failure 1 of 2" in said) == ("resuming from step-" in said) == killed, said
    assert fingerprints(run) == undisturbed


@pytest.mark.slow
def test_errors_are_reported_and_end_the_job(cluster: Cluster, tmp_path: Path) -> None:
    """Too many workers for the cluster, and an error that only the workers detect."""
    run = str(tmp_path / "run")
    many = submit(cluster, "--workers", "4", "--timeout", "4", "--run-dir", run)
    wrong = submit(cluster, "--workers", "2", "--max-failures", "9", "--run-dir", run, "--set", "data.name=mine:dota")
    said = many.communicate(timeout=150)[0]
    assert many.returncode == 1
    assert "error: --workers 4" in said and "enough for 2" in said
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
    job = submit(cluster, *more)
    deadline = time.monotonic() + 150
    while not (run / "metrics.jsonl").exists() or not (run / "metrics.jsonl").read_text():
        assert job.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    current = next(part for part in cluster.call("job", "list").split("JobDetails(")[1:] if "RUNNING" in part)
    cluster.call("job", "stop", current.split("submission_id='")[1].split("'")[0])
    said = job.communicate(timeout=120)[0]
    checkpoints = list((run / "checkpoints").glob("step-*"))
    assert len(checkpoints) == 1, said
    again = submit(cluster, *more)
    said = again.communicate(timeout=250)[0]
    assert again.returncode == 0 and f"resuming from {checkpoints[0].name}" in said, said
    assert fingerprints(run) == undisturbed


@pytest.mark.slow
def test_a_lost_node_is_replaced_without_a_shared_disk(cluster: Cluster, s3_server: S3Server, tmp_path: Path) -> None:
    """Four workers on two nodes, with the run on S3. One node is lost and replaced; the result is undisturbed."""
    run, url = tmp_path / "local", f"s3://{BUCKET}/{uuid.uuid4().hex}"
    command = [str(BIN / "udddm-train"), *arguments("--workers", "4", "--run-dir", str(run))[1:]]
    subprocess.run(command, check=True, timeout=200, env={**os.environ, "OMP_NUM_THREADS": "1"})
    variables = {**s3_server.environment(), remote.SCRATCH: str(tmp_path / "scratch")}
    cluster.add_node(cpus=2)
    more = ["--workers", "4", "--run-dir", url, "--max-failures", "3", "--timeout", "60"]
    job = submit(cluster, *more, variables=variables)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in s3_server.environment().items():
            patch.setenv(name, value)
        objects = open_object_store(url)
        deadline = time.monotonic() + 150
        while not objects.exists("checkpoints/step-00000030/manifest.json"):
            if job.poll() is not None or time.monotonic() > deadline:
                job.kill()
                raise AssertionError(job.communicate()[0])
            time.sleep(0.1)
        while "udddm_images_per_second" not in cluster.metrics():  # the nodes collect metrics every ten seconds
            assert job.poll() is None and time.monotonic() < deadline
            time.sleep(0.5)
        cluster.lose_node(0)
        cluster.add_node(cpus=2)
        said = job.communicate(timeout=250)[0]
        assert job.returncode == 0, said
        assert "failure 1 of 3" in said and "resuming from step-" in said
        result = json.loads(objects.get("result.json"))
    assert {key: value for key, value in result.items() if key.endswith("sha256")} == fingerprints(run)
    cluster.lose_node(1)


def test_an_address_without_a_cluster_is_refused_immediately(tmp_path: Path) -> None:
    address = f"127.0.0.1:{free_port()}"
    given = [*arguments("--backend", "ray", "--run-dir", str(tmp_path / "run"))]
    done = subprocess.run(
        [str(BIN / given[0]), *given[1:]], env={**os.environ, "RAY_ADDRESS": address}, stderr=subprocess.PIPE, text=True
    )
    assert done.returncode == 2
    assert f"RAY_ADDRESS={address}: no Ray cluster responds there" in done.stderr
