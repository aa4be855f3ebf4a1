"""Exit codes as the README lists them: 0, 1 for a failure, 2 for a mistake, 128 + n after a signal."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from udddm.cli.command import FAILED, USAGE, reported
from udddm.cli.main import main
from udddm.errors import CheckpointError, ConfigError, DataError, Diverged, Interrupted, StoreError, UdddmError

DIGITS = ["train", "--config", "digits", "--device", "cpu"]
RELEASE = str(Path(__file__).parents[3] / "benchmarks" / "results" / "fashion-mnist" / "consistency")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("x"), USAGE),
        (DataError("x"), FAILED),
        (StoreError("x"), FAILED),
        (CheckpointError("x"), FAILED),
        (Diverged("x"), FAILED),
        (UdddmError("x"), FAILED),
        (Interrupted(signal.SIGTERM, 3), 143),
        (Interrupted(signal.SIGINT), 130),
        (Interrupted(signal.SIGHUP), 129),
        (KeyboardInterrupt(), 130),
        (KeyboardInterrupt(signal.SIGTERM), 143),
        (BrokenPipeError(), 141),
        (NotADirectoryError(20, "Not a directory", "samples/x"), USAGE),
    ],
)
def test_an_error_has_its_code(error: BaseException, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    def body() -> int:
        raise error

    assert reported(body) == code
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*DIGITS, "data=digtis"], "data.name: unknown data set 'digtis'; did you mean digits?"),
        ([*DIGITS, "data=folder"], "the data set 'folder' needs data.path"),
        ([*DIGITS, "data.path=images"], "to train on images, set data.name=folder"),
        ([*DIGITS, "data.size=16"], "set data.name=folder, zip, webdataset, huggingface, or remove data.size"),
        ([*DIGITS, "network.attention_resolutions=5"], "no stage has side 5"),
        ([*DIGITS, "classes=8"], "set network.classes to 10"),
        ([*DIGITS, "sample.sampler=heun", "sample.steps=2"], "sample.steps 2: heun takes an odd number"),
        ([*DIGITS, "--max-failures", "-1"], "max_failures=-1: give the number of restarts"),
        ([*DIGITS, "--timeout", "0"], "timeout=0"),
        ([*DIGITS, "--run-dir", "s3:/bucket/run"], "write two slashes"),
        ([*DIGITS, "--run-dir", "file"], "the run directory file is a file"),
        (["sample", RELEASE, "--nfe", "2", "--sampler", "heun"], "steps 2: heun takes an odd number"),
        (["sample", RELEASE, "--count", "1", "--out", "file"], "File exists (file); give another path"),
        (["sample", RELEASE, "--count", "1", "--out", "file/x"], "Not a directory (file/x); give another path"),
    ],
)
def test_a_mistake_of_the_user_is_code_2_and_leaves_nothing(
    arguments: list[str], message: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "file").touch()
    assert main(arguments) == USAGE
    printed = capsys.readouterr().err
    assert message in printed, printed
    assert printed.count("error: ") == 1 and "Traceback" not in printed
    assert [path.name for path in here.iterdir()] == ["file"]


def test_a_stop_before_the_first_checkpoint_promises_none(capsys: pytest.CaptureFixture[str]) -> None:
    def body() -> int:
        os.kill(os.getpid(), signal.SIGINT)
        return 0

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        assert reported(body, clean_up=False) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().err == (
        "stopped immediately; the same command resumes from the newest checkpoint, or starts again if there is none\n"
    )
