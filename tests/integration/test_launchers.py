"""Several processes on one machine that are killed, hang or are stopped: the run gives the result of an undisturbed
run, or a clear error."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest
import torch

import udddm
from udddm import ConfigError
from udddm.backends.distributed.ranks import RENDEZVOUS, Ranks, Vote, _gpu
from udddm.backends.launchers import local
from udddm.backends.launchers.base import Job, check_versions, picklable, root_cause, versions
from udddm.cli.train import main as train_command
from udddm.config import resolve
from udddm.errors import DataError, Interrupted, RankError, WorkerLost

SETTINGS = [
    "network={base_channels: 8, channel_mult: [1], blocks_per_level: 1, attention_resolutions: [], "
    "dropout: 0.1, condition: none}",
    "train={steps: 80, batch_size: 64, learning_rate: 0.001, ema: [0.9]}",
    "checkpoint.every_steps=5",
    "sample={every_steps: 0, final: 7}",
    "log_every_steps=5",
]


def command(run: Path, *more: str) -> list[str]:
    given = [sys.executable, "-m", "udddm", "train", "--run-dir", str(run), "--device", "cpu", "--store", "zarr"]
    for setting in SETTINGS:
        given += ["--set", setting]
    return [*given, *more]


class Started:
    """The command in a new process."""

    def __init__(self, run: Path, *more: str):
        self.run = run
        self.process = subprocess.Popen(command(run, *more), stderr=subprocess.PIPE, text=True)

    def children(self, part: bytes = b"spawn_main") -> list[int]:
        """The process ids of the ranks, by rank."""
        found = []
        for task in Path(f"/proc/{self.process.pid}/task").iterdir():
            for pid in (task / "children").read_text().split():
                if part in Path(f"/proc/{pid}/cmdline").read_bytes():
                    found.append(int(pid))
        return sorted(found)

    def alive(self) -> bool:
        return self.process.poll() is None

    def at_step(self, step: int) -> Self:
        deadline = time.monotonic() + 100
        while not (self.run / "checkpoints" / f"step-{step:08d}").exists():
            assert self.alive() and time.monotonic() < deadline, self.said()
            time.sleep(0.005)
        return self

    def said(self) -> str:
        if self.alive():
            self.process.kill()
        return self.process.communicate()[1]

    def end(self) -> tuple[int | None, str]:
        _, said = self.process.communicate(timeout=120)
        return self.process.returncode, said


def drive(arguments: list[str], stderr: Path) -> None:
    with stderr.open("wb") as file:
        os.dup2(file.fileno(), 2)
    forks = multiprocessing.get_context("fork")
    multiprocessing.get_context = lambda method=None: forks  # type: ignore[assignment]
    local.GRACE = 1.0  # seconds for a hung rank to exit
    sys.exit(train_command(arguments))


class Forked(Started):
    """The command in a process that is forked from the fork server, and its ranks from it. All start at once, also
    after a failure, because they have imported PyTorch."""

    def __init__(self, run: Path, *more: str):
        self.run, self.stderr = run, run.with_name(f"stderr-{uuid.uuid4().hex}")
        self.stderr.touch()
        self.process = multiprocessing.get_context(
            "forkserver"
        ).Process(  # type: ignore[assignment]
            target=drive, args=(command(run, *more)[4:], self.stderr)
        )
        self.process.start()  # type: ignore[attr-defined]

    def children(self, part: bytes = b"") -> list[int]:
        return super().children(part)

    def alive(self) -> bool:
        return bool(self.process.is_alive())  # type: ignore[attr-defined]

    def said(self) -> str:
        self.process.kill()
        return self.end()[1]

    def end(self) -> tuple[int | None, str]:
        self.process.join(120)  # type: ignore[attr-defined]
        return self.process.exitcode, self.stderr.read_text()  # type: ignore[attr-defined]


def fingerprints(run: Path) -> dict[str, str]:
    result = json.loads((run / "result.json").read_text())
    return {key: value for key, value in result.items() if key.endswith("sha256")}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    run = tmp_path_factory.mktemp("launch") / "run"
    code, said = Forked(run, "--workers", "2").end()
    assert code == 0, said
    assert np.load(run / "samples.npy").shape == (7, 1, 8, 8)
    return fingerprints(run)


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_killed_rank_counts_as_one_failure(rank: int, undisturbed: dict[str, str], tmp_path: Path) -> None:
    run = Forked(tmp_path / "run", "--workers", "2", "--max-failures", "1").at_step(20)
    os.kill(run.children()[rank], signal.SIGKILL)
    code, said = run.end()
    assert code == 0, said
    assert "failure 1 of 1" in said and "resuming from step-" in said
    assert fingerprints(run.run) == undisturbed


def test_a_hung_rank_counts_as_one_failure(undisturbed: dict[str, str], tmp_path: Path) -> None:
    more = ("--workers", "2", "--max-failures", "3", "--timeout", "4")  # a slow disk may also take four seconds
    run = Forked(tmp_path / "run", *more).at_step(20)
    os.kill(run.children()[1], signal.SIGSTOP)
    code, said = run.end()
    assert code == 0, said
    assert "failure 1 of 3" in said and "resuming from step-" in said
    assert fingerprints(run.run) == undisturbed


@pytest.mark.slow
def test_too_many_failures_end_the_run_and_the_same_command_resumes(
    undisturbed: dict[str, str], tmp_path: Path
) -> None:
    run = Started(tmp_path / "run", "--workers", "2").at_step(20)
    os.kill(run.children()[1], signal.SIGKILL)
    code, said = run.end()
    assert code == 1 and "rank 1 was killed by SIGKILL" in said and "Traceback" not in said
    code, said = Started(tmp_path / "run", "--workers", "2").end()
    assert code == 0, said
    assert fingerprints(run.run) == undisturbed


@pytest.mark.parametrize("target", [pytest.param("parent", marks=pytest.mark.slow), "one rank"])
def test_sigterm_checkpoints_at_a_step_that_all_ranks_agree_on(
    target: str, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    more = ("--workers", "2", "--max-failures", "3", "--set", "checkpoint.every_steps=50")
    run = Forked(tmp_path / "run", *more)
    deadline = time.monotonic() + 100
    while not (run.run / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(run.process.pid if target == "parent" else run.children()[1], signal.SIGTERM)
    code, said = run.end()
    assert code == 143, said
    assert "stopped by SIGTERM after step" in said
    [newest] = sorted((run.run / "checkpoints").iterdir())[-1:]
    assert f"step {int(newest.name[5:])};" in said
    code, said = Forked(tmp_path / "run", *more).end()
    assert code == 0, said
    assert fingerprints(run.run) == undisturbed


def test_no_rank_outlives_its_launcher(tmp_path: Path) -> None:
    run = Started(tmp_path / "run", "--workers", "2").at_step(5)
    ranks = run.children()
    run.process.kill()
    run.process.communicate()
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in ranks) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--workers", "3"], "the nearest numbers of ranks that do: 2 and 4"),
        (["--workers", "2", "--set", "data.name=nonsense:factory"], "nonsense"),
        (["--workers", "5:7"], "order.lanes=64"),
    ],
)
def test_errors_that_a_restart_cannot_fix_are_raised_immediately(
    arguments: list[str], expected: str, tmp_path: Path
) -> None:
    code, said = Started(tmp_path / "run", "--max-failures", "5", *arguments).end()
    assert code in (1, 2) and expected in said, said
    assert "Traceback" not in said and "failure 1" not in said
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize("text", ["0", "a", "4:2", "1:", ":"])
def test_a_bad_number_of_workers_is_refused(text: str) -> None:
    done = subprocess.run(command(Path("never"), "--workers", text), capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "--workers" in done.stderr


def job(workers: tuple[int, int]) -> Job:
    return Job(resolve({}), Path("run"), workers=workers)


def test_the_largest_number_of_workers_that_divides_the_lanes_is_used() -> None:
    assert job((1, 8)).resolve_num_workers(8) == 8
    assert job((1, 8)).resolve_num_workers(7) == 4
    assert job((2, 6)).resolve_num_workers(100) == 4
    with pytest.raises(ConfigError, match="1 worker can start here"):
        job((2, 4)).resolve_num_workers(1)
    with pytest.raises(ConfigError, match=r"order\.lanes"):
        job((5, 7)).resolve_num_workers(100)


def test_different_versions_on_a_worker_are_named() -> None:
    check_versions(versions())
    with pytest.raises(ConfigError, match=r"torch .* \(driver: 1.0\)"):
        check_versions({**versions(), "torch": "1.0"})


def test_the_root_cause_of_the_errors_of_several_ranks_is_raised() -> None:
    first = DataError("sample 3 is broken")
    assert root_cause([RankError("rank 1: sample 3 is broken"), WorkerLost("killed"), first]) is first


def test_errors_can_be_sent_between_processes() -> None:
    class Odd(RuntimeError):
        def __init__(self, a: int, b: int):
            super().__init__(f"{a} and {b}")

    assert "Odd: 1 and 2" in str(picklable(Odd(1, 2)))
    stopped = picklable(Interrupted(signal.SIGTERM, 7))
    assert isinstance(stopped, Interrupted) and stopped.exit_code == 143


def test_the_vote_of_a_single_rank_is_its_own() -> None:
    vote = Vote(Ranks(0, 1, torch.device("cpu")))
    assert [vote.cast(0), vote.cast(15)] == [0, 15]


class Squares:
    def __len__(self) -> int:
        return 70

    def __getitem__(self, index: int) -> Any:
        return np.full((1, 6, 6), index / 70, np.float32)


def test_a_data_set_factory_runs_in_the_workers(forked_workers: None, tmp_path: Path) -> None:
    """A function is called in every worker; an object is pickled and sent to the workers."""
    config = resolve(
        {
            "network": {
                "base_channels": 8,
                "channel_mult": [1],
                "blocks_per_level": 1,
                "attention_resolutions": [],
                "condition": "none",
            },
            "train": {"steps": 3, "batch_size": 32, "ema": [0.9]},
            "sample": {"every_steps": 0},
        }
    )
    results = [
        udddm.train(config, given, run_dir=tmp_path / str(i), device="cpu", workers=2)
        for i, given in enumerate([Squares, Squares()])
    ]
    assert results[0]["weights_sha256"] == results[1]["weights_sha256"]


PROGRAM = """
import logging, sys
import udddm

if __name__ == "__main__":
    if sys.argv[2] == "silenced":
        logging.getLogger("udddm").setLevel(logging.WARNING)
    sections = {
        "network": {"base_channels": 4, "channel_mult": [1], "blocks_per_level": 1, "attention_resolutions": [],
                    "condition": "none"},
        "train": {"steps": 2, "batch_size": 64},
        "sample": {"every_steps": 0},
    }
    udddm.train(sections, run_dir=sys.argv[1], device="cpu", workers=2)
"""


@pytest.mark.parametrize("logger", [pytest.param("as it is", marks=pytest.mark.slow), "silenced"])
def test_workers_log_unless_the_program_silenced_them(logger: str, tmp_path: Path) -> None:
    """A worker is a new process, which receives only the level of the program's logging."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    command = [sys.executable, str(program), str(tmp_path / "run"), logger]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=120, check=True)
    printed = 0 if logger == "silenced" else 1
    assert done.stderr.count("backend: local (several workers on this machine)") == printed  # by the driver
    assert done.stderr.count("2 ranks; engine: torch") == printed, done.stderr  # by the first worker


LEAVES = """
import os, torch
os.environ |= {"RANK": "0", "WORLD_SIZE": "1"}
from pathlib import Path
from udddm.backends.distributed.ranks import join
ranks = join("cpu", group=True)
torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(3, 3))(torch.ones(1, 3)).sum().backward()
ranks.close()
threads = [task.joinpath("comm").read_text() for task in Path("/proc/self/task").iterdir()]
print([name for name in threads if "gloo" in name])
"""


def test_a_closed_group_leaves_no_thread() -> None:
    """A thread of gloo that frees a tensor during interpreter shutdown would abort a rank that has finished."""
    done = subprocess.run([sys.executable, "-c", LEAVES], capture_output=True, text=True, check=True, timeout=100)
    assert done.stdout == "[]\n"


def test_a_rank_uses_the_only_visible_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(RENDEZVOUS, raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    assert _gpu(3, 1) == 0
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    assert [_gpu(rank, 4) for rank in range(4)] == [0, 1, 2, 3]
    with pytest.raises(ConfigError, match="use fewer workers"):
        _gpu(4, 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    with pytest.raises(ConfigError, match="local rank 1 has no GPU"):
        _gpu(1, 1)
