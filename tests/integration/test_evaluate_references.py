"""udddm evaluate and evaluation during training with reference files, held-out images, and several feature networks."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import udddm
from udddm import api
from udddm.cli.evaluate import main
from udddm.config import resolve
from udddm.data.sources import digits
from udddm.errors import ConfigError, DataError
from udddm.testing.features import random_dinov2, random_inception

YARDSTICK = Path(__file__).parents[2] / "benchmarks" / "yardstick"
NETWORK = "features:digits"


@pytest.fixture(autouse=True)
def _path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(YARDSTICK))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def samples(tmp_path: Path) -> Path:
    images, _ = digits().batch(np.arange(300))
    np.save(tmp_path / "samples.npy", (images + 0.3 * np.random.default_rng(0).normal(size=images.shape)).clip(-1, 1))
    return tmp_path / "samples.npy"


def evaluated(tmp_path: Path, *arguments: str) -> dict[str, Any]:
    out = tmp_path / "figures.json"
    assert main([*arguments, "--json", str(out), "--device", "cpu"]) == 0
    return json.loads(out.read_text())


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    try:
        assert main([*arguments, "--device", "cpu"]) in (1, 2)
    except SystemExit as error:
        assert error.code == 2
    return capsys.readouterr().err


def torchscript(path: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.trace(torch.nn.Sequential(torch.nn.Flatten()), torch.zeros(1, 1, 8, 8)).save(str(path))
    return path


def test_a_reference_file_gives_the_scores_of_its_data_set(
    tmp_path: Path, samples: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ("--samples", str(samples), "--features", NETWORK)
    expected = evaluated(tmp_path, *given, "data.name=digits")
    cached = next((tmp_path / "cache" / "udddm" / "evaluation").glob("*.npz"))
    with np.load(cached) as real:
        np.savez(tmp_path / "r.npz", mu=real["mean"], sigma=real["covariance"])
    found = evaluated(tmp_path, *given, "--reference", str(tmp_path / "r.npz"))
    assert found["fd"] == expected["fd"] and found["spread"] == expected["spread"]
    assert found["data"] == str(tmp_path / "r.npz") and "kid" not in found and "precision" not in found
    assert "not computed, because" in capsys.readouterr().err
    for name in ("kid", "precision-recall"):
        message = refused(capsys, *given, "--reference", str(tmp_path / "r.npz"), "--metrics", f"frechet,{name}")
        assert f"the metrics {name} need features" in message
    images, _ = digits().batch(np.arange(1797))
    pixels = ((images + 1) * 127.5).round().astype(np.uint8).transpose(0, 2, 3, 1)
    np.savez(tmp_path / "images.npz", arr_0=pixels)
    found = evaluated(tmp_path, *given, "--reference", str(tmp_path / "images.npz"))
    for name in ("fd", "kid", "precision", "recall"):  # the digits have 17 levels, which are not among the 256
        assert found[name] == pytest.approx(expected[name], rel=0.02), name


def test_a_run_is_scored_against_a_reference_without_its_data(tmp_path: Path) -> None:
    network = {"base_channels": 8, "channel_mult": [1], "blocks_per_level": 1, "attention_resolutions": []}
    config = {
        "network": {**network, "condition": "none"},
        "train": {"steps": 2, "batch_size": 8, "torch_threads": 1},
        "data": {"name": "array", "path": str(tmp_path / "data.npy")},
        "sample": {"every_steps": 0},
    }
    images = np.random.default_rng(0).integers(0, 256, (16, 1, 8, 8), dtype=np.uint8)
    np.save(tmp_path / "data.npy", images)
    weights = f"{tmp_path}/w.pth#sha256={random_dinov2(tmp_path / 'w.pth')}"
    np.savez(tmp_path / "r.npz", arr_0=images.transpose(0, 2, 3, 1))
    scores = {
        "every_steps": 2,
        "count": 8,
        "features": f"{NETWORK},dinov2",
        "dinov2_weights": weights,
        "reference": str(tmp_path / "r.npz"),
    }
    api.train(resolve({**config, "evaluate": scores}), run_dir=tmp_path / "run", device="cpu")
    (line,) = (json.loads(text) for text in (tmp_path / "run" / "evaluation.jsonl").read_text().splitlines())
    (tmp_path / "data.npy").unlink()
    options = ("--features", f"{NETWORK},dinov2", "--dinov2-weights", weights, "--count", "8")
    found = evaluated(tmp_path, str(tmp_path / "run"), *options, "--reference", str(tmp_path / "r.npz"))
    (name,) = found["networks"]
    assert name.startswith("dinov2#") and found["features"] == NETWORK
    for scored, kept in ((found, line), (found["networks"][name], line["networks"][name])):
        for key in ("fd", "kid", "precision", "recall", "spread"):
            assert scored[key] == pytest.approx(kept[key], rel=1e-4, abs=1e-6), key
    assert line["fd"] != line["networks"][name]["fd"]


def test_inception_scores_the_same_during_and_after_training(tmp_path: Path) -> None:
    network = {"base_channels": 8, "channel_mult": [1], "blocks_per_level": 1, "attention_resolutions": []}
    images = np.random.default_rng(0).integers(0, 256, (8, 3, 8, 8), dtype=np.uint8)
    np.save(tmp_path / "data.npy", images)
    weights = f"{tmp_path}/w.pth#sha256={random_inception(tmp_path / 'w.pth')}"
    config = {
        "network": {**network, "condition": "none"},
        "train": {"steps": 1, "batch_size": 8, "torch_threads": 1},
        "data": {"name": "array", "path": str(tmp_path / "data.npy")},
        "sample": {"every_steps": 0},
        "evaluate": {
            "every_steps": 1,
            "count": 4,
            "metrics": ["kid", "precision-recall"],
            "inception_weights": weights,
        },
    }
    api.train(resolve(config), run_dir=tmp_path / "run", device="cpu")
    (line,) = (json.loads(text) for text in (tmp_path / "run" / "evaluation.jsonl").read_text().splitlines())
    options = ("--inception-weights", weights, "--metrics", "kid,precision-recall", "--count", "4", "--trust")
    found = evaluated(tmp_path, str(tmp_path / "run"), *options)
    assert found["kid"] == pytest.approx(line["kid"], rel=1e-4) and found["precision"] == line["precision"]


def test_published_networks_from_python(tmp_path: Path) -> None:
    images, _ = digits().batch(np.arange(40))
    weights = f"{tmp_path}/w.pth#sha256={random_dinov2(tmp_path / 'w.pth')}"
    found = udddm.evaluate(images[:20], images, features="dinov2", weights=weights, device="cpu")
    assert found.fd is not None and found.fd > 0 and found.fid is None and found.precision == 1
    with pytest.raises(ConfigError, match="has no effect on the feature network"):
        udddm.evaluate(images[:20], images, features=NETWORK, weights=weights)
    with pytest.raises(ConfigError, match=r"as TorchScript: .*--dinov2-weights"):
        udddm.evaluate(images[:20], images, features=str(tmp_path / "w.pth"))


def test_held_out_images_give_a_ratio(tmp_path: Path, samples: Path, capsys: pytest.CaptureFixture[str]) -> None:
    order = np.random.default_rng(0).permutation(np.arange(300, 1797))  # the writers of the digits differ
    images, _ = digits().batch(np.concatenate([np.arange(300), order]))
    np.save(tmp_path / "train.npy", images[300:1000])
    np.save(tmp_path / "test.npy", images[1000:])
    np.save(tmp_path / "same.npy", images[1000:1300])
    given = ("--features", NETWORK, "data.name=array", f"data.path={tmp_path / 'train.npy'}")
    held = ("--held-out", str(tmp_path / "test.npy"))
    noisy = evaluated(tmp_path, "--samples", str(samples), *given, *held)
    real = evaluated(tmp_path, "--samples", str(tmp_path / "same.npy"), *given, *held)
    assert real["fd_held_out"] == noisy["fd_held_out"] and real["fd_ratio"] == 1 and noisy["fd_ratio"] > 1.5
    assert "fd_ratio" in capsys.readouterr().out
    np.save(tmp_path / "large.npy", np.zeros((5, 1, 9, 9), np.uint8))
    message = refused(capsys, "--samples", str(samples), *given, "--held-out", str(tmp_path / "large.npy"))
    assert "--held-out has images of 1x9x9, and the samples are 1x8x8" in message


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--features", NETWORK, "--inception-weights", "w.pth"], "--inception-weights has no effect"),
        (["--features", "inception", "--dinov2-weights", "w.pth"], "--dinov2-weights has no effect"),
        (["--features", f"{NETWORK},,inception"], "a name is empty"),
        (["--features", f"{NETWORK},{NETWORK}"], "is named twice"),
        (["--inception-weights", "nowhere.pth"], "nowhere.pth does not exist. On a machine without internet access"),
        (["--features", NETWORK, "--reference", "r.npz", "data.name=digits"], "data.name=digits has no effect"),
        (["--features", NETWORK, "--reference", "r.npz", "--config", "digits"], "--config names a data set"),
        (["--features", NETWORK, "--reference", "nowhere.npz"], "nowhere.npz does not exist"),
        (["--features", NETWORK, "--held-out", "nowhere"], "nowhere: there is no such folder"),
    ],
)
def test_mistakes_are_one_clear_error(
    samples: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    message = refused(capsys, "--samples", str(samples), *arguments)
    assert words in message and message.count("error:") == 1


def test_a_reference_of_another_network_is_refused_before_training(tmp_path: Path) -> None:
    np.savez(tmp_path / "r.npz", mu=np.zeros(9), sigma=np.eye(9))
    scores = {"every_steps": 1, "count": 4, "features": NETWORK, "reference": str(tmp_path / "r.npz")}
    settings = {"data": {"name": "digits"}, "train": {"steps": 1, "batch_size": 8}, "evaluate": scores}
    with pytest.raises(DataError, match=r"r\.npz has statistics of 9 features"):
        api.train(resolve(settings), run_dir=tmp_path / "run", device="cpu")
    scores["metrics"] = ["kid"]
    with pytest.raises(ConfigError, match="the metrics kid need features"):
        api.train(resolve(settings), run_dir=tmp_path / "run", device="cpu")


def test_configurations_with_settings_that_are_ignored_are_refused() -> None:
    with pytest.raises(ConfigError, match="inception_weights has no effect"):
        resolve({"evaluate": {"features": "mine:function", "inception_weights": "w.pth"}})
    with pytest.raises(ConfigError, match="is named twice"):
        resolve({"evaluate": {"features": ["inception", "inception"]}})
    assert resolve({"evaluate": {"features": "inception,dinov2"}}).evaluate.features == ("inception", "dinov2")
