"""Code that a checkpoint names (`network.name: evil:make`) runs only if the user trusts the checkpoint."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import google_crc32c
import numpy as np
import pytest

import udddm
from udddm.cli.command import USAGE
from udddm.cli.evaluate import main as evaluate
from udddm.cli.sample import main as sample
from udddm.cli.store import main as store
from udddm.config import load_config
from udddm.errors import ConfigError
from udddm.runs.manifest import dumps, parse

SETTINGS = [
    "network={base_channels: 8, channel_mult: [1], blocks_per_level: 1, attention_resolutions: [], dropout: 0.0, "
    "condition: none}",
    "order={lanes: 4, chunk: 64, window: 2}",
    "train={steps: 4, batch_size: 32, ema: [0.9]}",
    "checkpoint.every_steps=4",
    "sample.every_steps=0",
    "store.kind=zarr",
]
EVIL = """
from pathlib import Path
from udddm.networks.unet import build as make_network
from udddm.diffusion.schedule import VarianceExploding as make_schedule
Path(__file__ + ".ran").touch()
"""
MINE = "def features(batch): return batch.flatten(1)[:, :8]\n"
BUILDS_THE_MODEL = {"network": ("name", "evil:make_network"), "schedule": ("kind", "evil:make_schedule")}
IRRELEVANT = {
    "store": ("kind", "evil:make"),
    "engine": ("name", "evil:make"),
    "objective": ("name", "evil:make"),
    "sample": ("sampler", "evil:make"),
    "evaluate": ("metrics", ["frechet", "evil:make"]),
}


@pytest.fixture
def theirs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An untrusted run, with an importable module `evil` that creates a file when it is imported."""
    (tmp_path / "evil.py").write_text(EVIL)
    (tmp_path / "mine.py").write_text(MINE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "evil", raising=False)
    udddm.train(load_config(None, SETTINGS), run_dir=tmp_path / "theirs", device="cpu")
    return tmp_path / "theirs"


def rewrite(run: Path, section: str, key: str, value: object) -> None:
    """Replaces the configuration of a run and its checkpoints, and updates the manifests to match."""
    for path in [run / "run.json", *run.glob("checkpoints/*/config.json")]:
        found = json.loads(path.read_text())
        found["config"][section][key] = value
        path.write_text(json.dumps(found))
    for path in run.glob("checkpoints/*/manifest.json"):
        data = (path.parent / "config.json").read_bytes()
        entry = {"bytes": len(data), "crc32c": int(google_crc32c.value(data))}
        path.write_text(dumps(parse(path.read_bytes()) | {"config.json": entry}))


def looking(run: Path, out: Path) -> list[list[str]]:
    """The commands of udddm-store that read a run."""
    return [
        ["info", str(run)],
        ["verify", str(run)],
        ["convert", str(run), str(out / "copy")],
        ["view", str(run), "--sample", "3", "--out", str(out / "view.png")],
    ]


@pytest.mark.parametrize("section", BUILDS_THE_MODEL)
def test_a_network_or_schedule_of_an_untrusted_checkpoint_is_not_imported(
    section: str, theirs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key, value = BUILDS_THE_MODEL[section]
    rewrite(theirs, section, key, value)
    named = f"{section}.{key}={value}"
    ran, out = tmp_path / "evil.py.ran", tmp_path / "out"
    checkpoint = next(theirs.glob("checkpoints/*"))
    for where in (theirs, checkpoint):
        sampled = ["--checkpoint", str(where), "--seeds", "0-3", "--out", str(out), "--device", "cpu"]
        assert sample(sampled) == USAGE
        said = capsys.readouterr().err
        assert named in said and "--trust" in said and "trust=True" in said
        scored = ["--checkpoint", str(where), "--count", "8", "--features", "mine:features", "--device", "cpu"]
        scored += ["--cache", str(out)]
        assert evaluate(scored) == USAGE
        assert named in capsys.readouterr().err
        with pytest.raises(ConfigError, match=named):
            udddm.load_model(where, device="cpu")
        with pytest.raises(ConfigError, match=named):
            udddm.sample(where, [0])
    for command in looking(theirs, out):
        assert store(command) == 0, command
    with pytest.raises(ConfigError, match=named):
        udddm.load_model(theirs, device="cpu", ema_length=0.1)
    assert not ran.exists() and "evil" not in sys.modules
    assert sample([*sampled, "--trust"]) == 0 and ran.exists()
    assert evaluate([*scored, "--trust"]) == 0
    assert np.isfinite(udddm.sample(theirs, [0, 1], trust=True)).all()


@pytest.mark.parametrize("section", IRRELEVANT)
def test_sampling_ignores_untrusted_settings_that_it_does_not_need(section: str, theirs: Path, tmp_path: Path) -> None:
    rewrite(theirs, section, *IRRELEVANT[section])
    out = tmp_path / "out"
    assert sample(["--checkpoint", str(theirs), "--seeds", "0-3", "--out", str(out), "--device", "cpu"]) == 0
    scored = ["--checkpoint", str(theirs), "--count", "8", "--features", "mine:features", "--device", "cpu"]
    assert evaluate([*scored, "--cache", str(out)]) == 0
    for command in looking(theirs, out):
        assert store(command) == 0, command
    assert np.isfinite(udddm.load_model(theirs, device="cpu").sample(range(2), steps=2)).all()
    assert not (tmp_path / "evil.py.ran").exists() and "evil" not in sys.modules


def test_init_from_reads_weights_without_importing_their_network(theirs: Path, tmp_path: Path) -> None:
    rewrite(theirs, "network", "name", "evil:make_network")
    own = load_config(None, [*SETTINGS, f"train.init_from={theirs}", "store.kind=gpu"])
    udddm.train(own, run_dir=tmp_path / "own", device="cpu")
    assert not (tmp_path / "evil.py.ran").exists()


def test_training_imports_what_its_own_configuration_names(theirs: Path, tmp_path: Path) -> None:
    own = load_config(None, [*SETTINGS, "network.name=evil:make_network"])
    udddm.train(own, run_dir=tmp_path / "own", device="cpu")
    assert (tmp_path / "evil.py.ran").exists()
