"""A run at a URL depends on no machine's disk, survives the loss of all of them, and ends like one in a directory."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import udddm
from udddm.backends.distributed.ranks import Ranks
from udddm.cli.sample import main as sample_command
from udddm.cli.store import main as store_command
from udddm.cli.train import main as train_command
from udddm.config import RunConfig, load_config
from udddm.errors import CheckpointError, ConfigError, StoreError
from udddm.runs import remote
from udddm.runs.remote import RemoteCheckpoints, RemoteRun, open_run
from udddm.runs.run import locked
from udddm.storage import open_object_store
from udddm.storage.base import ObjectStore
from udddm.storage.s3 import PART, S3ObjectStore
from udddm.testing.cluster import free_port
from udddm.testing.objects import WrappedObjectStore
from udddm.testing.s3 import BUCKET, S3Server
from udddm.tools import inspect

SETTINGS = [
    "network={width: 8, multipliers: [1], blocks: 1, attention: [], dropout: 0.1, condition: none}",
    "order={lanes: 8, chunk: 32, window: 2}",
    "train={steps: 60, batch_size: 128, learning_rate: 1.0e-3, ema: [0.9]}",
    "checkpoint={every_steps: 6, keep: 2}",
    "sample={every_steps: 30, final: 9}",
    "log_every_steps=5",
]
ALONE = Ranks(0, 1, torch.device("cpu"))


def config(*more: str) -> RunConfig:
    return load_config(None, [*SETTINGS, "store.kind=zarr", *more])


def fingerprints(objects: ObjectStore) -> dict[str, object]:
    return {k: v for k, v in json.loads(objects.get("result.json")).items() if k.endswith("sha256")}


@pytest.fixture
def url(s3: S3Server) -> str:
    return f"s3://{BUCKET}/{uuid.uuid4().hex}"


@pytest.fixture
def files() -> Iterator[str]:
    """An fsspec URL in the memory of this process."""
    yield f"memory://{uuid.uuid4().hex}"


class Machine:
    """A rank in a process with a separate disk."""

    def __init__(self, rank: int, port: int, place: Path, url: str, *more: str, without: tuple[str, ...] = ()):
        disk = place / f"disk-{rank}-{uuid.uuid4().hex}"
        disk.mkdir()
        own = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "OMP_NUM_THREADS": "1"}
        own |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), remote.SCRATCH: str(disk)}
        environment = {k: v for k, v in {**os.environ, **own}.items() if k not in without}
        arguments = [f"--run-dir={url}", "--store=zarr", "--device=cpu", *more, *(f"--set={each}" for each in SETTINGS)]
        self.stderr = disk / "stderr"
        self.process = multiprocessing.get_context("forkserver").Process(
            target=command, args=(arguments, environment, self.stderr)
        )
        self.process.start()

    def end(self) -> tuple[int | None, str]:
        self.process.join(120)
        return self.process.exitcode, self.stderr.read_text()


def command(arguments: list[str], environment: dict[str, str], stderr: Path) -> None:
    """`udddm-train` in a process that was forked from the fork server, which has other variables."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(stderr.parent)
    with stderr.open("wb") as file:
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    sys.exit(train_command(arguments))


def machines(place: Path, url: str, *more: str) -> list[Machine]:
    port = free_port()
    return [Machine(rank, port, place, url, *more) for rank in range(2)]


def test_two_machines_without_a_shared_disk_are_lost_and_replaced(
    url: str, forked_workers: None, tmp_path: Path
) -> None:
    """Both are killed while training, and the next two start with empty disks. The result equals that of two processes
    with a run directory."""
    udddm.train(config(), run_dir=tmp_path / "run", device="cpu", workers=2)
    objects = open_object_store(url)
    first = machines(tmp_path, url)
    deadline = time.monotonic() + 120
    while not objects.exists("checkpoints/step-00000012/manifest.json"):
        if any(not m.process.is_alive() for m in first) or time.monotonic() > deadline:
            for machine in first:
                machine.process.kill()
            raise AssertionError([m.end() for m in first])
        time.sleep(0.05)
    for machine in first:
        machine.process.kill()
        machine.end()
    assert not objects.exists("result.json")
    second = [machine.end() for machine in machines(tmp_path, url)]
    assert [code for code, _ in second] == [0, 0], second
    assert "resuming from step-" in second[0][1] and f"run directory: {url}" in second[0][1]
    assert fingerprints(objects) == fingerprints(open_object_store(tmp_path / "run"))
    steps = [json.loads(line)["step"] for line in objects.get("metrics.jsonl").splitlines()]
    assert steps == list(range(5, 61, 5))
    assert set(objects.list("samples")) == {"step-00000030.png", "step-00000060.png"}
    assert objects.exists("tensorboard") and objects.exists("samples.png")
    assert len(list(objects.list("checkpoints"))) == 2


def test_the_tools_read_a_run_at_a_url(url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for where in (url, str(tmp_path / "run")):
        udddm.train(config("train.steps=30"), run_dir=where, device="cpu")
    for place in (url, f"{url}/checkpoints/step-00000030"):
        out = tmp_path / "samples"
        assert sample_command(["--checkpoint", place, "--seeds", "0-5", "--device", "cpu", "--out", str(out)]) == 0
        assert np.array_equal(np.load(out / "samples.npy"), udddm.sample(tmp_path / "run", list(range(6))))
    capsys.readouterr()
    assert store_command(["info", url]) == 0
    said = capsys.readouterr().out
    assert "1797 of 1x8x8" in said and "step-00000030: epoch 2" in said
    assert store_command(["verify", url]) == 0
    assert "2 checkpoints are valid" in capsys.readouterr().out
    assert store_command(["gc", url]) == 0
    open_object_store(url).delete("checkpoints/step-00000030/position.json")
    assert store_command(["verify", url]) == 1
    assert "step-00000030/position.json is missing" in capsys.readouterr().out


def test_a_finished_run_is_reported_and_another_configuration_is_refused(files: str) -> None:
    short = "train.steps=12"
    first = udddm.train(config(short), run_dir=files, device="cpu")
    assert udddm.train(config(short), run_dir=files, device="cpu") == first
    with pytest.raises(ConfigError, match=r"train.learning_rate: 0.001 -> 0.5"):
        udddm.train(config(short, "train.learning_rate=0.5"), run_dir=files, device="cpu")


def test_a_checkpoint_is_uploaded_after_the_metrics_of_earlier_steps(
    files: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that is lost as soon as a checkpoint is complete resumes with the metrics of the steps before it."""
    write = RemoteCheckpoints.write

    def lost(*given: Any) -> None:
        write(*given)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(RemoteCheckpoints, "write", lost)
        with pytest.raises(KeyboardInterrupt):
            udddm.train(config("train.steps=20"), run_dir=files, device="cpu")
    assert open_object_store(files).exists("checkpoints/step-00000006/manifest.json")
    udddm.train(config("train.steps=20"), run_dir=files, device="cpu")
    steps = [json.loads(line)["step"] for line in open_object_store(files).get("metrics.jsonl").splitlines()]
    assert steps == [5, 10, 15, 20]


def pixels(batch: torch.Tensor) -> torch.Tensor:
    return batch.flatten(1)[:, :8]


def test_a_resumed_run_keeps_the_files_it_wrote_under_the_same_names(
    files: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its scores and metrics, which a start on another disk can only get from the URL."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    evaluated = "evaluate={every_steps: 6, count: 16, features: 'test_remote_run:pixels', metrics: frechet}"
    settings = config(evaluated, "train.steps=30", "checkpoint.best=fd")
    persist, calls = RemoteRun.persist, 0

    def lost(run: RemoteRun) -> None:
        nonlocal calls
        calls += 1
        persist(run)
        if calls == 4:  # at the start of the run and for each checkpoint
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(RemoteRun, "persist", lost)
        patched.setenv(remote.SCRATCH, str(tmp_path / "first"))
        with pytest.raises(KeyboardInterrupt):
            udddm.train(settings, run_dir=files, device="cpu")
    objects = open_object_store(files)
    before = [json.loads(line)["step"] for line in objects.get("evaluation.jsonl").splitlines()]
    assert before and before[0] == 6
    monkeypatch.setenv(remote.SCRATCH, str(tmp_path / "second"))
    udddm.train(settings, run_dir=files, device="cpu")
    steps = [json.loads(line)["step"] for line in objects.get("evaluation.jsonl").splitlines()]
    assert steps == [6, 12, 18, 24, 30]
    held = {name for name in objects.list("") if "." in name and name not in ("samples.npy", "samples.png")}
    always = set(remote.FETCHED) - set(remote.OPTIONAL)
    assert held == always | {name for name in held if name == "lease.json"}
    scores = [json.loads(line) for line in objects.get("evaluation.jsonl").splitlines()]
    assert json.loads(objects.get("best/scores.json")) == min(scores, key=lambda each: each["fd"])
    assert objects.exists("best/config.json")


def test_a_second_writer_is_refused(files: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """On this machine by the lock; on another machine with another disk by the lease."""
    monkeypatch.setattr(remote, "LEASE_PATIENCE", 0.0)
    with open_run(files).lock():
        with pytest.raises(ConfigError, match="another process"):
            udddm.train(config(), run_dir=files, device="cpu")
        monkeypatch.setenv(remote.SCRATCH, str(tmp_path))
        with pytest.raises(StoreError, match="being written by another run"):
            udddm.train(config(), run_dir=files, device="cpu")


def test_files_that_a_live_run_deletes_meanwhile_are_not_reported_as_damage(files: str) -> None:
    """`verify`, `info` and `view` have copies of the checkpoints that they listed; the run has continued since."""
    udddm.train(config("train.steps=30"), run_dir=files, device="cpu")
    place = inspect.find(files)
    assert [path.name for path in place.checkpoints] == ["step-00000024", "step-00000030"]
    kept, state = open_run(files).checkpoints(), open_object_store(f"{files}/state")
    kept._remove(kept.all()[0])
    for lane in range(8):  # in the order of the store: records first
        state.delete(f"gen-000001/complete/lane-{lane:04d}.json")
    state.delete("gen-000001")
    assert inspect.verify(place)[1] == []
    state.delete("gen-000002/complete/lane-0002.json")
    assert ["step-00000030" in problem for problem in inspect.verify(place)[1]] == [True]
    assert place.run is not None
    for path in (place.run.path / "checkpoints").iterdir():
        shutil.rmtree(path / "state")
    place.checkpoints = place.checkpoints[:1]
    assert not any("step-" in line for line in inspect.info(place))
    with pytest.raises(StoreError, match="holds no complete generation"):
        place.generations = None
        inspect.estimates(place, 5)


def test_a_checkpoint_deleted_while_it_is_copied_is_missing(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    objects = open_object_store(url)
    objects.put("file", b"x")
    assert isinstance(objects, S3ObjectStore)
    read = objects._obstore.get_range

    def removed(*given: Any, **named: Any) -> Any:
        open_object_store(url).delete("file")
        return read(*given, **named)

    monkeypatch.setattr(objects._obstore, "get_range", removed)
    with pytest.raises(FileNotFoundError):
        objects.download("file", tmp_path / "copy")


def test_machines_that_share_a_home_directory_have_separate_scratch_directories(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first = open_run("memory://a/run").path
    assert first == open_run("memory://a/run").path != open_run("memory://b/run").path
    monkeypatch.setattr("socket.gethostname", lambda: "another/host")
    second = open_run("memory://a/run").path
    assert second != first and second.parent == first.parent
    with locked(first), locked(second):
        pass


def fill(directory: Path) -> None:
    (directory / "state").mkdir()
    (directory / "model.safetensors").write_bytes(os.urandom(500))
    (directory / "state" / "rows.bin").write_bytes(os.urandom(300))


class Refusing(WrappedObjectStore):
    """Refuses the put that follows `passed` others."""

    passed = 1 << 60

    def _put(self, key: str, parts: tuple[bytes | memoryview, ...]) -> None:
        self.passed -= 1
        if self.passed == -1:
            raise PermissionError("denied")
        super()._put(key, parts)


def checkpoints(files: str, place: Path) -> tuple[RemoteCheckpoints, Refusing]:
    objects = Refusing(open_object_store(f"{files}/checkpoints"))
    return RemoteCheckpoints(place, objects), objects


def test_a_checkpoint_is_complete_or_absent(files: str, tmp_path: Path) -> None:
    """Whichever request of a write is refused, the previous checkpoint stays newest, and the next attempt works."""
    kept, objects = checkpoints(files, tmp_path)
    older = kept.write(1, ALONE, fill)
    for number in range(3):  # two files and the manifest
        objects.passed = number
        with pytest.raises(CheckpointError, match=r"cannot write the checkpoint memory://.*Checkpoints are intact"):
            kept.write(2, ALONE, fill)
        assert kept.newest_valid() == older
    newer = kept.write(2, ALONE, fill)
    assert kept.all() == [older, newer]
    assert not list((tmp_path / "checkpoints").glob(".*"))


def test_a_corrupt_checkpoint_is_detected_and_the_previous_one_is_used(
    files: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kept, objects = checkpoints(files, tmp_path)
    older = kept.write(1, ALONE, fill)
    for number, (name, change) in enumerate(
        (name, change) for name in ("model.safetensors", "state/rows.bin") for change in ("flip", "cut", "delete")
    ):
        newer = kept.write(2 + number, ALONE, fill)
        key = f"{newer.name}/{name}"
        data = objects.get(key)
        if change == "delete":
            objects.delete(key)
        else:
            objects.put(key, data[:-1] if change == "cut" else bytes([data[0] ^ 1]) + data[1:])
        caplog.clear()
        assert kept.newest_valid() == older
        assert f"{files}/checkpoints/{key}" in caplog.text
        kept.discard_after(1)
        assert kept.all() == [older]


def test_leftovers_of_interrupted_writes_are_deleted(files: str, tmp_path: Path) -> None:
    kept, objects = checkpoints(files, tmp_path)
    objects.put("step-00000001/model.safetensors", b"from a killed process")
    for step in (2, 3, 4):
        kept.write(step, ALONE, fill)
    assert [p.name for p in kept.all()] == ["step-00000002", "step-00000003", "step-00000004"]
    kept.prune(2)
    assert sorted(objects.list("")) == ["step-00000003", "step-00000004"]


@pytest.mark.parametrize("size", [0, 1, PART - 1, PART, 2 * PART + 5])
@pytest.mark.parametrize("kind", ["s3", "memory", "local"])
def test_files_round_trip_through_an_object_store(kind: str, size: int, tmp_path: Path, s3: S3Server) -> None:
    names = {"s3": f"s3://{BUCKET}/files", "memory": "memory://files", "local": str(tmp_path / "objects")}
    objects = open_object_store(names[kind])
    data = np.random.default_rng(size).bytes(size)
    (tmp_path / "file").write_bytes(data)
    objects.upload(tmp_path / "file", "some/where")
    objects.download("some/where", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == data
    with pytest.raises(FileNotFoundError):
        objects.download("no/where", tmp_path / "none")


def test_credentials_missing_on_one_machine_are_reported_immediately(url: str, tmp_path: Path) -> None:
    port = free_port()
    whole = Machine(0, port, tmp_path, str(tmp_path / "run"), f"--store-url={url}")
    keys = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    wrong = Machine(1, port, tmp_path, str(tmp_path / "run"), f"--store-url={url}", without=keys)
    ended = [whole.end(), wrong.end()]
    assert [code for code, _ in ended] == [1, 1], ended
    assert "error: rank 1 (" in ended[0][1] and "credentials" in ended[0][1], ended
    assert "credentials" in ended[1][1]
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_bad_urls_are_refused(tmp_path: Path) -> None:
    for bad in ("s3://user:secret@bucket/run", "nothing://bucket/run"):
        with pytest.raises((StoreError, ConfigError)):
            udddm.train(config(), run_dir=bad, device="cpu")
    assert isinstance(open_run("memory://a/b"), RemoteRun) and str(open_run("memory://a/b/")) == "memory://a/b"
    assert open_run(f"file://{tmp_path}").path == tmp_path
