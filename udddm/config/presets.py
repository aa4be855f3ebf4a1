"""The presets that come with the package, `udddm/presets/*.yaml`, and the files that `--config` names."""

from __future__ import annotations

import difflib
from pathlib import Path

from udddm.errors import ConfigError
from udddm.files import expanded

FOLDER = Path(__file__).parents[1] / "presets"
SUFFIXES = (".yaml", ".yml")


def names() -> list[str]:
    """The names of the presets."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def find(config: str | Path) -> Path:
    """The YAML file that a configuration is given by: the name of a preset, or a path.

    A bare name is the preset, even if there is a file of that name: write ./digits for the file. A run directory is its
    config.yaml. Raises ConfigError, which lists the presets, if there is neither.
    """
    if isinstance(config, str) and config in names():
        return FOLDER / f"{config}.yaml"
    if "://" in str(config):
        raise ConfigError(f"--config {config}: copy the file to this machine, and give its path")
    path = expanded(config)
    if path.is_dir():
        if (path / "config.yaml").exists():
            return path / "config.yaml"
        raise ConfigError(f"--config {config}: this directory holds no config.yaml; give a preset or a YAML file")
    if path.exists():
        return path
    close = difflib.get_close_matches(path.stem, names(), 1, 0.5)
    if path.suffix in SUFFIXES or path.name != str(config):
        hint = f"; did you mean the preset {close[0]} (--config {close[0]})?" if close else ""
        raise ConfigError(f"cannot read the configuration {config}: there is no such file{hint}")
    hint = f"did you mean {close[0]}? The presets are" if close else "the presets are"
    raise ConfigError(
        f"there is no preset and no file {config}; {hint} {', '.join(names())}; or give the path of a YAML file"
    )


def text_of(name: str) -> str:
    """The YAML text of a preset. Raises ConfigError if there is none of that name."""
    return find(name).read_text(encoding="utf-8-sig")


def summary(name: str) -> str:
    """What a preset trains: the first line of its file."""
    return text_of(name).partition("\n")[0].lstrip("# ")
