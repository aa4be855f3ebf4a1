"""docs/troubleshooting.md quotes messages of the program as the source code has them."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text()
QUOTED = re.findall(r"^### `(.+)`$", PAGE, re.MULTILINE)
VARIES = "\0"
"""Stands in a template for what a message inserts: a field of an f-string, or a %s."""


def template(node: ast.expr) -> str:
    """The text of a string, an f-string or a sum of them, with VARIES for each inserted value."""
    if isinstance(node, ast.Constant):
        return re.sub(r"%[sdgr]|%\.\d+\w", VARIES, node.value) if isinstance(node.value, str) else VARIES
    if isinstance(node, ast.JoinedStr):
        return "".join(template(part) for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return template(node.left) + template(node.right)
    return VARIES


@cache
def templates() -> list[str]:
    """Every string in the package, docstrings excepted."""
    found = []
    for file in sorted((ROOT / "udddm").rglob("*.py")):
        tree = ast.parse(file.read_text())
        prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        found += [
            template(node)
            for node in ast.walk(tree)
            if isinstance(node, (ast.Constant, ast.JoinedStr, ast.BinOp)) and id(node) not in prose
        ]
    return found


def occurs(message: str) -> bool:
    """Whether one template has the fixed parts of a quoted message, with one or more insertions at each `...`.

    A `...` at the end stands for the rest of the message.
    """
    fixed = re.escape(message.removesuffix("..."))
    pattern = re.compile(fixed.replace(re.escape("..."), "\0(?:[^\0]*\0)*?"))
    return any(pattern.search(text) for text in templates())


def test_the_page_has_messages() -> None:
    assert len(QUOTED) > 40 and len(QUOTED) == len(set(QUOTED))


@pytest.mark.parametrize("message", QUOTED)
def test_each_quoted_message_occurs_in_the_source(message: str) -> None:
    assert occurs(message)


def test_a_message_that_the_program_does_not_have_is_found() -> None:
    assert occurs("another process is training in ...")
    assert not occurs("another process is training at ...")
    assert not occurs("another process ... is training in ...")


def test_every_message_has_a_remedy() -> None:
    sections = re.split(r"^#{2,3} .+$", PAGE, flags=re.MULTILINE)[1:]
    empty = [heading for heading, text in zip(re.findall(r"^#{2,3} .+$", PAGE, re.MULTILINE), sections, strict=True)
             if heading.startswith("### ") and len(text.strip()) < 20]  # fmt: skip
    assert not empty
