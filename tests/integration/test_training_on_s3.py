"""A run with its x0-state on S3 gives the same result as on a local disk or in memory, also if it was killed."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
import uuid
from pathlib import Path

import pytest
import torch

import udddm
from udddm.cli.train import main as train_command
from udddm.config import RunConfig, load_config
from udddm.testing.faults import FaultProxy
from udddm.testing.s3 import BUCKET, S3Server
from udddm.tools import inspect

OVERRIDES = [
    "network={width: 8, multipliers: [1], blocks: 1, attention: [], dropout: 0, condition: none}",
    "order={lanes: 8, chunk: 32, window: 2}",
    "train={steps: 24, batch_size: 128, learning_rate: 1.0e-3, ema: [0.9]}",
    "checkpoint={every_steps: 6, keep: 1}",
    "sample={every_steps: 0, final: 0}",
]
FINGERPRINTS = ("steps", "weights_sha256", "ema_sha256", "state_sha256")


def config(kind: str, url: str | None = None) -> RunConfig:
    return load_config(None, [*OVERRIDES, f"store={{kind: {kind}, url: {url or 'null'}}}"])


def train(run: Path, kind: str, url: str | None = None) -> dict[str, object]:
    result = udddm.train(config(kind, url), run_dir=run, device="cpu")
    return {key: result[key] for key in FINGERPRINTS}


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """The result of the uninterrupted run in memory."""
    return train(tmp_path_factory.mktemp("memory") / "run", "gpu")


def command(arguments: list[str], environment: dict[str, str], threads: int, log: Path) -> None:
    """`udddm-train` in a process that was forked from the fork server, which has other variables."""
    os.environ.clear()
    os.environ.update(environment)
    with log.open("ab") as file:
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(threads)
    sys.exit(train_command(arguments))


def killed(run: Path, url: str, environment: dict[str, str], checkpoint: str) -> None:
    """Start or resume the run in another process and kill it once a checkpoint is there."""
    arguments = [f"--run-dir={run}", "--store=zarr", f"--store-url={url}"]
    arguments += ["--device=cpu", *(f"--set={override}" for override in OVERRIDES)]
    threads = torch.get_num_threads()  # their number determines the order of summation
    process = multiprocessing.get_context("forkserver").Process(
        target=command, args=(arguments, {**os.environ, **environment}, threads, run.parent / "log")
    )
    process.start()
    try:
        deadline = time.monotonic() + 120
        while not (run / "checkpoints" / checkpoint).exists():
            assert process.is_alive() and time.monotonic() < deadline, (run.parent / "log").read_text()
            time.sleep(0.01)
    finally:
        process.kill()
        process.join()
    assert not (run / "result.json").exists(), "killed too late to be a useful test"


def test_the_location_of_the_state_does_not_change_the_result(
    expected: dict[str, object], s3: S3Server, tmp_path: Path
) -> None:
    url = f"s3://{BUCKET}/{uuid.uuid4().hex}"
    assert train(tmp_path / "disk", "zarr") == expected
    assert train(tmp_path / "s3", "zarr", url) == expected
    chunks, damaged = inspect.verify(inspect.find(str(tmp_path / "s3")))
    assert chunks and not damaged
    assert s3.secret not in (tmp_path / "s3" / "run.json").read_text()


def test_a_killed_run_resumes_bit_for_bit_on_s3(expected: dict[str, object], s3: S3Server, tmp_path: Path) -> None:
    """Killed in its first epoch, over a slow connection with throttling and resets."""
    url, run = f"s3://{BUCKET}/{uuid.uuid4().hex}", tmp_path / "run"
    with FaultProxy(s3.endpoint) as proxy:
        proxy.latency = 0.03
        for fault in ("slow-down", "lost-reply", "cut"):
            proxy.fail(fault, 2)
        killed(run, url, s3.environment(proxy.url), "step-00000006")
        assert proxy.failed == 6
    assert train(run, "zarr", url) == expected
