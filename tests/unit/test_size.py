"""Functions, signatures and modules stay short enough to read at once."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import udddm

PACKAGE = Path(udddm.__file__).parent
LINES, PARAMETERS, MODULE = 60, 8, 400
LONG = {"store/pipeline.py"}
"""The exception: the threads, queues and locks of the pipeline share invariants, which one module states."""


def functions() -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield f"{path.relative_to(PACKAGE)}:{node.lineno} {node.name}", node


def test_no_function_is_longer_than_60_lines() -> None:
    assert [name for name, node in functions() if (node.end_lineno or 0) - node.lineno + 1 > LINES] == []


def test_no_function_has_more_than_8_parameters() -> None:
    def number(arguments: ast.arguments) -> int:
        positional = [*arguments.posonlyargs, *arguments.args]
        own = bool(positional) and positional[0].arg in ("self", "cls")
        return len(positional) + len(arguments.kwonlyargs) - own

    assert [name for name, node in functions() if number(node.args) > PARAMETERS] == []


def test_no_module_is_longer_than_400_lines() -> None:
    lines = {str(path.relative_to(PACKAGE)): len(path.read_text().splitlines()) for path in PACKAGE.rglob("*.py")}
    assert {name for name, number in lines.items() if number > MODULE} == LONG
