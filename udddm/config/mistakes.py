"""Says what is wrong with a setting, and how to write it."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from udddm.config import text
from udddm.config.run import RunConfig
from udddm.config.shorthand import ALIASES, SELECTORS

_WANTED = {
    "int": "give a whole number",
    "float": "give a number",
    "bool": "give true or false",
    "string": "give text",
    "dict": "give a mapping such as {key: value}",
}
"""What to give, by the first word of pydantic's type of an error."""


def explain(detail: ErrorDetails) -> str:
    """One line about an error that pydantic found: the key, what is wrong, and what was given."""
    location = [str(part) for part in detail["loc"]]
    key = ".".join(location) or "configuration"
    if detail["type"] == "extra_forbidden":
        return f"{key}: unknown key{nearest(key)}"
    given = detail["input"]
    shown = "" if isinstance(given, dict | BaseModel) else f" (got {given!r})"
    return f"{key}: {_message(detail, key)}{shown}"


def _message(detail: ErrorDetails, key: str) -> str:
    kind, given = detail["type"], detail["input"]
    section = text.section(text.annotation(RunConfig, key))
    if kind in ("model_type", "model_attributes_type") and section is not None:
        selector = SELECTORS.get(key)
        example = selector or next(iter(section.model_fields))
        return f"this is a section; set one of its keys, such as {key}.{example}=..."
    if kind == "tuple_type" or (kind in ("missing", "too_long") and "tuple" in str(detail["msg"]).lower()):
        return f"give a list{_such_as(key)}"
    if kind == "literal_error":
        options = [str(each) for each in choices(text.annotation(RunConfig, key))]
        close = difflib.get_close_matches(str(given), options, 1, 0.5)
        if options:
            return (f"did you mean {close[0]}? " if close else "") + f"The choices are {', '.join(options)}"
    word = kind.partition("_")[0]
    if word in _WANTED and kind.endswith(("_parsing", "_type", "_from_float")):
        return f"{_WANTED[word]}{_such_as(key)}"
    return detail["msg"].removeprefix("Value error, ")


def _such_as(key: str) -> str:
    """An example of a value: the default."""
    found = field(key)
    default = found.default if found is not None else None
    if isinstance(default, tuple) and default and not isinstance(default[0], BaseModel):
        return f" such as {list(default)}"
    return f" such as {default}" if isinstance(default, int | float) and not isinstance(default, bool) else ""


def choices(annotation: Any) -> Iterator[str]:
    """The names that a type admits."""
    if get_origin(annotation) is Literal:
        yield from get_args(annotation)
    else:
        for inner in get_args(annotation):
            yield from choices(inner)


def field(key: str) -> Any:
    """The pydantic field of a dotted key, or None."""
    parent, _, leaf = key.rpartition(".")
    section = text.section(text.annotation(RunConfig, parent)) if parent else RunConfig
    return section.model_fields.get(leaf) if section is not None else None


def nearest(key: str) -> str:
    """A hint with the known key closest to a mistyped one. Keys of the same section are preferred."""
    keys = keys_of(RunConfig)
    parent, _, leaf = key.rpartition(".")
    siblings = [k for k in keys if k.rpartition(".")[0] == parent]
    if leaf in ALIASES:
        return f"; did you mean {ALIASES[leaf]}?"
    by_leaf = {k.rpartition(".")[2]: k for k in keys} | ALIASES
    match = difflib.get_close_matches(key, siblings, 1, 0.6) or difflib.get_close_matches(key, keys, 1, 0.7)
    if not match and (close := difflib.get_close_matches(leaf, by_leaf, 1, 0.6)):
        match = [by_leaf[close[0]]]
    return f"; did you mean {match[0]}?" if match else f"; {parent or 'the top level'} has: {', '.join(siblings)}"


def keys_of(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Every dotted key of a section, with those of its subsections."""
    keys = []
    for name, found in model.model_fields.items():
        keys.append(prefix + name)
        for annotation in (found.annotation, *get_args(found.annotation)):  # a section, or one that may be unset
            if isinstance(annotation, type) and issubclass(annotation, BaseModel):
                keys += keys_of(annotation, f"{prefix}{name}.")
    return keys
