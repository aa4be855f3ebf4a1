"""The declared dependencies are sufficient."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]


def base_installation() -> set[str]:
    """Names of the distributions of an installation without extras: all direct and indirect dependencies."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found: set[str] = set()
    waiting: list[str] = list(project["dependencies"])
    while waiting:
        requirement = Requirement(waiting.pop())
        name = canonicalize_name(requirement.name)
        if name in found or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        found.add(name)
        try:
            waiting += requires(name) or []
        except PackageNotFoundError:  # needed only by GPU builds of torch
            continue
    return found


def beyond_the_base() -> list[str]:
    """Installed modules that are not part of a base installation."""
    base = base_installation()
    return sorted(
        module
        for module, names in packages_distributions().items()
        if module.isidentifier() and module != "udddm" and base.isdisjoint(map(canonicalize_name, names))
    )


def test_the_base_installation_trains_samples_and_draws(tmp_path: Path) -> None:
    lacking = beyond_the_base()
    assert {"scipy", "PIL"} <= set(lacking) and "numpy" not in lacking
    code = (
        "import json, sys\n"
        f"sys.modules.update(dict.fromkeys({lacking!r}))\n"  # makes importing them fail, as if they were not installed
        "from udddm.cli import export, sample, train\n"
        "for name in ('ict', 'ect', 'chain'):\n"
        "    run = sys.argv[1] + '/' + name\n"
        "    code = train.main(['--config', sys.argv[2], '--run-dir', run, '--store=zarr', '--device=cpu',\n"
        "        '--set=network={base_channels: 8, channel_mult: [1], blocks_per_level: 1}',\n"
        "        '--set=network.attention_resolutions=[]', '--set=network.condition=none',\n"
        "        '--set=train={steps: 6, batch_size: 64, learning_rate: 1.0e-3, ema: [0.9]}',\n"
        "        f'--set=objective={{name: {name}}}', '--set=sample={every_steps: 0, final: 9}'])\n"
        "    assert code == 0, (name, code)\n"
        "assert sample.main(['--checkpoint', run, '--seeds', '0-3', '--out', sys.argv[1] + '/samples']) == 0\n"
        "assert export.main([run, '--to=safetensors', '--out', sys.argv[1] + '/release']) == 0\n"
        "assert export.main([run, '--to=onnx', '--out', sys.argv[1] + '/onnx']) == 2\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path), "digits"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "pip install 'udddm[tensorboard]'" in done.stderr and "pip install 'udddm[onnx]'" in done.stderr
    for name in ("ict", "ect", "chain"):
        assert json.loads((tmp_path / name / "result.json").read_text())["steps"] == 6
        assert (tmp_path / name / "samples.png").exists() and not (tmp_path / name / "tensorboard").exists()


def test_a_folder_of_images_without_pillow_names_the_extra_to_install(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "sys.modules['PIL'] = None\n"
        "from pathlib import Path\n"
        "from udddm.errors import DataError\n"
        "from udddm.data.folder import FolderImages\n"
        "try:\n    FolderImages(Path(sys.argv[1]))\n"
        "except DataError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert str(tmp_path) in done.stdout and "pip install 'udddm[images]'" in done.stdout
