"""`udddm config`: presets by name, and their files."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from udddm.cli.command import USAGE
from udddm.cli.config import main as config_command
from udddm.config import load_config, presets
from udddm.errors import ConfigError


def test_every_preset_is_listed_with_what_it_trains(capsys: pytest.CaptureFixture[str]) -> None:
    assert config_command(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == presets.names()
    assert {"digits", "cifar10", "imagenet-64"} <= set(presets.names())
    assert all(len(line.split()) > 3 for line in lines)


def test_a_preset_is_shown_as_its_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert config_command(["show", "digits"]) == 0
    assert capsys.readouterr().out == (presets.FOLDER / "digits.yaml").read_text()


def test_with_settings_the_complete_configuration_is_shown(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert config_command(["show", "digits", "lr=0.5", "objective=ect"]) == 0
    shown = capsys.readouterr().out
    assert yaml.safe_load(shown)["seed"] == 0  # a default
    (tmp_path / "shown.yaml").write_text(shown)
    assert load_config(tmp_path / "shown.yaml") == load_config("digits", ["lr=0.5", "objective=ect"])
    assert config_command(["show", str(tmp_path / "shown.yaml"), "--all"]) == 0
    assert capsys.readouterr().out == shown
    assert config_command(["show", "digits", "lr=0.5", "--all", "objective=ect"]) == 0
    assert capsys.readouterr().out == shown


def test_an_unknown_preset_is_refused_with_the_nearest_and_the_others(capsys: pytest.CaptureFixture[str]) -> None:
    assert config_command(["show", "fashion"]) == USAGE
    message = capsys.readouterr().err
    assert "did you mean fashion-mnist?" in message
    assert all(name in message for name in presets.names())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("configs/digits.yaml", r"no such file; did you mean the preset digits \(--config digits\)"),
        ("nowhere/own.yaml", "cannot read the configuration nowhere/own.yaml: there is no such file$"),
        ("s3://bucket/run/config.yaml", "copy the file to this machine"),
    ],
)
def test_a_file_that_does_not_exist(given: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(given)


def test_a_bare_name_is_the_preset_and_a_path_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits").write_text("seed: 7\n")
    assert load_config("digits").seed == 0
    assert load_config("./digits").seed == load_config(Path("digits")).seed == 7
    with pytest.raises(ConfigError, match=r"did you mean the preset cifar10 \(--config cifar10\)"):
        load_config("./cifar10")


def test_a_run_directory_is_its_configuration(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("seed: 7\n")
    assert load_config(tmp_path).seed == 7
    (tmp_path / "config.yaml").unlink()
    with pytest.raises(ConfigError, match=r"holds no config\.yaml"):
        load_config(tmp_path)
