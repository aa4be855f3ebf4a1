"""Training on a disk that is really full: the run ends with a clear error and resumes once there is room."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from udddm.cli.train import main as train_command


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory in memory if there is such a file system, because a synced write to disk takes milliseconds."""
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if shared.is_dir() else tmp_path_factory.mktemp("quick")) as name:
        yield Path(name)


@pytest.fixture(scope="module")
def undisturbed(quick: Path) -> dict[str, str]:
    assert train(quick / "undisturbed", "store.kind=gpu") == 0
    return fingerprints(quick / "undisturbed")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small file system")
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a small file system: {mounted.stderr.decode().strip()}")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


TINY = [
    "network={width: 8, multipliers: [1], blocks: 1, attention: [], dropout: 0.0, condition: none}",
    "order={lanes: 4, chunk: 64, window: 2}",
    "train={steps: 32, batch_size: 128, learning_rate: 0.001, ema: [0.99]}",
    "checkpoint.every_steps=6",
    "sample.every_steps=0",
    "log_every_steps=10",
]


def train(run: Path, *more: str) -> int:
    arguments = ["--run-dir", str(run), "--device", "cpu"]
    for setting in [*TINY, *more]:
        arguments += ["--set", setting]
    return train_command(arguments)


def fingerprints(run: Path) -> dict[str, str]:
    result = json.loads((run / "result.json").read_text())
    return {key: value for key, value in result.items() if key.endswith("sha256")}


@pytest.mark.parametrize("room", [150_000, 320_000])
def test_a_full_disk_ends_the_run_with_a_clear_error_and_it_resumes_with_room(
    quick: Path, small_disk: Path, undisturbed: dict[str, str], capfd: pytest.CaptureFixture[str], room: int
) -> None:
    run, url = quick / f"run-{room}", f"store.url={small_disk / 'state'}"
    free = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(free - room))
    assert train(run, "store.kind=zarr", url) == 1
    said = capfd.readouterr().err
    assert "No space left on device" in said
    assert "run the same command again to resume" in said
    assert "Traceback" not in said
    assert train(run, "store.kind=zarr", url) == 1  # still full
    ballast.unlink()
    assert train(run, "store.kind=zarr", url) == 0
    assert fingerprints(run) == undisturbed


@pytest.mark.parametrize("store", ["gpu", "zarr"])
def test_a_full_disk_under_the_run_directory_ends_the_run_with_a_clear_error(
    small_disk: Path, undisturbed: dict[str, str], capfd: pytest.CaptureFixture[str], store: str
) -> None:
    run = small_disk / "run"
    (small_disk / "ballast").write_bytes(bytes(3_300_000))
    assert train(run, f"store.kind={store}") == 1
    said = capfd.readouterr().err
    assert "No space left" in said
    assert "Traceback" not in said
    (small_disk / "ballast").unlink()
    assert train(run, f"store.kind={store}") == 0
    assert fingerprints(run) == undisturbed
