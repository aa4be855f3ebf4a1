"""`hf://user/model` reads the cache of huggingface_hub, in which every file is a link, and nothing outside of it."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

import udddm
from udddm.cli.evaluate import main as evaluate
from udddm.errors import CheckpointError, ConfigError
from udddm.runs import hub, pretrained
from udddm.testing.models import random_model, saved

huggingface_hub = pytest.importorskip("huggingface_hub")
WEIGHTS = "ema-0.9.safetensors"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A release."""
    settings = ["network={base_channels: 8, channel_mult: [1], condition: none}", "ema=0.9"]
    return saved(random_model(*settings), tmp_path_factory.mktemp("hub") / "release")


@pytest.fixture
def cache(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory of someone/model in a cache, as a download leaves it, without a network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    place = tmp_path / "hub" / "models--someone--model"
    for name in ("blobs", "refs", f"snapshots/{COMMIT}"):
        (place / name).mkdir(parents=True)
    (place / "refs" / "main").write_text(COMMIT)
    for number, name in enumerate(("config.json", WEIGHTS, "pytorch_model.bin")):
        source = made / name
        if source.exists():
            shutil.copy(source, place / "blobs" / f"{number}")
        else:
            (place / "blobs" / f"{number}").write_bytes(b"a pickle")
        (place / "snapshots" / COMMIT / name).symlink_to(Path("../../blobs") / f"{number}")
    return place


@pytest.mark.parametrize("address", ["hf://someone/model", "hf://someone/model@main", f"hf://someone/model@{COMMIT}"])
def test_a_model_in_the_cache_is_that_of_the_release(made: Path, cache: Path, address: str) -> None:
    expected = udddm.load_model(made, device="cpu").sample(range(2))
    assert np.array_equal(udddm.load_model(address, device="cpu").sample(range(2)), expected)
    assert pretrained.recorded_data(address) is None


@pytest.mark.parametrize("name", ["config.json", WEIGHTS])
@pytest.mark.parametrize("kind", ["file", "directory", "nowhere", "loop"])
def test_a_link_out_of_the_cache_is_refused(made: Path, cache: Path, tmp_path: Path, name: str, kind: str) -> None:
    link = cache / "snapshots" / COMMIT / name
    link.unlink()
    outside = tmp_path / "outside" / name
    outside.parent.mkdir()
    if kind == "file":
        shutil.copy(made / name, outside)
    elif kind == "directory":
        outside.mkdir()
    link.symlink_to(link if kind == "loop" else outside)
    with pytest.raises(CheckpointError) as caught:
        udddm.load_model("hf://someone/model", device="cpu")
    assert "hf://someone/model" in str(caught.value) or str(link) in str(caught.value)


def test_the_weights_of_a_stranger_import_and_unpickle_nothing(made: Path, cache: Path) -> None:
    config = cache / "snapshots" / COMMIT / "config.json"
    theirs = json.loads(config.read_text())
    theirs["config"]["network"]["name"] = "evil:make"
    config.resolve().write_text(json.dumps(theirs))
    with pytest.raises(ConfigError, match=r"network\.name=evil:make"):
        udddm.load_model("hf://someone/model", device="cpu")
    shutil.copy(made / "config.json", config.resolve())
    (cache / "snapshots" / COMMIT / WEIGHTS).unlink()  # only pytorch_model.bin is left
    with pytest.raises(CheckpointError, match=rf"{WEIGHTS} does not exist"):
        udddm.load_model("hf://someone/model", device="cpu")


@pytest.mark.parametrize(
    "address",
    ["hf://model", "hf://a/b/c", "hf://../b", "hf://a/..", "hf://a/b@../c", "hf://a/b@", "hf://-a/", "hf:///a/b"],
)
def test_a_malformed_address_is_one_error(address: str, cache: Path) -> None:
    with pytest.raises(ConfigError, match=r"write hf://user/model"):
        udddm.load_model(address, device="cpu")


def test_what_is_not_there_is_one_error(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(CheckpointError, match="not in the local cache"):
        udddm.load_model("hf://someone/other", device="cpu")
    with pytest.raises(CheckpointError, match="not in the local cache"):
        udddm.load_model("hf://someone/model@v2", device="cpu")
    with pytest.raises(CheckpointError, match="single checkpoint"):
        udddm.load_model("hf://someone/model", ema_length=0.1, device="cpu")
    (cache / "snapshots" / COMMIT / "config.json").unlink()
    assert evaluate(["hf://someone/model", "--features", "json:loads", "--device", "cpu"]) == 1
    assert "cannot download hf://someone/model" in capsys.readouterr().err


def test_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ConfigError, match=r"pip install 'udddm\[hub\]'"):
        hub.snapshot("hf://someone/model")
