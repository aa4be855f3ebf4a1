"""A run that is killed, stopped, damaged or moved to another store gives the same bits as an uninterrupted one.

Real processes are killed with SIGKILL. They are forked from a server that has imported everything, so that a start
takes a fraction of a second and the kills hit training, checkpoints and chunks instead of imports.
"""

import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

FORKS = multiprocessing.get_context("forkserver")
STORES = ["gpu", "pinned", "zarr"]
STEPS = 50
SETTINGS = [
    "data.name=array",
    "network={width: 8, multipliers: [1], blocks: 1, attention: [], dropout: 0.1, condition: none}",
    "order={lanes: 4, chunk: 16, window: 2}",
    f"train={{steps: {STEPS}, batch_size: 32, learning_rate: 0.001, ema: [0.99, 0.9]}}",  # 19 steps an epoch
    "checkpoint.every_steps=4",
    "sample.every_steps=0",
    "log_every_steps=2",
]


def child(arguments: list[str], log: str) -> None:
    with Path(log).open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    from udddm.cli.train import main as train_command

    sys.exit(train_command(arguments))


@dataclass
class Run:
    directory: Path
    images: Path
    dtype: str = "fp16"

    def arguments(self, store: str, *more: str) -> list[str]:
        given = ["--run-dir", str(self.directory), "--device", "cpu", "--store", store]
        for setting in [*SETTINGS, f"data.path={self.images}", f"store.dtype={self.dtype}", *more]:
            given += ["--set", setting]
        return given

    @property
    def log(self) -> Path:
        return self.directory.with_suffix(".log")

    def start(self, store: str, *more: str) -> Any:
        process = FORKS.Process(target=child, args=(self.arguments(store, *more), str(self.log)))
        process.start()
        return process

    def finish(self, store: str, *more: str) -> int:
        """Start it, wait for its end, and return the exit code."""
        process = self.start(store, *more)
        process.join(120)
        assert process.exitcode is not None, "the run hangs"
        return int(process.exitcode)

    def succeed(self, store: str, *more: str) -> dict[str, str]:
        assert self.finish(store, *more) == 0, self.said()
        return self.fingerprints()

    def killed_after(self, seconds: float, store: str) -> bool:
        """Start it and kill it. False if it had already ended."""
        process = self.start(store)
        process.join(seconds)
        process.kill()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL), self.said()
        return bool(process.exitcode)

    def reach(self, step: int, store: str, then: Callable[[Any], None]) -> int:
        """Start it, and act on the process once the checkpoint of a step or a later one exists."""
        process = self.start(store)
        deadline = time.monotonic() + 120
        while not self.checkpoints() or self.checkpoints()[-1] < step:
            assert process.is_alive() and time.monotonic() < deadline, self.said()
            time.sleep(0.002)
        then(process)
        process.join(120)
        assert process.exitcode is not None, "the run hangs"
        return int(process.exitcode)

    def checkpoints(self) -> list[int]:
        return sorted(int(p.name[5:]) for p in (self.directory / "checkpoints").glob("step-*"))

    def said(self) -> str:
        text = self.log.read_text()
        self.log.write_text("")
        return text

    def fingerprints(self) -> dict[str, str]:
        result = json.loads((self.directory / "result.json").read_text())
        assert result["steps"] == STEPS
        found = {key: value for key, value in result.items() if key.endswith("sha256")}
        assert len(found) == 3
        return found

    def metric_steps(self) -> list[int]:
        return [json.loads(line)["step"] for line in (self.directory / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory in memory if there is such a file system, because a synced write to disk takes milliseconds."""
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if shared.is_dir() else tmp_path_factory.mktemp("runs")) as name:
        rng = np.random.default_rng(0)
        np.save(Path(name) / "images.npy", rng.uniform(-1, 1, (603, 1, 4, 4)).astype(np.float32))
        yield Path(name)


@pytest.fixture
def make(place: Path) -> Iterator[Callable[..., Run]]:
    made: list[Path] = []

    def new(name: str, dtype: str = "fp16", images: Path | None = None) -> Run:
        directory = Path(tempfile.mkdtemp(prefix=name, dir=place))
        made.append(directory)
        return Run(directory / "run", images or place / "images.npy", dtype)

    yield new
    for directory in made:
        shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(scope="module")
def undisturbed(place: Path) -> dict[str, dict[str, str]]:
    """The fingerprints of uninterrupted runs on the `gpu` store, by dtype."""
    return {
        dtype: Run(place / f"undisturbed-{dtype}", place / "images.npy", dtype).succeed("gpu")
        for dtype in ("fp32", "fp16")
    }


Make = Callable[..., Run]
Undisturbed = dict[str, dict[str, str]]


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize("store", ["pinned", "zarr"])
def test_every_store_gives_the_same_weights_and_state(
    make: Make, undisturbed: Undisturbed, store: str, dtype: str
) -> None:
    run = make(store, dtype)
    assert run.succeed(store) == undisturbed[dtype]
    assert undisturbed["fp32"] != undisturbed["fp16"]


@pytest.mark.parametrize("store", STORES)
def test_killed_run_resumes_bit_for_bit(make: Make, undisturbed: Undisturbed, store: str) -> None:
    _kill_until_done(make(store), store, undisturbed["fp16"], kills=4, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize("store", STORES)
def test_often_killed_run_resumes_bit_for_bit(make: Make, undisturbed: Undisturbed, store: str, dtype: str) -> None:
    for seed in range(4):
        _kill_until_done(make(store, dtype), store, undisturbed[dtype], kills=15, seed=seed)


def _kill_until_done(run: Run, store: str, wanted: dict[str, str], kills: int, seed: int) -> None:
    rng = random.Random(seed)
    began = time.monotonic()
    assert run.reach(4, store, lambda process: process.kill()) == -signal.SIGKILL
    first = time.monotonic() - began  # a start and its first checkpoints: the unit of the kill times
    assert run.reach(12, store, lambda process: process.kill()) == -signal.SIGKILL
    for _ in range(kills - 2):
        if not run.killed_after(rng.uniform(0.3, 1.2) * first, store):
            break  # the run was faster and is finished
    assert run.succeed(store) == wanted
    steps = run.metric_steps()
    assert steps == sorted(set(steps)), "steps in metrics.jsonl twice"
    assert steps[-1] == STEPS


def test_kills_may_move_the_run_to_another_store(make: Make, undisturbed: Undisturbed) -> None:
    run = make("moving")
    for store, step in (("gpu", 8), ("zarr", 16), ("pinned", 24), ("zarr", 36)):
        assert run.reach(step, store, lambda process: process.kill()) == -signal.SIGKILL
    assert run.succeed("gpu") == undisturbed["fp16"]


@pytest.mark.parametrize("store", ["gpu", "zarr"])
def test_sigterm_checkpoints_and_the_same_command_resumes(make: Make, undisturbed: Undisturbed, store: str) -> None:
    run = make(store)
    assert run.reach(4, store, lambda process: process.terminate()) == 128 + signal.SIGTERM
    said = run.said()
    assert "stopped by SIGTERM after step" in said
    assert "the same command resumes" in said
    stopped = int(said.split("after step ")[1].split(";")[0])
    assert run.checkpoints()[-1] == stopped
    assert run.succeed(store) == undisturbed["fp16"]
    assert f"resuming from step-{stopped:08d}" in run.said()
    assert run.metric_steps() == list(range(2, STEPS + 1, 2))
    before = (run.directory / "result.json").read_bytes()
    assert run.finish(store) == 0  # and again, now that it is finished
    assert "is finished" in run.said()
    assert (run.directory / "result.json").read_bytes() == before


def test_the_real_command_is_killed_and_resumes(make: Make, undisturbed: Undisturbed) -> None:
    """The complete life of a run from the shell, without the fork server."""
    run = make("command")
    command = [sys.executable, "-m", "udddm", "train", *run.arguments("zarr")]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while not run.checkpoints():
            assert process.poll() is None
            time.sleep(0.01)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    subprocess.run(command, check=True, capture_output=True)
    assert run.fingerprints() == undisturbed["fp16"]


@pytest.fixture(scope="module", params=["gpu", "zarr"])
def halfway(request: pytest.FixtureRequest, place: Path) -> tuple[str, Path]:
    """A run killed after its sixth checkpoint; it keeps two."""
    run = Run(place / f"halfway-{request.param}" / "run", place / "images.npy")
    run.directory.parent.mkdir()
    assert run.reach(24, request.param, lambda process: process.kill()) == -signal.SIGKILL
    return request.param, run.directory


@pytest.fixture
def half(halfway: tuple[str, Path], make: Make) -> tuple[str, Run]:
    store, directory = halfway
    run = make(f"half-{store}")
    shutil.copytree(directory, run.directory)
    return store, run


def test_a_truncated_checkpoint_is_skipped_for_the_previous_one(
    half: tuple[str, Run], undisturbed: Undisturbed
) -> None:
    store, run = half
    older, newest = run.checkpoints()[-2:]
    file = run.directory / "checkpoints" / f"step-{newest:08d}" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert run.succeed(store) == undisturbed["fp16"]
    said = run.said()
    assert f"checkpoint step-{newest:08d} is not valid and is skipped" in said
    assert str(file) in said
    assert f"resuming from step-{older:08d}" in said
    steps = run.metric_steps()
    assert steps == sorted(set(steps))


def test_a_run_without_a_valid_checkpoint_is_refused_and_unchanged(half: tuple[str, Run]) -> None:
    store, run = half
    for step in run.checkpoints():
        (run.directory / "checkpoints" / f"step-{step:08d}" / "position.json").unlink()
    before = run.checkpoints()
    assert run.finish(store) == 1
    said = run.said()
    assert "error: no checkpoint in" in said
    assert "position.json is missing" in said
    assert "Traceback" not in said
    assert run.checkpoints() == before
    assert not (run.directory / "result.json").exists()


def test_a_corrupt_chunk_of_the_state_is_an_error_that_names_it(
    half: tuple[str, Run], undisturbed: Undisturbed
) -> None:
    store, run = half
    if store != "zarr":
        pytest.skip("the state of a store in memory is in its checkpoints")
    newest = run.directory / "checkpoints" / f"step-{run.checkpoints()[-1]:08d}"
    epoch = json.loads((newest / "state" / "snapshot.json").read_text())["epoch"]  # the generation that is read next
    lane = run.directory / "state" / f"gen-{epoch:06d}" / "c" / "1"
    whole = {path: path.read_bytes() for path in lane.rglob("*") if path.is_file()}
    assert whole
    for path, data in whole.items():  # which of them are read depends on where the run stopped
        path.write_bytes(bytes(len(data)))
    assert run.finish(store) == 1
    said = run.said()
    assert f"generation {epoch}, lane 1, chunk" in said
    assert any(str(path) in said for path in whole)
    assert "Traceback" not in said
    for path, data in whole.items():
        path.write_bytes(data)
    assert run.succeed(store) == undisturbed["fp16"]


def test_another_configuration_or_data_set_is_refused(half: tuple[str, Run], place: Path) -> None:
    store, run = half
    assert run.finish(store, "train.learning_rate=0.002") == 2
    said = run.said()
    assert "another configuration" in said
    assert "train.learning_rate: 0.001 -> 0.002" in said
    other = place / "other.npy"
    images = np.load(place / "images.npy")
    np.save(other, -images)
    assert run.finish(store, f"data.path={other}") == 1
    assert "the data set is not the one this run was started with" in run.said()
    np.save(other, images[:-1])
    assert run.finish(store, f"data.path={other}") == 1
    assert "603 samples and now has 602" in run.said()


def test_two_processes_in_one_run_directory_are_refused(make: Make, undisturbed: Undisturbed) -> None:
    run = make("twice")

    def again(process: Any) -> None:
        os.kill(process.pid, signal.SIGSTOP)
        try:
            assert run.finish("zarr") == 2
        finally:
            os.kill(process.pid, signal.SIGCONT)
        assert "another process is training in" in run.said()

    assert run.reach(4, "zarr", again) == 0
    assert run.fingerprints() == undisturbed["fp16"]
