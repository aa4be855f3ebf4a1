"""Runs that save power-function EMAs, and EMAs whose length is chosen after training."""

from __future__ import annotations

import json
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from udddm import api
from udddm.cli.command import FAILED, USAGE
from udddm.cli.evaluate import main as evaluate_command
from udddm.cli.sample import main as sample_command
from udddm.config import RunConfig, resolve
from udddm.errors import CheckpointError, ConfigError
from udddm.runs import posthoc_ema
from udddm.runs.model import Model, load_model
from udddm.runs.run import Run
from udddm.runs.weights import Saved

TINY: dict[str, Any] = {
    "data": {"name": "digits"},
    "network": {
        "base_channels": 8,
        "channel_mult": [1],
        "blocks_per_level": 1,
        "attention_resolutions": [],
        "dropout": 0.1,
        "condition": "none",
    },
    "sample": {"every_steps": 0},
    "checkpoint": {"every_steps": 10},
}


def config(*lengths: float, every: int = 2, plain: tuple[float, ...] = (0.9,), steps: int = 40) -> RunConfig:
    train = {"steps": steps, "batch_size": 64, "torch_threads": 1, "learning_rate": 3e-3, "ema": plain}
    return resolve(TINY | {"train": train | {"power_ema": lengths, "power_ema_every_steps": every}})


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run that kept lengths 0.05 and 0.1, every 2 of 40 steps."""
    directory = tmp_path_factory.mktemp("posthoc") / "run"
    api.train(config(0.05, 0.1), run_dir=directory, device="cpu")
    return directory


def sha256s(directory: Path) -> dict[str, str]:
    return {k: v for k, v in json.loads((directory / "result.json").read_text()).items() if k.endswith("sha256")}


def files(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def weights(model: Model) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.network.parameters()])


def test_a_length_chosen_after_training_equals_one_kept_during_training(run: Path, tmp_path: Path) -> None:
    api.train(config(0.07, plain=()), run_dir=tmp_path / "other", device="cpu")
    assert sha256s(tmp_path / "other")["weights_sha256"] == sha256s(run)["weights_sha256"]
    aim = weights(load_model(tmp_path / "other"))  # the first power EMA, because there is no other
    found = weights(load_model(run, ema_length=0.07))
    kept = {name: weights(load_model(run, ema=name)) for name in ("power-0.05", "power-0.1", "0.9", "none")}
    assert (found - aim).norm() < 1e-3 * aim.norm()
    assert all((found - aim).norm() < 0.1 * (other - aim).norm() for other in kept.values())
    assert (weights(load_model(run, ema_length=0.1)) - kept["power-0.1"]).norm() < 1e-3 * aim.norm()


def test_snapshots_are_complete_networks_at_every_interval_and_the_last_step(tmp_path: Path) -> None:
    api.train(config(0.05, 0.1, every=7, steps=16), run_dir=tmp_path, device="cpu")
    found = posthoc_ema.stored(tmp_path / "ema")
    assert [(one.step, one.length) for one in found] == [(s, x) for s in (7, 14, 16) for x in (0.05, 0.1)]
    last = Saved(tmp_path / "checkpoints" / "step-00000016", "ema-power-0.05")
    half = Saved(tmp_path / "ema" / "step-00000016", "power-0.05")
    assert set(last) == set(half)
    assert all(torch.equal(half[name], last[name].half()) for name in last)


def test_a_run_resumes_bit_for_bit_with_its_emas(run: Path, tmp_path: Path) -> None:
    chosen = config(0.05, 0.1)
    api.train(chosen, run_dir=tmp_path, device="cpu")
    (tmp_path / "result.json").unlink()
    (tmp_path / "checkpoints" / "step-00000040" / "manifest.json").unlink()
    for step in ("step-00000036", "step-00000040"):  # truncated, and missing
        path = tmp_path / "ema" / step / "power-0.05.safetensors"
        path.with_name(path.name + ".partial").write_bytes(path.read_bytes()[:100])
        path.unlink()
    assert len(posthoc_ema.stored(tmp_path / "ema")) == 38
    api.train(chosen, run_dir=tmp_path, device="cpu")
    assert sha256s(tmp_path) == sha256s(run)
    assert files(tmp_path / "ema") == files(run / "ema")


def test_two_ranks_save_unsharded_emas(forked_workers: None, tmp_path: Path) -> None:
    """In a single file, although each rank writes a share of the checkpoint's files."""
    api.train(config(0.05, 0.1, every=4, steps=6), run_dir=tmp_path, device="cpu", workers=2)
    found = posthoc_ema.stored(tmp_path / "ema")
    assert [(one.step, one.length) for one in found] == [(s, x) for s in (4, 6) for x in (0.05, 0.1)]
    last = Saved(tmp_path / "checkpoints" / "step-00000006", "ema-power-0.1")
    half = Saved(found[-1].path.parent, "power-0.1")
    assert set(last) == set(half)
    assert all(torch.equal(half[name], last[name].half()) for name in last)


def test_a_run_at_a_url_has_the_same_emas(run: Path) -> None:
    url = f"memory://{uuid.uuid4().hex}"
    chosen = config(0.05, 0.1).model_copy(update={"store": config().store.model_copy(update={"kind": "zarr"})})
    api.train(chosen, run_dir=url, device="cpu")
    assert torch.equal(weights(load_model(url, ema_length=0.07)), weights(load_model(run, ema_length=0.07)))
    with pytest.raises(CheckpointError, match=rf"EMAs in {url} cannot"):
        load_model(url, ema_length=0.01)
    with pytest.raises(CheckpointError, match="is a single checkpoint"):
        load_model(f"{url}/checkpoints/step-00000040", ema_length=0.07)


def test_the_commands_accept_an_ema_length_or_name(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    common = ["--checkpoint", str(run), "--device", "cpu"]
    drawn = {}
    for name in ("--ema-length=0.07", "--ema=power-0.1", "--ema=none"):
        assert sample_command([*common, name, "--seeds", "0-3", "--out", str(tmp_path)]) == 0
        drawn[name] = np.load(tmp_path / "samples.npy")
    assert np.array_equal(drawn["--ema-length=0.07"], api.sample(load_model(run, ema_length=0.07), range(4)))
    assert len({image.tobytes() for image in drawn.values()}) == 3
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks" / "yardstick"))
    figures = []
    for name in ("--ema-length=0.07", "--ema=none"):
        scoring = ["--features=features:digits", "--count=40", f"--cache={tmp_path}", f"--json={tmp_path / 'f.json'}"]
        assert evaluate_command([*common, name, *scoring]) == 0
        figures.append(json.loads((tmp_path / "f.json").read_text())["fd"])
    assert figures[0] != figures[1]


def test_a_range_of_lengths_is_scored_and_plotted(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks" / "yardstick"))
    scoring = ["--checkpoint", str(run), "--device=cpu", "--features=features:digits", "--count=40"]
    scoring += [f"--cache={tmp_path}", f"--json={tmp_path / 'f.json'}"]
    assert evaluate_command([*scoring, "--ema-length=0.001:0.1:3", f"--plot={tmp_path / 'new' / 'f.png'}"]) == 0
    said = capsys.readouterr()
    found = json.loads((tmp_path / "f.json").read_text())
    fds = {row["ema_length"]: row["fd"] for row in found["rows"]}
    assert list(fds) == [0.0505, 0.1] and fds[found["best"]] == min(fds.values())
    assert "length 0.001 is skipped" in said.err and said.out.count("<- best") == 1
    assert (tmp_path / "new" / "f.png").read_bytes().startswith(b"\x89PNG")
    assert evaluate_command([*scoring, "--ema-length=0.1"]) == 0
    assert json.loads((tmp_path / "f.json").read_text())["fd"] == fds[0.1]

    assert evaluate_command([*scoring, "--ema-length=0.001:0.002"]) == FAILED  # the saved averages determine none
    for wrong in ("0.1:0.05", "0.1:", "0.1:0.2:1", "0.1:0.2:3:4", "a:b"):
        with pytest.raises(SystemExit):
            evaluate_command([*scoring, f"--ema-length={wrong}"])
        assert "write a length such as 0.07, or a range" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        evaluate_command([*scoring, "--plot=x.png"])


def test_without_power_emas_nothing_changes(tmp_path: Path) -> None:
    """Neither a run's fingerprint nor its files; and a run started with another snapshot interval resumes."""
    assert "power_ema" in RunConfig().model_dump()["train"]
    plain = config()
    assert plain.fingerprint() == config(every=5).fingerprint() != config(0.05).fingerprint()
    assert config(0.05, every=5).fingerprint() == config(0.05, every=7).fingerprint()
    api.train(config(steps=4), run_dir=tmp_path, device="cpu")
    assert not (tmp_path / "ema").exists()
    assert not list(tmp_path.rglob("*power*"))


# Errors.


def test_unavailable_emas_are_errors_that_explain_why(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    api.train(config(steps=4), run_dir=tmp_path / "plain", device="cpu")
    api.train(config(0.05, every=4, steps=4), run_dir=tmp_path / "few", device="cpu")
    newest = run / "checkpoints" / "step-00000040"
    for where, length, code, words in (
        (tmp_path / "plain", "0.1", FAILED, ["holds no EMAs", "train.power_ema"]),
        (tmp_path / "few", "0.1", FAILED, ["the 1 EMAs", "cannot approximate one of length 0.1", "(0.05)"]),
        (run, "0.01", FAILED, ["cannot approximate one of length 0.01", "0.05, 0.1"]),
        (run, "0.3", USAGE, ["length", "0.2887", "0.3"]),
        (run, "nan", USAGE, ["length", "0.2887", "nan"]),
        (newest, "0.1", FAILED, ["is a single checkpoint", "give the run"]),
    ):
        assert sample_command(["--checkpoint", str(where), "--ema-length", length, "--device", "cpu"]) == code
        message = capsys.readouterr().err
        assert all(part in message for part in words), message
    assert sample_command(["--checkpoint", str(run), "--ema", "power-0.2", "--device", "cpu"]) == FAILED
    assert "no EMA power-0.2; it has 0.9, power-0.05, power-0.1, none" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        sample_command(["--checkpoint", str(run), "--ema", "none", "--ema-length", "0.1"])
    with pytest.raises(ConfigError, match="give only one of them"):
        load_model(run, ema="none", ema_length=0.1)


@pytest.mark.parametrize("harm", ["flip", "cut", "other"])
def test_a_damaged_ema_is_detected(harm: str, tmp_path: Path) -> None:
    api.train(config(0.05, every=4, steps=4), run_dir=tmp_path, device="cpu")
    path = tmp_path / "ema" / "step-00000004" / "power-0.05.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    shapes: dict[str, torch.Size] = {"w": torch.Size([3])}
    if harm != "other":
        shapes = {name: p.shape for name, p in load_model(tmp_path).network.named_parameters()}
        path.write_bytes(data if harm == "flip" else data[:-5])
    words = {"flip": "checksum; delete it", "cut": "cannot read", "other": "a different network"}[harm]
    with pytest.raises(CheckpointError, match=words):
        posthoc_ema.average(Run(tmp_path), 0.05, shapes)


def test_an_unwritable_ema_directory_is_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        Run, "persist", lambda run: (run.path / "ema").write_text("")
    )  # called once the run is recorded
    with pytest.raises(CheckpointError, match=r"cannot write the EMA .*the same command again"):
        api.train(config(0.05, every=4, steps=4), run_dir=tmp_path, device="cpu")
