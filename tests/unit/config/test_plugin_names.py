"""Factories passed from Python get a name that another process can import."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import BaseModel

import udddm
from udddm.config.plugins import Registry, name_of, takes_settings
from udddm.errors import ConfigError

SCRIPT = """
from udddm.config.plugins import name_of
class Mine: ...
print(name_of(Mine, "store"))
"""


def named_in(script: Path, *command: str) -> str:
    environment = {"PYTHONPATH": str(Path(udddm.__file__).parents[1]), "PATH": ""}
    found = subprocess.run(
        [sys.executable, *command], cwd=script.parent, env=environment, capture_output=True, text=True
    )
    assert found.returncode == 0, found.stderr
    return found.stdout.strip()


def test_a_class_of_the_running_script_is_named_by_its_file(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(SCRIPT)
    assert named_in(tmp_path / "mine.py", "mine.py") == "mine:Mine"
    assert named_in(tmp_path / "mine.py", "-m", "mine") == "mine:Mine"


def test_a_class_of_a_script_that_cannot_be_imported_keeps_its_module(tmp_path: Path) -> None:
    (tmp_path / "my-script.py").write_text(SCRIPT)
    assert named_in(tmp_path / "my-script.py", "my-script.py") == "__main__:Mine"
    assert named_in(tmp_path / "my-script.py", "-c", SCRIPT) == "__main__:Mine"


def test_factories_without_an_importable_name_are_refused() -> None:
    with pytest.raises(ConfigError, match="defined at the top level of a module"):
        name_of(lambda: None, "store")


class Numbers(BaseModel):
    count: int = 3


@takes_settings(Numbers)
def counted(context: str, settings: Numbers) -> str:
    return context * settings.count


def test_a_function_takes_settings_of_its_model() -> None:
    registry = Registry("repeater", "repeat.name", {"counted": f"{__name__}:counted"})
    assert registry.build("counted", {"count": 2}, "a") == "aa"
    assert registry.build("counted", {}, "a") == "aaa"
    with pytest.raises(ConfigError, match=r"repeat\.settings\.count: Input should be a valid integer"):
        registry.build("counted", {"count": "x"}, "a")
