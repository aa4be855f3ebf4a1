"""A directory or URL with somebody else's files is refused before anything in it changes."""

from __future__ import annotations

import uuid
from pathlib import Path

import pytest

import udddm
from udddm.cli.command import USAGE
from udddm.cli.train import main as train_command
from udddm.errors import ConfigError
from udddm.storage import open_object_store

TINY = {
    "network": {
        "base_channels": 4,
        "channel_mult": [1],
        "blocks_per_level": 1,
        "attention_resolutions": [],
        "condition": "none",
    },
    "train": {"steps": 1, "batch_size": 64, "ema": [0.9]},
    "sample": {"every_steps": 0},
}


def train(where: str | Path) -> udddm.TrainResult:
    return udddm.train(TINY, run_dir=where, device="cpu")


def test_a_directory_that_is_not_a_run_is_not_touched(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter").write_text("mine")
    with pytest.raises(ConfigError, match=r"is not a run, and it is not empty \(thesis\): choose a new directory"):
        train(tmp_path)
    arguments = ["--config", "digits", "--run-dir", str(tmp_path), "--device", "cpu"]
    assert train_command(arguments) == USAGE
    assert f"such as {tmp_path}/run" in capsys.readouterr().err
    assert [path.name for path in tmp_path.rglob("*")] == ["thesis", "chapter"]


def test_a_file_is_not_a_run_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match=r"the run directory .*file is a file"):
        train(tmp_path / "file")


def test_a_new_run_may_have_logs_in_its_directory(tmp_path: Path) -> None:
    for name in ("slurm-17.out", "train.log", ".lock"):
        (tmp_path / name).touch()
    (tmp_path / "lost+found").mkdir()
    assert train(tmp_path).steps == 1
    (tmp_path / "notes.md").touch()  # in the directory of a run, anything is allowed
    assert train(tmp_path).steps == 1


def test_a_url_with_other_objects_is_not_touched() -> None:
    url = f"memory://udddm/{uuid.uuid4().hex}"
    objects = open_object_store(url)
    objects.put("thesis/chapter", b"mine")
    with pytest.raises(ConfigError, match=r"is not a run, and it is not empty \(thesis\)"):
        train(url)
    assert list(objects.list("")) == ["thesis"]
    objects.delete("thesis")
    assert train(url).steps == train(url).steps == 1


@pytest.mark.parametrize("where", ["s3:/bucket/run", "s3:bucket/run", "gs:bucket", "https:/host/run"])
def test_a_url_that_lost_its_slashes_makes_no_directory(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="write two slashes after the scheme"):
        train(where)
    with pytest.raises(ConfigError, match="write two slashes after the scheme"):
        udddm.load_model(where)
    assert not list(tmp_path.iterdir())
