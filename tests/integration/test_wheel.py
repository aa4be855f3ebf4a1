"""The wheel is complete: outside a checkout, it trains from a preset."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from udddm.config import presets

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("setuptools", minversion="77")
    pytest.importorskip("pip")
    place = tmp_path_factory.mktemp("wheel")
    for name in ("udddm", "pyproject.toml", "README.md", "LICENSE"):  # building writes next to the sources
        (place / name).symlink_to(ROOT / name)
    options = ["--no-deps", "--no-build-isolation", "--quiet", "--wheel-dir", str(place / "wheels")]
    command = [sys.executable, "-m", "pip", "wheel", ".", *options]
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    [made] = (place / "wheels").iterdir()
    return made


def test_the_wheel_has_presets_types_and_digits(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {f"udddm/presets/{name}.yaml" for name in presets.names()} <= names
    assert {"udddm/py.typed", "udddm/data/digits.npz", "udddm/cli/main.py"} <= names
    assert {
        f"udddm/tools/{name}" for name in ("report/page.js", "export/web.js", "export/web.css", "export/condition.js")
    } <= names
    assert not [name for name in names if name.startswith(("tests", "benchmarks", "examples"))]


def test_the_wheel_trains_from_a_preset_outside_a_checkout(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    (tmp_path / "work").mkdir()
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}

    def udddm(*arguments: str) -> str:
        command = [sys.executable, "-m", "udddm", *arguments]
        done = subprocess.run(
            command, cwd=tmp_path / "work", env=environment, capture_output=True, text=True, timeout=240
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    udddm("train", "--config", "digits", "train.steps=20", "sample.final=4", "network.base_channels=8")
    assert (tmp_path / "work" / "runs" / "digits" / "samples.png").exists()
    assert "digits" in udddm("config", "list")
    where = "import udddm; print(udddm.__file__)"
    found = subprocess.run([sys.executable, "-c", where], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert found.stdout.startswith(str(tmp_path / "site"))
