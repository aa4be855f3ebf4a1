"""`udddm.config.trust` covers every key of a configuration that may name code or a file."""

from __future__ import annotations

import pytest

from udddm.config import load_config, plugins
from udddm.config.plugins import LAUNCHERS, LOGGERS, METRICS, Registry
from udddm.config.trust import MODEL, NAMED, check_trusted, reaching
from udddm.errors import ConfigError

SECTIONS = ("data", "network", "schedule", "objective", "store", "engine", "sample", "evaluate", "loggers")


def test_every_plug_point_is_covered() -> None:
    registries = {each.key: each for each in vars(plugins).values() if isinstance(each, Registry)}
    del registries[LAUNCHERS.key]  # selected on the command line, not in the configuration
    assert registries == NAMED


def test_built_in_members_need_no_trust() -> None:
    assert reaching(load_config(None, ["objective.name=consistency"]), SECTIONS) == []


@pytest.mark.parametrize("key", NAMED)
def test_an_import_path_is_reported_with_its_key(key: str) -> None:
    value = "evil:make" if key not in (METRICS.key, LOGGERS.key) else "[evil:make]"
    config = load_config(None, [f"{key}={value}"])
    section = key.partition(".")[0]
    assert reaching(config, SECTIONS) == reaching(config, (section,)) == [f"{key}=evil:make"]
    assert reaching(config, [each for each in SECTIONS if each != section]) == []
    assert reaching(config, SECTIONS, [f"{key}=mine:make"]) == []
    with pytest.raises(ConfigError, match=rf"theirs names {key}=evil:make.*Give --trust \(in Python trust=True\)"):
        check_trusted(config, SECTIONS, "theirs")
    with pytest.raises(ConfigError, match=rf"--set {key}=\.\.\.\), or give --trust"):
        check_trusted(config, SECTIONS, "theirs", [])


def test_modules_of_the_package_are_no_exception() -> None:
    config = load_config(None, ["network.name=udddm.networks.unet:build"])
    assert reaching(config, MODEL) == ["network.name=udddm.networks.unet:build"]


def test_data_and_features_that_are_files_or_code_are_reported() -> None:
    given = ["data={name: 'a:b', path: x.npy, arguments: {q: 1}}", "evaluate.features=x.pt"]
    found = reaching(load_config(None, given), SECTIONS)
    assert found == ["data.name=a:b", "data.arguments.q=1", "data.path=x.npy", "evaluate.features=x.pt"]
