"""Requests to stop in every phase of a run: during the start of its workers, in training, and while the data set or an
evaluation does not answer."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import udddm
from udddm.cli.command import reported
from udddm.errors import Interrupted
from udddm.evaluation import background
from udddm.storage import threads
from udddm.training import inputs

TINY: dict[str, Any] = {
    "network": {"base_channels": 4, "channel_mult": [1], "blocks_per_level": 1, "attention_resolutions": []},
    "train": {"steps": 40, "batch_size": 8},
    "sample": {"every_steps": 0},
    "store": {"kind": "gpu"},
    "checkpoint": {"every_steps": 1000},
}


def checkpoints(run: Path) -> list[str]:
    return [path.name for path in sorted((run / "checkpoints").glob("step-*"))]


def ranks_of(process: subprocess.Popen[str]) -> list[int]:
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [pid for pid in map(int, children) if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def test_a_request_during_the_start_of_the_workers_ends_the_run(tmp_path: Path) -> None:
    """The ranks are ended by the signal, which is not a failure, and must not start again."""
    command = [sys.executable, "-m", "udddm", "train", "--config=digits", "--device=cpu", f"--run-dir={tmp_path}/run"]
    process = subprocess.Popen(
        [*command, "--workers", "2", "--max-failures", "3"], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    while len(ranks_of(process)) < 2:
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C does, which reaches the new processes as well
    said = process.communicate(timeout=100)[1]
    assert process.returncode == 130, said
    assert "stopped by SIGINT; the same command resumes" in said
    assert "Traceback" not in said and "failure 1" not in said


def test_a_request_to_one_worker_during_its_start_ends_the_run(tmp_path: Path) -> None:
    """As by a job scheduler that signals one process. The other worker waits for it and would do so for minutes."""
    command = [sys.executable, "-m", "udddm", "train", "--config=digits", "--device=cpu", f"--run-dir={tmp_path}/run"]
    process = subprocess.Popen([*command, "--workers", "2", "--max-failures", "3"], stderr=subprocess.PIPE, text=True)
    while len(ranks_of(process)) < 2:
        assert process.poll() is None
        time.sleep(0.01)
    os.kill(ranks_of(process)[1], signal.SIGTERM)
    said = process.communicate(timeout=100)[1]
    assert process.returncode == 143, said
    assert "stopped by SIGTERM; the same command resumes" in said
    assert "Traceback" not in said and "failure 1" not in said


class Data:
    """Images of which the one at `last` calls `action` first."""

    def __init__(self, last: int, action: Any):
        self.count, self.last, self.action = 0, last, action

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> Any:
        self.count += 1
        if self.count == self.last:
            self.action()
        return np.full((1, 8, 8), index / 64, np.float32)


def test_a_run_whose_terminal_is_closed_writes_a_checkpoint(tmp_path: Path) -> None:
    data = Data(150, lambda: os.kill(os.getpid(), signal.SIGHUP))
    with pytest.raises(Interrupted, match=r"stopped by SIGHUP after step \d+; the same") as raised:
        udddm.train(TINY, data, run_dir=tmp_path / "run", device="cpu")
    assert raised.value.exit_code == 129
    assert checkpoints(tmp_path / "run") == [f"step-{raised.value.step:08d}"]


@pytest.fixture
def hanging(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """An event for which a thread waits until the end of the test."""
    event = threading.Event()
    monkeypatch.setattr(inputs, "PATIENCE", 0.05)
    monkeypatch.setattr(background, "PATIENCE", 0.05)
    yield event
    event.set()
    for thread in threads._abandoned:
        thread.join(10)
    assert not threads.abandoned()


def test_a_run_whose_data_set_does_not_answer_stops_with_a_checkpoint(hanging: threading.Event, tmp_path: Path) -> None:
    def hang() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        hanging.wait()

    data = Data(200, hang)
    with pytest.raises(Interrupted) as raised:
        udddm.train(TINY, data, run_dir=tmp_path / "run", device="cpu")
    assert threads.abandoned()
    assert raised.value.step and checkpoints(tmp_path / "run") == [f"step-{raised.value.step:08d}"]


WAITED = threading.Event()
FEATURES: list[threading.Event] = []


def features(images: Any) -> Any:
    if FEATURES:
        WAITED.set()
        FEATURES[0].wait()
    return images.flatten(1)[:, :4]


def test_a_request_does_not_wait_for_evaluations(hanging: threading.Event, tmp_path: Path) -> None:
    FEATURES[:] = [hanging]
    WAITED.clear()

    def stop() -> None:
        WAITED.wait(60)
        os.kill(os.getpid(), signal.SIGTERM)

    settings = TINY | {"evaluate": {"every_steps": 1, "count": 4, "features": f"{__name__}:features"}}
    with pytest.raises(Interrupted):
        udddm.train(settings, Data(150, stop), run_dir=tmp_path / "run", device="cpu")
    FEATURES.clear()
    assert threads.abandoned()


def test_a_command_that_is_terminated_removes_its_temporary_files(capsys: pytest.CaptureFixture[str]) -> None:
    steps = []

    def body() -> int:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        finally:
            steps.append("cleaned")
        return 0

    assert reported(body) == 143
    assert steps == ["cleaned"]
    assert capsys.readouterr().err == "stopped immediately\n"
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
