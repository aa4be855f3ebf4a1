"""YAML as the configuration reads and writes it.

It differs from YAML 1.1, which PyYAML implements: `1e-4` is a number, `yes`, `no`, `on`, `off` and dates are text,
`010` is ten, and a duplicate key is an error. If a field of the configuration is text, its value is read literally.
"""

from __future__ import annotations

import contextlib
import re
import types
import typing
from typing import Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel

from udddm.config.renamed import current_key
from udddm.errors import ConfigError

_INT = r"[-+]?[0-9][0-9_]*|0o[0-7]+|0x[0-9a-fA-F]+"
# An exponent needs a sign or a decimal point, so that a revision such as 12345e67 is text in free mappings.
_FLOAT = r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+][0-9]+|[-+]?([0-9][0-9_]*\.[0-9_]*|\.[0-9]+)([eE][-+]?[0-9]+)?"
_SCALARS = (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", _INT, list("-+0123456789")),
    ("float", rf"{_FLOAT}|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", list("-+0123456789.")),
    ("merge", r"<<", ["<"]),
)
_TAG = "tag:yaml.org,2002:"


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with different rules for plain scalars."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012

    def construct_yaml_int(self, node: Any) -> int:
        text = node.value.replace("_", "")
        return int(text, 0) if re.match("0[ox]", text) else int(text)


class _Dumper(yaml.SafeDumper):
    """PyYAML's safe dumper, which quotes strings that `_Loader` would not read as text."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012


for _kind, _pattern, _first in _SCALARS:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_TAG + _kind, re.compile(f"^(?:{_pattern})$"), _first)
_Loader.add_constructor(_TAG + "int", _Loader.construct_yaml_int)


def dump(value: Any, **options: Any) -> str:
    """Format a plain value as YAML, which `parse` reads back as the same value."""
    text: str = yaml.dump(value, Dumper=_Dumper, sort_keys=False, **options)
    return text


def parse(text: str, source: str, model: type[BaseModel], key: str = "") -> Any:
    """Parse a YAML text that contains the configuration `model`, or the value of its dotted `key`, to a plain value.

    Raises ConfigError for invalid YAML, and for a duplicate key, with both line numbers.
    """
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _check_keys(node, source, "", set())
        _keep_text(node, model, key)
        return loader.construct_document(node)
    except ConfigError:
        raise
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        problem = getattr(error, "problem", None) if key else None
        shown = f"{problem}; in a shell, put it in quotes" if problem else error
        raise ConfigError(f"{source} is not valid YAML: {shown}") from error
    finally:
        if loader is not None:
            loader.dispose()


def _check_keys(node: yaml.Node, source: str, prefix: str, done: set[int]) -> None:
    if id(node) in done:  # an alias, possibly of a parent
        return
    done.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for number, item in enumerate(node.value):
            _check_keys(item, source, f"{prefix}{number}.", done)
    if not isinstance(node, yaml.MappingNode):
        return
    lines: dict[str, int] = {}
    for name, value in node.value:
        line = name.start_mark.line + 1
        if isinstance(name, yaml.ScalarNode) and name.tag != _TAG + "merge":
            if name.value in lines:
                raise ConfigError(
                    f"{source}: {prefix}{name.value} is given twice, in lines {lines[name.value]} and {line}: "
                    "merge them, or remove one"
                )
            lines[name.value] = line
            _check_keys(value, source, f"{prefix}{name.value}.", done)
        else:
            _check_keys(value, source, prefix, done)


def _keep_text(node: yaml.Node, model: type[BaseModel], key: str) -> None:
    """Mark plain scalars other than null as text if the field of the configuration is text."""
    found = annotation(model, key)
    if isinstance(node, yaml.MappingNode) and (not key or section(found) is not None):
        for name, value in node.value:
            if isinstance(name, yaml.ScalarNode) and name.tag == _TAG + "str":
                _keep_text(value, model, current_key(f"{key}.{name.value}" if key else name.value))
    elif found is not None and get_origin(_plain(found)) is not dict:
        items = node.value if isinstance(node, yaml.SequenceNode) else [node]
        as_text = any(wants_text(each) for each in (found, *_items(found)))
        for item in items:
            if isinstance(item, yaml.ScalarNode):
                _mark(item, as_text)


def _mark(node: yaml.ScalarNode, as_text: bool) -> None:
    if as_text and node.tag in {_TAG + kind for kind in ("int", "float", "bool")}:
        node.tag = _TAG + "str"
    elif not as_text and node.style is None and re.fullmatch(r"[-+]?[0-9]+[eE][0-9]+", node.value):
        node.tag = _TAG + "float"


def _items(found: Any) -> tuple[Any, ...]:
    """The types of the items of a list."""
    return get_args(_plain(found)) if get_origin(_plain(found)) in (tuple, list) else ()


def value_of(text: str, source: str, model: type[BaseModel], key: str) -> Any:
    """Parse the value of `--set key=text`.

    If the field is text, the value is the literal text (with or without quotes). Otherwise, it is a YAML list or
    mapping, a number, true, false, null, or text. A list may be written without its brackets: `0.9,0.99`. Raises
    ConfigError for a list or mapping that is not valid YAML.
    """
    found = annotation(model, key)
    bare = text.strip()
    if len(bare) > 1 and bare[0] == bare[-1] and bare[0] in "'\"":
        try:
            quoted = yaml.safe_load(bare)
        except yaml.YAMLError:
            quoted = None
        if isinstance(quoted, str):
            return quoted
    if wants_text(found):
        return None if bare in ("", "null") and type(None) in get_args(_plain(found)) else text
    if "," in bare and bare[:1] not in ("[", "{") and _is_tuple(found):
        bare = f"[{bare}]"
    if bare[:1] in ("[", "{"):
        return parse(bare, source, model, key)
    loader = _Loader("")
    tag = loader.resolve(yaml.ScalarNode, bare, (True, False))  # type: ignore[no-untyped-call]
    if tag != _TAG + "str":
        return loader.construct_object(yaml.ScalarNode(tag, bare))
    if found is not None and get_origin(_plain(found)) is not dict:
        with contextlib.suppress(ValueError):  # 1e5, if the field is a number
            return float(bare)
    return text


def annotation(model: type[BaseModel], key: str) -> Any:
    """The type of a dotted key. None for an unknown key, or a key in a free mapping."""
    found: Any = model
    for name in key.split(".") if key else ():
        inner = section(found)
        if inner is None or name not in inner.model_fields:
            return None
        found = inner.model_fields[name].annotation
    return found


def section(found: Any) -> type[BaseModel] | None:
    """The section in a type annotation, such as `Section | None`. None without one."""
    for each in (found, *get_args(found)):
        if isinstance(each, type) and issubclass(each, BaseModel):
            return each
    return None


def wants_text(found: Any) -> bool:
    """Whether a type admits only text, or text and null."""
    found = _plain(found)
    if get_origin(found) is Literal:
        return all(isinstance(each, str) for each in get_args(found))
    if get_origin(found) in (Union, types.UnionType):
        return all(each is type(None) or wants_text(each) for each in get_args(found))
    return found is str


def _is_tuple(found: Any) -> bool:
    """Whether a type is a list, or a list or null."""
    found = _plain(found)
    options = get_args(found) if isinstance(found, types.UnionType) else (found,)
    return any(get_origin(each) is tuple for each in options)


def _plain(found: Any) -> Any:
    return get_args(found)[0] if get_origin(found) is typing.Annotated else found
