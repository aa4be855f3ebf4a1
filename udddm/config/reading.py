"""Reads and validates YAML presets and overrides. Error messages name the key."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from udddm.config import presets, text
from udddm.config.mistakes import explain
from udddm.config.renamed import current_key, modernize
from udddm.config.run import RunConfig
from udddm.config.shorthand import ALIASES, SELECTORS, selected
from udddm.errors import ConfigError
from udddm.log import log


def load_config(path: str | Path | None = None, overrides: list[str] | None = None) -> RunConfig:
    """Read the preset of that name or a YAML file (`None`: the defaults), apply overrides such as `train.epochs=3`, and
    validate.

    Raises ConfigError for an unknown preset or a file that cannot be read or is not a mapping, an unknown key (the
    message suggests the closest one), a wrong type or a value out of range.
    """
    tree: dict[str, Any] = {}
    source = "the defaults"
    if path is not None:
        source = str(path)
        try:
            content = presets.find(path).read_text(encoding="utf-8-sig")
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
        lines = [explain(detail) for detail in error.errors()]
        raise ConfigError("\n  ".join([f"{source}:", *lines]) if len(lines) > 1 else f"{source}: {lines[0]}") from None


def _modernized(tree: dict[str, Any], source: str) -> dict[str, Any]:
    tree, replaced = modernize(tree)
    if replaced:
        log.warning("%s uses old names, which are still accepted: %s", source, "; ".join(replaced))
    return selected(tree)


def apply(tree: dict[str, Any], override: str) -> None:
    """Apply `key=value` to a tree of plain values with current names. Raises ConfigError."""
    key, value, replaced = _read(override)
    if replaced:
        log.warning("%s uses old names, which are still accepted: %s", override, "; ".join(replaced))
    _put(tree, key, value, override)


def keys_set(override: str) -> set[str]:
    """The dotted keys that `key=value` sets: `data={name: digits}` sets data.name alone. Raises ConfigError."""
    key, value, _ = _read(override)

    def leaves(key: str, value: Any) -> set[str]:
        if isinstance(value, dict) and text.section(text.annotation(RunConfig, key)) is not None:
            return set().union(*(leaves(f"{key}.{name}", inner) for name, inner in value.items()))
        return {key}

    return leaves(key, value)


def _read(override: str) -> tuple[str, Any, list[str]]:
    """The full key and the value of `key=value`, and a phrase for each old name in it. Raises ConfigError."""
    short, separator, given_text = override.partition("=")
    short = short.strip()
    if not separator or not short:
        raise ConfigError(f"{override}: write key=value, such as train.epochs=3")
    given = ALIASES.get(short, short)
    key = current_key(given)
    replaced = [f"{given} is now {key}"] if given != key else []
    value = text.value_of(given_text, override, RunConfig, key)
    if isinstance(value, dict):
        value, inner = modernize(value, f"{key}.")
        replaced += inner
    if key in SELECTORS and isinstance(value, str):
        key = f"{key}.{SELECTORS[key]}"
    return key, value, replaced


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
            raise ConfigError(f"{override}: {'.'.join(parents[: depth + 1])} is a value, not a section")
        node = child
    node[leaf] = value
    if key == "train.steps" and value is not None:  # steps and epochs are exclusive; the override wins
        node.pop("epochs", None)
    elif key == "train.epochs" and value is not None:
        node.pop("steps", None)
