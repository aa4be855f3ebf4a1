"""Reads and validates YAML presets and overrides. Error messages name the key."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from udddm.config import text
from udddm.config.renamed import current_key, modernize
from udddm.config.run import RunConfig
from udddm.errors import ConfigError
from udddm.files import expanded
from udddm.log import log


def load_config(path: str | Path | None = None, overrides: list[str] | None = None) -> RunConfig:
    """Read a YAML preset (`None`: the defaults), apply overrides such as `train.epochs=3`, and validate.

    Raises ConfigError for a file that cannot be read or is not a mapping, an unknown key (the message suggests the
    closest one), a wrong type or a value out of range.
    """
    tree: dict[str, Any] = {}
    source = "the defaults"
    if path is not None:
        source = str(path)
        try:
            content = expanded(path).read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read the configuration {path}: {error}") from error
        loaded = text.parse(content, source, RunConfig)
        if loaded is not None and not isinstance(loaded, dict):
            raise ConfigError(f"{path} must contain a mapping of sections, not a {type(loaded).__name__}")
        tree = loaded or {}
    return resolve(overridden(tree, overrides or [], source), source)


def overridden(tree: dict[str, Any], overrides: Sequence[str], source: str) -> dict[str, Any]:
    """Returns a copy of a tree of plain values with overrides such as `train.epochs=3` applied. Raises ConfigError."""
    changed = copy.deepcopy(_modernized(tree, source))
    for override in overrides:
        apply(changed, override)
    return changed


def as_yaml(value: Any, *, flow: bool = True) -> str:
    """Format a plain value as YAML: on one line, as in an override, or without `flow` as in a file."""
    if not flow:
        return text.dump(value)
    return text.dump(value, default_flow_style=True, width=1 << 20).removesuffix("\n...\n").strip()


def resolve(tree: dict[str, Any], source: str = "the configuration") -> RunConfig:
    """Validate a tree of plain values. Raises ConfigError, which lists every error with its key."""
    try:
        return RunConfig.model_validate(_modernized(tree, source))
    except ValidationError as error:
        lines = [_explain(detail) for detail in error.errors()]
        raise ConfigError(f"{source}:\n  " + "\n  ".join(lines)) from None


def _modernized(tree: dict[str, Any], source: str) -> dict[str, Any]:
    tree, replaced = modernize(tree)
    if replaced:
        log.warning("%s uses old names, which are still accepted: %s", source, "; ".join(replaced))
    return tree


def apply(tree: dict[str, Any], override: str) -> None:
    """Apply `key=value` to a tree of plain values with current names. Raises ConfigError."""
    key, separator, given_text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"--set {override}: write key=value, such as train.epochs=3")
    given, key = key, current_key(key)
    replaced = [f"{given} is now {key}"] if given != key else []
    value = text.value_of(given_text, f"--set {override}", RunConfig, key)
    if isinstance(value, dict):
        value, inner = modernize(value, f"{key}.")
        replaced += inner
    if replaced:
        log.warning("--set %s uses old names, which are still accepted: %s", override, "; ".join(replaced))
    _put(tree, key, value, override)


def _put(tree: dict[str, Any], key: str, value: Any, override: str) -> None:
    if isinstance(value, dict) and text.section(text.annotation(RunConfig, key)) is not None:
        for name, inner in value.items():  # the other keys of the section are kept
            _put(tree, f"{key}.{name}", inner, override)
        return
    *parents, leaf = key.split(".")
    node = tree
    for depth, name in enumerate(parents):
        child = node.get(name)
        if child is None:
            child = node[name] = {}
        if not isinstance(child, dict):
            raise ConfigError(f"--set {override}: {'.'.join(parents[: depth + 1])} is a value, not a section")
        node = child
    node[leaf] = value
    if key == "train.steps" and value is not None:  # steps and epochs are exclusive; the override wins
        node.pop("epochs", None)
    elif key == "train.epochs" and value is not None:
        node.pop("steps", None)


def _explain(detail: ErrorDetails) -> str:
    location = [str(part) for part in detail["loc"]]
    key = ".".join(location) or "configuration"
    if detail["type"] == "extra_forbidden":
        return f"{key}: unknown key{_nearest(location)}"
    message = detail["msg"].removeprefix("Value error, ")
    given = detail["input"]
    shown = "" if isinstance(given, dict | BaseModel) else f" (got {given!r})"
    return f"{key}: {message}{shown}"


def _nearest(location: list[str]) -> str:
    """A hint with the known key closest to a mistyped one. Keys of the same section are preferred."""
    keys = list(_keys(RunConfig))
    key = ".".join(location)
    parent = key.rpartition(".")[0]
    siblings = [k for k in keys if k.rpartition(".")[0] == parent]
    by_leaf = {k.rpartition(".")[2]: k for k in keys}
    match = difflib.get_close_matches(key, siblings, 1, 0.6) or difflib.get_close_matches(key, keys, 1, 0.7)
    if not match and (leaf := difflib.get_close_matches(location[-1], by_leaf, 1, 0.6)):
        match = [by_leaf[leaf[0]]]
    return f"; did you mean {match[0]}?" if match else f"; {parent or 'the top level'} has: {', '.join(siblings)}"


def _keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    keys = []
    for name, field in model.model_fields.items():
        keys.append(prefix + name)
        for annotation in (field.annotation, *get_args(field.annotation)):  # a section, or a section that may be unset
            if isinstance(annotation, type) and issubclass(annotation, BaseModel):
                keys += _keys(annotation, f"{prefix}{name}.")
    return keys
