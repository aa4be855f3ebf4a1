"""All files, keys, commands and Python names in README.md and docs/ exist."""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest
from pydantic import BaseModel

from udddm.cli.main import COMMANDS
from udddm.config import RunConfig
from udddm.config.renamed import RENAMED, current_key

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGE = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)

FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"`([^`\n]+(?:\n[^`\n]+)?)`")
FILE = re.compile(r"(?<![\w/.~:-])(?:udddm|benchmarks|tests|examples)/[\w./*?-]+")
KEY = re.compile(r"(?<![\w./`-])[a-z_]+(?:\.[a-z_0-9]+)+(?![\w(/*])")
PYTHON = re.compile(r"(?<![\w/.-])udddm(?:\.[A-Za-z_]\w*)+")
LINK = re.compile(r"\]\(([^)\s]+)\)")
COMMAND = re.compile(r"\budddm[- ](" + "|".join(COMMANDS) + r")\b([^|;#`]*)")
FLAG = re.compile(r"(?<!\S)--[a-z][a-z0-9-]*")
OLD_KEYS = re.compile(r"^\| old \| now \|\n(?:\|.*\n)+", re.MULTILINE)
"""The table of renamed keys, whose old names no longer exist."""


def blocks(text: str) -> list[str]:
    """The code blocks of a page, fenced and indented, with continued lines joined."""
    fenced = FENCE.findall(text)
    indented = re.findall(r"(?:^ {4}\S.*\n)+", FENCE.sub("", text), re.MULTILINE)
    return [block.replace("\\\n", " ") for block in [*fenced, *indented]]


def spans(text: str) -> list[str]:
    """The code spans of a page outside of its code blocks."""
    prose = re.sub(r"^ {4}\S.*$", "", FENCE.sub("", text), flags=re.MULTILINE)
    return [span.replace("\n", " ") for span in SPAN.findall(prose)]


def models(model: type[BaseModel]) -> Iterator[tuple[str, list[type[BaseModel]]]]:
    """The fields of a section, each with its possible subsections."""
    for name, field in model.model_fields.items():
        found = [field.annotation, *get_args(field.annotation)]
        yield name, [each for each in found if isinstance(each, type) and issubclass(each, BaseModel)]


def is_key(parts: list[str], model: type[BaseModel] = RunConfig) -> bool:
    """Whether a dotted key exists. Below `arguments` and `settings` any name may follow."""
    fields = dict(models(model))
    if len(parts) == 1 or parts[0] in ("arguments", "settings"):
        return parts[0] in fields
    return any(is_key(parts[1:], inner) for inner in fields.get(parts[0], []))


SECTIONS = {name for name, inner in models(RunConfig) if inner} | {"process"}  # an old name of `schedule`


@PAGE
def test_files_exist(page: Path) -> None:
    missing = [name for name in FILE.findall(page.read_text()) if not list(ROOT.glob(name.rstrip("./")))]
    assert not missing


@PAGE
def test_configuration_keys_exist(page: Path) -> None:
    lines = page.read_text().splitlines()
    # A table of renamed keys begins its rows with the old ones.
    text = "\n".join(line for line in lines if not any(line.startswith(f"| `{old}`") for old in RENAMED))
    given = [key for span in spans(text) for key in KEY.findall(span) if not key.endswith((".py", ".md", ".json"))]
    given += [key for code in [*blocks(text), *spans(text)] for key in re.findall(r"--set ([a-z_.0-9]+)=", code)]
    named = [key for key in given if key.partition(".")[0] in SECTIONS]
    assert not [f"{key} (is it {current_key(key)}?)" for key in named if not is_key(key.split("."))]


def test_the_table_of_old_keys_names_their_successors() -> None:
    table = OLD_KEYS.search((ROOT / "docs" / "presets.md").read_text())
    assert table is not None
    rows = [[cell.strip().strip("`") for cell in row.strip("|").split("|")] for row in table[0].splitlines()]
    keys = [(old, new) for old, new in rows if re.fullmatch(r"[a-z_]+\.[a-z_]+", old)]
    assert keys
    assert [current_key(old) for old, _ in keys] == [new for _, new in keys]


@PAGE
def test_python_names_exist(page: Path) -> None:
    text = page.read_text()
    missing = []
    for name in (name for code in [*blocks(text), *spans(text)] for name in PYTHON.findall(code)):
        try:
            pkgutil.resolve_name(name)
        except (ImportError, AttributeError):
            missing.append(name)
    assert not missing


HOSTED = re.compile(
    r"https://(?:github\.com/udddm/udddm/(?:blob|tree)|raw\.githubusercontent\.com/udddm/udddm)/main/([^)\s#]+)"
)
"""A link to a file of this project on the code host."""


def test_the_readme_needs_no_checkout() -> None:
    """A package index shows it too, where a relative link or picture would be broken."""
    links = LINK.findall((ROOT / "README.md").read_text())
    assert links and not [link for link in links if not link.startswith("https://")]


@PAGE
def test_links_to_the_code_host_resolve(page: Path) -> None:
    assert not [name for name in HOSTED.findall(page.read_text()) if not (ROOT / name).exists()]


@PAGE
def test_relative_links_resolve(page: Path) -> None:
    links = [link.partition("#")[0] for link in LINK.findall(page.read_text()) if "://" not in link]
    assert not [link for link in links if link and not (page.parent / link).exists()]


@pytest.fixture(scope="module")
def parsers() -> dict[str, set[str]]:
    """The flags of each command, including those of its subcommands."""

    def flags(parser: argparse.ArgumentParser) -> set[str]:
        found = set(parser._option_string_actions)
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                found |= {flag for inner in action.choices.values() for flag in flags(inner)}
        return found

    return {name: flags(importlib.import_module(f"udddm.cli.{name}")._parser()) for name in COMMANDS}


@PAGE
def test_flags_of_commands_exist(page: Path, parsers: dict[str, set[str]]) -> None:
    text = page.read_text()
    lines = [line for code in blocks(text) for line in code.splitlines()] + spans(text)
    used = [(name, flag) for line in lines for name, rest in COMMAND.findall(line) for flag in FLAG.findall(rest)]
    assert not [f"udddm-{name} {flag}" for name, flag in used if flag not in parsers[name]]


@PAGE
def test_flags_without_a_command_exist_in_some_command(page: Path, parsers: dict[str, set[str]]) -> None:
    scripts = "".join(path.read_text() for path in (ROOT / "benchmarks").rglob("*.py"))
    known = set.union(*parsers.values()) | set(re.findall(r'"(--[a-z0-9-]+)"', scripts))
    used = [flag for span in spans(page.read_text()) if span.startswith("--") for flag in FLAG.findall(span)]
    assert not [flag for flag in used if flag not in known]


def test_every_test_that_the_reliability_page_names_exists() -> None:
    """The table there pairs each fault with the test that keeps it fixed."""
    text = (ROOT / "docs" / "reliability.md").read_text()
    named = re.findall(r"`((?:unit|integration)/[\w/]+\.py)?(?:::(test_\w+))?`", text)
    file, checked = "", 0
    for path, test in named:
        if not path and not test:
            continue
        file = path or file
        source = ROOT / "tests" / file
        assert source.exists(), file
        assert not test or f"def {test}(" in source.read_text(), (file, test)
        checked += 1
    assert checked > 30
