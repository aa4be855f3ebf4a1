"""TODO."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable
from typing import Any

from udddm.errors import DataError


def load_plugin(name: str, what: str) -> Callable[..., Any]:
    """The function `package.module:function`; messages say that it is for `what`. Raises DataError.

    The function is one of the module's own names: with dots, any module would give all that it imports.
    """
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute.isidentifier() or module_name.startswith("."):
        raise DataError(f"{what} {name!r}: write package.module:function")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and (module_name == error.name or module_name.startswith(f"{error.name}.")):
            raise DataError(
                f"{what} {name!r}: there is no module {error.name}: install it, or name its folder in PYTHONPATH"
            ) from error
        raise DataError(f"{what} {name!r}: importing {module_name} failed: {error}") from error
    except ImportError as error:
        raise DataError(f"{what} {name!r}: importing {module_name} failed: {error}") from error
    try:
        factory = getattr(module, attribute)
    except AttributeError as error:
        names = [each for each in vars(module) if not each.startswith("_")]
        match = difflib.get_close_matches(attribute, names, 1)
        hint = f"; did you mean {match[0]}?" if match else ""
        raise DataError(f"{what} {name!r}: the module {module_name} has no {attribute}{hint}") from error
    if not callable(factory):
        raise DataError(f"{what} {name!r} is a {type(factory).__name__}, not a function")
    found: Callable[..., Any] = factory
    return found
