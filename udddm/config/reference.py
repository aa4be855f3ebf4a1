"""The reference of all settings, made from their types: Markdown for docs/configuration.md, and a JSON schema."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from udddm.config import plugins, text
from udddm.config.plugins import Registry
from udddm.config.run import RunConfig
from udddm.config.shorthand import ALIASES, SELECTORS
from udddm.errors import ConfigError

_INTRODUCTION = """\
# Configuration reference

Every setting, as `udddm config reference` prints it; do not edit this page. `udddm config schema` prints a JSON schema
for editors.

A configuration is a YAML file of these sections, and starts from a preset ([presets.md](presets.md)):

    udddm train --config digits train.steps=500 objective.name=ict
    udddm config show digits --all

In a section, write keys without its name: `train: {steps: 500}`. A number or a name may stand where a list is expected,
and on the command line a list needs no brackets: `train.ema=0.9,0.99`. Settings marked * may change between two starts
of a run.

"""
_BOUNDS = {"gt": "> ", "ge": "≥ ", "lt": "< ", "le": "≤ "}


def markdown() -> str:
    """The page: short names, then a table for each section."""
    lines = [_INTRODUCTION.rstrip(), "", "| short name | setting |", "|---|---|"]
    lines += [f"| `{name}=` | `{key}` |" for name, key in ALIASES.items()]
    lines += [f"| `{section}=NAME` | `{section}.{key}=NAME` |" for section, key in SELECTORS.items()]
    lines += ["", "## Top level", "", *_table(RunConfig, "")]
    for key, model in _sections(RunConfig):
        lines += [
            "",
            f"## {key}",
            "",
            f"{(model.__doc__ or '').strip().partition(chr(10))[0]}",
            "",
            *_table(model, key),
        ]
    for registry, name, model in plugin_settings():
        lines += ["", f"## Settings of {registry.what} `{name}`", ""]
        lines += _table(model, f"{registry.key.rpartition('.')[0]}.settings")
    return "\n".join(lines) + "\n"


def plugin_settings() -> Iterator[tuple[Registry, str, type[BaseModel]]]:
    """The members of the plug points that have settings: registry, name and model of the settings."""
    for registry in (each for each in vars(plugins).values() if isinstance(each, Registry)):
        for name in registry.members:
            try:
                model = getattr(registry.load(name), "Settings", None)
            except ConfigError:  # a package that is not installed
                continue
            if model is not None:
                yield registry, name, model


def _sections(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    for name, field in model.model_fields.items():
        inner = _section_in(field.annotation)
        if inner is not None:
            yield f"{prefix}{name}", inner
            yield from _sections(inner, f"{prefix}{name}.")


def _section_in(annotation: Any) -> type[BaseModel] | None:
    """The section in a type, such as `Section | None` or `tuple[Section, ...]`."""
    found = text.section(annotation)
    if found is not None:
        return found
    return next((inner for each in get_args(annotation) if (inner := _section_in(each)) is not None), None)


def _table(model: type[BaseModel], prefix: str) -> list[str]:
    lines = ["| key | type | default | unit | meaning |", "|---|---|---|---|---|"]
    for name, field in model.model_fields.items():
        key = f"{prefix}.{name}" if prefix else name
        extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
        section = field.annotation if isinstance(field.annotation, type) else None
        if section is not None and issubclass(section, BaseModel):
            kind, default = "section", f"[{key}](#{key.replace('.', '')})"
        else:
            kind, default = type_of(field), _default(field)
        star = " *" if extra.get("changeable") or _changeable(prefix) else ""
        cells = [f"`{key}`{star}", kind, default, str(extra.get("unit", "")), field.description or ""]
        lines.append("| " + " | ".join(cell.replace("|", "\\|").strip() for cell in cells) + " |")
    return lines


def _changeable(section: str) -> bool:
    return section.partition(".")[0] in RunConfig.changeable() or section in RunConfig.changeable()


def type_of(field: FieldInfo) -> str:
    """The type of a setting in words: `whole number > 0`, or the names that it may be."""
    return _type(field.annotation, tuple(field.metadata))


def _type(annotation: Any, metadata: tuple[Any, ...] = ()) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    for each in metadata:
        registry = getattr(getattr(each, "func", None), "__self__", None)
        if isinstance(registry, Registry):
            return f"{_names(registry.members)} or `package.module:function`"
        if isinstance(each, FieldInfo):
            metadata += tuple(each.metadata)
    if origin is Annotated:
        return _type(arguments[0], (*arguments[1:], *metadata))
    if origin is Literal:
        return _names(arguments)
    if origin is tuple:
        inner = _type(arguments[0])
        return f"list of {inner}" if arguments[-1] is Ellipsis else f"{len(arguments)} values, {inner}"
    if origin is dict:
        return "mapping"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section"
    if arguments:  # a union
        return " or ".join(_type(each, metadata) for each in arguments if each is not type(None))
    plain = {int: "whole number", float: "number", bool: "true or false", str: "text"}[annotation]
    bounds = [
        f"{sign}{_number(getattr(each, name))}"
        for each in metadata
        for name, sign in _BOUNDS.items()
        if getattr(each, name, None) is not None
    ]
    return f"{plain} {', '.join(bounds)}".strip()


def _names(names: Any) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _number(value: float) -> str:
    if isinstance(value, int):
        return f"2^{value.bit_length() - 1}" if value >= 1 << 16 and value.bit_count() == 1 else str(value)
    return f"{value:g}"


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if value is None:
        return "unset"
    if isinstance(value, tuple):
        value = [each.model_dump() if isinstance(each, BaseModel) else each for each in value]
    return f"`{json.dumps(value) if not isinstance(value, str) else value}`".replace('"', "")


def schema() -> str:
    """The JSON schema of a configuration, with the short forms of lists and sections that are accepted."""
    found = RunConfig.model_json_schema()
    for part in (found, *found["$defs"].values()):
        for name, inner in part["properties"].items():
            lists = [each for each in (inner, *inner.get("anyOf", ())) if each.get("type") == "array"]
            for each in lists:
                if "prefixItems" not in each and "$ref" not in each["items"]:
                    part["properties"][name] = _either(inner, each["items"])
    for registry in (each for each in vars(plugins).values() if isinstance(each, Registry)):
        section, _, leaf = registry.key.partition(".")
        if section in RunConfig.model_fields and registry.key not in (plugins.METRICS.key, plugins.LOGGERS.key):
            properties = _definition(found, section)["properties"]
            names = [*registry.members, *registry.renamed]
            properties[leaf] = _either(properties[leaf], {"enum": names}, {"type": "string", "pattern": ":"})
    for section in SELECTORS:
        properties = found["properties"]
        properties[section] = _either(properties[section], {"type": "string"})
    title = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "udddm configuration"}
    return json.dumps({**found, **title}, indent=1)


def _definition(found: dict[str, Any], section: str) -> dict[str, Any]:
    inner = found["properties"][section]
    reference: str = inner["$ref"]
    definition: dict[str, Any] = found["$defs"][reference.rpartition("/")[2]]
    return definition


def _either(inner: dict[str, Any], *others: dict[str, Any]) -> dict[str, Any]:
    """A property that may also be one of `others`; for a plain text, only one of them."""
    names = ("description", "default", "title", "unit", "changeable")
    about: dict[str, Any] = {key: inner.pop(key) for key in names if key in inner}
    options = others if inner == {"type": "string"} else (inner, *others)
    return {**about, "anyOf": list(options)}
