"""Imports point down: every component of the package imports only from lower layers, including in functions."""

from __future__ import annotations

import ast
from pathlib import Path

import udddm

PACKAGE = Path(udddm.__file__).parent
LAYERS = {
    1: ("rng", "urls", "errors", "log", "files", "image_grid"),
    2: ("config", "storage"),
    3: ("data", "diffusion", "order", "ema"),
    4: ("backends/distributed", "networks", "objectives"),
    5: ("backends/engines", "evaluation", "store"),
    6: ("runs",),
    7: ("training", "tools", "testing"),
    8: ("backends/launchers",),
    9: ("api",),
    10: ("cli",),
    11: ("__main__",),
}
"""The layers shown in docs/architecture.md. Rooms of layer 1 may import from those listed before them."""
LAYER = {component: layer for layer, components in LAYERS.items() for component in components}
FIRST = list(LAYERS[1])


def component_of(parts: tuple[str, ...]) -> str:
    """The component of a module: its top-level name, or its subfolder of `backends`."""
    if parts[:1] == ("backends",) and len(parts) > 1:
        return "/".join(parts[:2])
    return parts[0] if parts else ""


def modules() -> dict[tuple[str, ...], Path]:
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[parts[:-1] if parts[-1] == "__init__" else parts] = path
    return found


MODULES = modules()


def imported(tree: ast.AST) -> list[tuple[int, tuple[str, ...]]]:
    """The line and module of each import from this package, except imports for type checkers only."""
    hidden = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    found = []
    for node in ast.walk(tree):
        if id(node) in hidden:
            continue
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            parts = tuple(name.split("."))
            if parts[0] == "udddm":
                inside = parts[1:]
                while inside and inside not in MODULES:
                    inside = inside[:-1]
                found.append((node.lineno, inside))  # type: ignore[attr-defined]
    return found


def test_every_module_is_in_a_layer() -> None:
    components = {component_of(parts) for parts in MODULES} - {"", "backends"}
    assert components == set(LAYER)
    assert len({parts[0] for parts in MODULES if parts}) <= 24


def test_imports_point_down() -> None:
    wrong = []
    for parts, path in MODULES.items():
        here = component_of(parts)
        if not here or here == "backends":
            continue
        for line, target in imported(ast.parse(path.read_text())):
            there = component_of(target)
            if there in ("", here, "backends"):
                continue
            within_first = LAYER[here] == LAYER[there] == 1 and FIRST.index(there) < FIRST.index(here)
            if LAYER[there] >= LAYER[here] and not within_first:
                where = path.relative_to(PACKAGE.parent)
                wrong.append(f"{where}:{line}: {here} (layer {LAYER[here]}) imports {there} (layer {LAYER[there]})")
    assert not wrong, "\n".join(wrong)
