"""udddm-evaluate: agreement with the yardstick, caching, and errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import udddm
from udddm import api
from udddm.backends.distributed.ranks import Ranks
from udddm.cli.evaluate import main
from udddm.cli.sample import main as sample_command
from udddm.config import resolve
from udddm.data.sources import digits
from udddm.evaluation import evaluate

YARDSTICK = Path(__file__).parents[2] / "benchmarks" / "yardstick"
TINY: dict[str, Any] = {
    "data": {"name": "digits"},
    "schedule": {"kind": "ve", "sigma_min": 0.05, "sigma_max": 30.0},
    "network": {
        "base_channels": 8,
        "channel_mult": [1],
        "blocks_per_level": 1,
        "attention_resolutions": [],
        "dropout": 0.0,
        "condition": "none",
    },
    "train": {"steps": 4, "batch_size": 32, "torch_threads": 1},
    "sample": {"every_steps": 0},
}


@pytest.fixture(autouse=True)
def _path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(YARDSTICK))
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


def evaluated(tmp_path: Path, *arguments: str) -> dict[str, Any]:
    out = tmp_path / "figures.json"
    assert main([*arguments, "--cache", str(tmp_path / "cache"), "--json", str(out), "--device", "cpu"]) == 0
    return json.loads(out.read_text())


def samples(path: Path, count: int = 700, dtype: type = np.float32) -> Path:
    """Digits with some noise."""
    images, _ = digits().batch(np.arange(count))
    images = images.astype(np.float64) + 0.3 * np.random.default_rng(0).normal(size=(count, 1, 8, 8))
    images = images.clip(-1, 1)
    np.save(path, (images * 127.5 + 127.5).round().astype(np.uint8) if dtype is np.uint8 else images.astype(dtype))
    return path


@pytest.mark.parametrize("dtype", [np.float32, np.uint8])
def test_scores_equal_those_of_the_yardstick_on_the_same_file(tmp_path: Path, dtype: type) -> None:
    import yardstick

    path = samples(tmp_path / "s.npy", dtype=dtype)
    ours = evaluated(tmp_path, "--samples", str(path), "--set", "data.name=digits", "--features", "features:digits")
    theirs = yardstick.score("digits", torch.from_numpy(np.load(path)))
    for key in ("fd", "precision", "recall"):
        assert ours[key] == pytest.approx(theirs[key], abs=1e-3), key
    assert ours["n"] == 700 and not ours["collapsed"] and ours["fd"] > 1
    assert 1 < ours["inception_score"] < 10


def test_a_model_is_scored_over_seeds_and_a_collapse_is_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    api.train(resolve(TINY), run_dir=tmp_path / "run", device="cpu")
    arguments = ("--checkpoint", str(tmp_path / "run"), "--features", "features:digits", "--count", "60")
    found = evaluated(tmp_path, *arguments, "--repeat", "3", "--steps", "2", "--batch", "32")
    assert found["repeat"] == 3 and len(found["each"]) == 3 and found["evaluations"] == 2
    figures = [one["fd"] for one in found["each"]]
    assert found["fd"] == pytest.approx(np.mean(figures)) and len(set(figures)) == 3
    assert found["fd_over_seeds"] == pytest.approx(np.std(figures, ddof=1))
    images = api.sample(tmp_path / "run", range(60, 120), steps=2, batch=32)
    np.save(tmp_path / "second.npy", images)
    second = evaluated(
        tmp_path,
        "--samples",
        str(tmp_path / "second.npy"),
        "--set",
        "data.name=digits",
        "--features",
        "features:digits",
    )
    assert second["fd"] == pytest.approx(found["each"][1]["fd"], rel=1e-5)
    np.save(tmp_path / "alike.npy", np.zeros((50, 1, 8, 8), np.float32))
    alike = evaluated(
        tmp_path, "--samples", str(tmp_path / "alike.npy"), "--set", "data.name=digits", "--features", "features:digits"
    )
    assert alike["collapsed"] and "COLLAPSED" in capsys.readouterr().out


def test_statistics_are_computed_after_the_last_collective(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The statistics of a large data set take longer than the timeout of a collective."""
    api.train(resolve(TINY), run_dir=tmp_path / "run", device="cpu")
    calls: list[str] = []

    def noted(name: str, taken: Any) -> Any:
        return lambda *arguments: [calls.append(name), taken(*arguments)][1]

    for name in ("gather", "gather_first"):
        monkeypatch.setattr(Ranks, name, noted("exchange", getattr(Ranks, name)))
    monkeypatch.setattr(evaluate, "reference", noted("statistics", evaluate.reference))
    arguments = ("--checkpoint", str(tmp_path / "run"), "--features", "features:digits", "--count", "60")
    evaluated(tmp_path, *arguments, "--repeat", "2")
    assert calls.count("exchange") > 2 and calls.index("statistics") == len(calls) - 1


def test_a_model_is_loaded_on_the_device_of_its_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    api.train(resolve(TINY), run_dir=tmp_path / "run", device="cpu")
    load_model = udddm.load_model
    model = load_model(tmp_path / "run", device=torch.device("meta"))
    assert {p.device.type for p in model.network.parameters()} == {"meta"}
    devices: list[object] = []
    noted = lambda *a, **k: [devices.append(k["device"]), load_model(*a, **k)][1]  # noqa: E731
    monkeypatch.setattr("udddm.runs.model.load_model", noted)
    evaluated(tmp_path, "--checkpoint", str(tmp_path / "run"), "--features", "features:digits", "--count", "60")
    assert devices == [torch.device("cpu")]  # not "cuda", which would be the first GPU


def test_samples_are_scored_from_python(tmp_path: Path) -> None:
    from udddm.data import load_dataset
    from udddm.errors import DataError

    path = samples(tmp_path / "s.npy")
    command = evaluated(tmp_path, "--samples", str(path), "--set", "data.name=digits", "--features", "features:digits")
    dataset = load_dataset(resolve(TINY).data)
    found = udddm.evaluate(np.load(path), dataset, features="features:digits", device="cpu", cache=tmp_path / "cache")
    assert found["fd"] == command["fd"]
    with pytest.raises(DataError, match=r"1, 9, 9"):
        udddm.evaluate(np.zeros((5, 1, 9, 9)), dataset, features="features:digits")


def test_guidance_is_the_same_in_evaluation_and_sampling(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labelled = {**TINY["network"], "classes": 10, "label_dropout": 0.3}
    run, out = tmp_path / "run", tmp_path / "samples"
    api.train(resolve({**TINY, "network": labelled}), run_dir=run, device="cpu")
    arguments = ("--checkpoint", str(run), "--features", "features:digits", "--count", "60", "--ema", "none")
    guided = evaluated(tmp_path, *arguments, "--guidance", "3")
    assert guided["guidance"] == 3 and "1 evaluation, guidance 3;" in capsys.readouterr().out
    plain = evaluated(tmp_path, *arguments)
    assert plain["guidance"] == 1 and plain["fd"] != guided["fd"]
    command = ["--checkpoint", str(run), "--ema", "none", "--seeds", "0-59", "--guidance", "3", "--batch", "60"]
    assert sample_command([*command, "--device", "cpu", "--out", str(out)]) == 0
    file = evaluated(
        tmp_path, "--samples", str(out / "samples.npy"), "--set", "data.name=digits", "--features", "features:digits"
    )
    assert file["fd"] == pytest.approx(guided["fd"], rel=1e-4) and file["guidance"] is None
    api.train(resolve(TINY), run_dir=tmp_path / "plain", device="cpu")
    assert main(["--checkpoint", str(tmp_path / "plain"), *arguments[2:], "--guidance", "3", "--device", "cpu"]) == 2
    assert "--guidance 3: the network takes no labels" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--features", "nowhere.pt"], "nowhere.pt"),
        (["--features", "features:digit"], "did you mean digits"),
        (["--features", "sincere"], "package.module:function"),
    ],
)
def test_a_wrong_feature_network_is_reported(
    tmp_path: Path, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = samples(tmp_path / "s.npy", 50)
    assert main(["--samples", str(path), "--set", "data.name=digits", "--device", "cpu", *arguments]) in (1, 2)
    assert words in capsys.readouterr().err


def test_wrong_samples_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "s.npy"

    def refused(array: np.ndarray) -> str:
        np.save(path, array)
        arguments = ["--samples", str(path), "--set", "data.name=digits", "--features", "features:digits"]
        assert main([*arguments, "--cache", str(tmp_path), "--device", "cpu"]) == 1
        return capsys.readouterr().err

    assert "[5, 1, 9, 9]" in refused(np.zeros((5, 1, 9, 9), np.float32))
    assert "int64" in refused(np.zeros((5, 1, 8, 8), np.int64))
    broken = np.zeros((5, 1, 8, 8), np.float32)
    broken[3, 0, 0, 0] = np.nan
    assert "sample 3" in refused(broken)


def test_training_is_scored_in_the_background(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    plain = api.train(resolve(TINY), run_dir=tmp_path / "plain", device="cpu")
    settings = {"evaluate": {"every_steps": 2, "count": 40, "features": "features:digits"}}
    scored = api.train(resolve(TINY | settings), run_dir=tmp_path / "run", device="cpu")
    assert scored["weights_sha256"] == plain["weights_sha256"]
    lines = [json.loads(line) for line in (tmp_path / "run" / "evaluation.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4]
    own = evaluated(tmp_path, "--checkpoint", str(tmp_path / "run"), "--features", "features:digits", "--count", "40")
    assert lines[-1]["fd"] == pytest.approx(own["fd"], rel=1e-5)
