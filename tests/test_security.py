"""A stranger's checkpoint or run is data: it makes this process import, open and write nothing elsewhere."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest

import udddm
from udddm import cli
from udddm.config import load
from udddm.data import DataError
from udddm.data.loading import named
from udddm.evaluation.command import main as evaluate

SETTINGS = [
    "network={width: 8, multipliers: [1], blocks: 1, attention: [], dropout: 0.0, condition: none}",
    "order={lanes: 4, chunk: 64, window: 2}",
    "train={steps: 4, batch_size: 32, ema: [0.9]}",
    "checkpoint.every_steps=4",
    "sample.every_steps=0",
    "store.kind=zarr",
]
MODULE = "from pathlib import Path\nfrom sklearn.datasets import load_digits\nPath(__file__ + '.ran').touch()\n"
MODULE += "def images(): return load_digits().images[:, None].astype('float32') / 8 - 1\n"
MODULE += "def features(batch): return batch.flatten(1)[:, :8]\n"


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    udddm.train(load(None, SETTINGS), run_dir=tmp_path / "theirs", device="cpu")
    return tmp_path / "theirs"


@pytest.fixture
def ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that a module of the name `stranger` makes when it is imported."""
    (tmp_path / "stranger.py").write_text(MODULE)
    (tmp_path / "mine.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("stranger", "mine"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path / "stranger.py.ran"


def rewrite(run: Path, **sections: Any) -> None:
    """Another configuration in a run and its checkpoints, whose manifests are made to match."""
    for path in [run / "run.json", *run.glob("checkpoints/*/config.json")]:
        found = json.loads(path.read_text())
        for name, values in sections.items():
            found["config"][name] |= values
        path.write_text(json.dumps(found))
        manifest = path.parent / "manifest.json"
        if manifest.exists():
            data = path.read_bytes()
            entry = {"bytes": len(data), "crc32c": int(google_crc32c.value(data))}
            manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"config.json": entry}))


def test_looking_into_a_strangers_run_imports_nothing(
    theirs: Path, ran: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rewrite(
        theirs,
        data={"name": "stranger:images"},
        evaluate={"features": "stranger:features", "every_steps": 1},
    )
    run, out = str(theirs), str(tmp_path / "out")
    scored = ["--checkpoint", run, "--count", "8", "--features", "mine:features", "--device", "cpu", "--cache", out]
    assert evaluate(scored) == cli.USAGE
    said = capsys.readouterr().err
    assert "data.name=stranger:images" in said and "--trust" in said and "--set data.name=..." in said
    assert evaluate([*scored, "--set", "data.path=null"]) == cli.USAGE
    assert cli.sample(["--checkpoint", run, "--seeds", "0-3", "--out", out, "--device", "cpu"]) == 0
    for command in (["info", run], ["verify", run], ["convert", run, f"{out}/copy"]):
        assert cli.store(command) == 0, command
    capsys.readouterr()
    assert cli.store(["view", run, "--sample", "3", "--out", f"{out}/view.png"]) == 0
    shown = capsys.readouterr()
    assert "the image" not in shown.out and "left out" in shown.err and "data.name=stranger:images" in shown.err
    assert not ran.exists()
    assert evaluate([*scored, "--set", "data.name=digits"]) == 0 and not ran.exists()
    assert evaluate([*scored, "--set", "data.name=mine:images"]) == 0 and not ran.exists()
    assert evaluate([*scored, "--trust"]) == 0 and ran.exists()
    assert cli.store(["view", run, "--sample", "3", "--out", f"{out}/view.png", "--trust"]) == 0
    assert "the image" in capsys.readouterr().out


def test_a_strangers_path_is_not_opened_and_a_users_own_is(
    theirs: Path, ran: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    secret = tmp_path / "secret.npy"
    np.save(secret, np.zeros((1797, 1, 8, 8), np.uint8))
    np.save(tmp_path / "mine.npy", np.zeros((1797, 1, 8, 8), np.uint8))
    rewrite(theirs, data={"name": "array", "path": str(secret)})
    scored = ["--checkpoint", str(theirs), "--count", "8", "--features", "mine:features", "--device", "cpu"]
    scored += ["--cache", str(tmp_path / "cache")]
    assert evaluate(scored) == cli.USAGE
    assert f"data.path={secret}" in capsys.readouterr().err
    assert cli.store(["view", str(theirs), "--sample", "3", "--out", str(tmp_path / "view.png")]) == 0
    assert "left out" in capsys.readouterr().err
    assert evaluate([*scored, "--set", f"data.path={tmp_path / 'mine.npy'}"]) == 0


def test_arguments_of_a_stranger_are_not_given_to_a_users_function(
    theirs: Path, ran: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rewrite(theirs, data={"name": "stranger:images", "arguments": {"path": "/etc/passwd"}})
    scored = ["--checkpoint", str(theirs), "--features", "mine:features", "--device", "cpu", "--set"]
    assert evaluate([*scored, "data.name=mine:images"]) == cli.USAGE
    assert "data.arguments.path=/etc/passwd" in capsys.readouterr().err


def test_a_run_evaluates_with_the_function_of_its_own_configuration(ran: Path, tmp_path: Path) -> None:
    own = [*SETTINGS, "data.name=mine:images", "evaluate={every_steps: 4, count: 8, features: mine:features}"]
    udddm.train(load(None, own), run_dir=tmp_path / "own", device="cpu")
    assert (tmp_path / "own" / "evaluation.jsonl").exists()


@pytest.mark.parametrize("name", ["os:path.join", "mine:features.__call__", "mine:", "mine:a b"])
def test_only_a_function_of_the_module_itself_is_named(name: str, ran: Path) -> None:
    with pytest.raises(DataError, match=r"write package\.module:function"):
        named(name, "data set")
