"""The tables of plug points name factories that exist."""

from __future__ import annotations

import subprocess
import sys

import pytest

from udddm.config import plugins
from udddm.config.plugins import Registry

REGISTRIES = [value for value in vars(plugins).values() if isinstance(value, Registry)]
MEMBERS = [(registry, name) for registry in REGISTRIES for name in registry.members]


@pytest.mark.parametrize(("registry", "name"), MEMBERS, ids=[f"{r.key}={name}" for r, name in MEMBERS])
def test_every_member_can_be_imported(registry: Registry, name: str) -> None:
    assert callable(registry.load(name))


def test_there_are_nine_plug_points_with_members() -> None:
    assert len(REGISTRIES) == 9 and all(registry.members for registry in REGISTRIES)


def test_old_names_map_to_members() -> None:
    for registry in REGISTRIES:
        for old, new in registry.renamed.items():
            assert old not in registry.members and new in registry.members
            assert registry.load(old) is registry.load(new)


def test_a_configuration_is_validated_without_torch_and_numpy() -> None:
    program = "import sys, udddm.config as c; c.load_config(None, ['objective.name=ect']); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert "udddm.config.plugins" in loaded
    assert not {"torch", "numpy", "zarr"} & set(loaded)
