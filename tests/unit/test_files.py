"""Paths given by users: ~, URLs that lost a slash, and machines without a home directory."""

import os
import pwd
import tempfile
from pathlib import Path

import numpy as np
import pytest

import udddm
from udddm.cli import sample as sample_command
from udddm.config import DataConfig, load_config
from udddm.data import load_dataset
from udddm.data.download import cache_directory
from udddm.errors import ConfigError, UdddmError
from udddm.files import expanded, home_cache
from udddm.runs.remote import open_run, scratch
from udddm.storage import local_path, open_object_store


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "home").mkdir()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("XDG_CACHE_HOME", "UDDDM_SCRATCH"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "home"


@pytest.fixture
def homeless(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Neither HOME nor an entry in the password file, as for a random user ID in a container."""

    def no_entry(_: object) -> None:
        raise KeyError("getpwuid(): uid not found")

    for name in ("HOME", "XDG_CACHE_HOME", "UDDDM_SCRATCH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", no_entry)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_the_home_directory_is_expanded_in_every_path_argument(home: Path) -> None:
    np.save(home / "x.npy", np.zeros((4, 8, 8), np.uint8))
    (home / "preset.yaml").write_text("train: {steps: 3}\n")
    assert expanded("~/x") == home / "x"
    assert local_path("~/x") == home / "x"
    assert open_run("~/run").path == home / "run"
    assert load_config("~/preset.yaml").train.steps == 3
    assert len(load_dataset(DataConfig(name="array", path="~/x.npy"))) == 4
    open_object_store("~/store").put("a", b"1")
    assert (home / "store" / "a").read_bytes() == b"1"
    assert not Path("~").exists()


@pytest.mark.parametrize("where", ["s3:/bucket/run", Path("s3://bucket/run"), "file:/run", "gs:/bucket"])
def test_a_url_that_lost_a_slash_is_refused(home: Path, where: str | Path) -> None:
    for call in (local_path, open_run, open_object_store):
        with pytest.raises(UdddmError, match="two slashes after the scheme"):
            call(where)
    with pytest.raises(ConfigError, match="two slashes"):
        udddm.train({"train": {"steps": 1}}, run_dir=where, device="cpu")
    assert not list(Path().iterdir())


def test_a_directory_whose_name_has_a_colon_can_be_named() -> None:
    assert local_path("./s3:/bucket") == Path("s3:/bucket")
    assert local_path("a:b/c") == Path("a:b/c")


@pytest.mark.parametrize("out", ["s3://bucket/out", "s3:/bucket/out"])
def test_a_url_is_refused_as_a_local_path(home: Path, out: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        sample_command.main(["--checkpoint", "run", "--out", out])
    assert ended.value.code == 2
    assert "slash" in capsys.readouterr().err or "://" in out


def test_without_a_home_directory_caches_are_temporary(homeless: Path) -> None:
    assert home_cache() == cache_directory() == scratch() == homeless / f"udddm-{os.getuid()}"
    assert home_cache().stat().st_mode & 0o777 == 0o700
    with pytest.raises(ConfigError, match=r"~ cannot be expanded.* set HOME"):
        expanded("~/x")


def test_a_temporary_cache_of_another_user_is_refused(homeless: Path) -> None:
    (homeless / "theirs").mkdir()
    (homeless / f"udddm-{os.getuid()}").symlink_to(homeless / "theirs")
    with pytest.raises(ConfigError, match="belongs to another user"):
        home_cache()
