"""Read a pickle without executing it: lists, dicts and numbers as they are, everything else as inert records.

`pickletools.genops` splits the file into operations, and `read` carries out those that only build data. An operation
that would call a function or create an object makes an `Inert` record of the name and the arguments instead. Names are
never looked up in a module; those that the caller does not expect are refused.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, cast

from udddm.errors import CheckpointError

MOST_OPERATIONS = 500_000
"""A pickle of a network with 55 M parameters has about 20 thousand."""
DICTS = ("collections.OrderedDict", "dnnlib.util.EasyDict")
"""Classes that are read as a dict."""
_CONSTANTS: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_LITERALS = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "STRING", "BINSTRING", "SHORT_BINSTRING"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
}
_KEYS = (str, int, float, bool, type(None))


@dataclass(frozen=True)
class Name:
    """The name of a class or function, `module.attribute`. It is not looked up."""

    name: str


@dataclass(eq=False)
class Inert:
    """What a pickle would have created by calling `name` with `arguments`, and the state that it would have given
    it."""

    name: str
    arguments: tuple[Any, ...]
    state: Any = None


@dataclass(frozen=True)
class Reference:
    """What a pickle refers to outside of itself: a storage of PyTorch's format."""

    identity: Any


class _Bounded:
    """A file that is never asked for more bytes than it has, because reading allocates them first."""

    def __init__(self, file: BinaryIO):
        self._file = file
        position = file.tell()
        self._end = file.seek(0, 2)
        file.seek(position)

    def read(self, count: int) -> bytes:
        return self._file.read(max(0, min(count, self._end - self._file.tell())))

    def readline(self) -> bytes:
        return self._file.readline()


@dataclass
class _Machine:
    """The stack of a pickle. Operations are methods, which raise IndexError, KeyError, TypeError or ValueError for a
    pickle that is not well formed."""

    names: Collection[str]
    references: bool
    stack: list[Any] = field(default_factory=list)
    marks: list[int] = field(default_factory=list)
    memo: dict[int, Any] = field(default_factory=dict)

    def pop(self) -> Any:
        if self.marks and len(self.stack) <= self.marks[-1]:
            raise IndexError("an operation without its operands")
        return self.stack.pop()

    def above_mark(self) -> list[Any]:
        mark = self.marks.pop()
        found = self.stack[mark:]
        del self.stack[mark:]
        return found

    def name(self, module: Any, attribute: Any) -> None:
        if not isinstance(module, str) or not isinstance(attribute, str):
            raise TypeError("a name that is not text")
        found = f"{module}.{attribute}"
        if found not in self.names:
            raise _Refused(found)
        self.stack.append(Name(found))

    def call(self) -> None:
        arguments, function = self.pop(), self.pop()
        if not isinstance(function, Name) or not isinstance(arguments, tuple):
            raise TypeError("a call of something that is not a name")
        if function.name in DICTS:
            self.stack.append({})
            for pair in arguments[0] if arguments and isinstance(arguments[0], list) else ():
                self.put_items(list(pair) if isinstance(pair, (list, tuple)) else [])
        else:
            self.stack.append(Inert(function.name, arguments))

    def put_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict) or len(items) % 2:
            raise ValueError("items for something that is not a dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, _KEYS):  # hashing a deeply nested key would exhaust the stack
                raise TypeError("a key that is neither text nor a number")
            target[key] = value

    def extend(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, list):
            raise TypeError("elements for something that is not a list")
        target.extend(items)

    def set_state(self) -> None:
        state, target = self.pop(), self.stack[-1]
        if isinstance(target, Inert):
            target.state = state
        elif not isinstance(target, dict):  # attributes of a dict do not matter
            raise TypeError("a state for something that is not an object")

    def refer(self) -> None:
        identity = self.pop()
        if not self.references:
            raise ValueError("a reference to something outside of the file")
        self.stack.append(Reference(identity))


class _Refused(Exception):
    """A name that is not expected."""


_OPERATIONS: dict[str, Callable[[_Machine], Any]] = {
    "PROTO": lambda m: None,
    "FRAME": lambda m: None,
    "MARK": lambda m: m.marks.append(len(m.stack)),
    "POP": lambda m: m.pop(),
    "POP_MARK": lambda m: m.above_mark(),
    "DUP": lambda m: m.stack.append(m.stack[-1]),
    "MEMOIZE": lambda m: m.memo.__setitem__(len(m.memo), m.stack[-1]),
    "EMPTY_LIST": lambda m: m.stack.append([]),
    "EMPTY_DICT": lambda m: m.stack.append({}),
    "EMPTY_SET": lambda m: m.stack.append([]),
    "LIST": lambda m: m.stack.append(m.above_mark()),
    "FROZENSET": lambda m: m.stack.append(m.above_mark()),
    "TUPLE": lambda m: m.stack.append(tuple(m.above_mark())),
    "TUPLE1": lambda m: m.stack.append((m.pop(),)),
    "TUPLE2": lambda m: m.stack.append((m.pop(), m.pop())[::-1]),
    "TUPLE3": lambda m: m.stack.append((m.pop(), m.pop(), m.pop())[::-1]),
    "APPEND": lambda m: m.extend([m.pop()]),
    "APPENDS": lambda m: m.extend(m.above_mark()),
    "ADDITEMS": lambda m: m.extend(m.above_mark()),
    "SETITEM": lambda m: m.put_items([m.pop(), m.pop()][::-1]),
    "SETITEMS": lambda m: m.put_items(m.above_mark()),
    "STACK_GLOBAL": lambda m: m.name(*(m.pop(), m.pop())[::-1]),
    "REDUCE": _Machine.call,
    "NEWOBJ": _Machine.call,
    "BUILD": _Machine.set_state,
    "BINPERSID": _Machine.refer,
}


def _carry_out(machine: _Machine, operation: str, argument: Any) -> None:
    if operation in _LITERALS:
        machine.stack.append(argument)
    elif operation in _CONSTANTS:
        machine.stack.append(_CONSTANTS[operation])
    elif operation in ("PUT", "BINPUT", "LONG_BINPUT"):
        machine.memo[argument] = machine.stack[-1]
    elif operation in ("GET", "BINGET", "LONG_BINGET"):
        machine.stack.append(machine.memo[argument])
    elif operation == "DICT":
        items = machine.above_mark()
        machine.stack.append({})
        machine.put_items(items)
    elif operation == "GLOBAL":
        machine.name(*argument.split(" ", 1))
    elif operation in _OPERATIONS:
        _OPERATIONS[operation](machine)
    else:
        raise ValueError(f"the operation {operation}, which no file of weights needs")


def read(file: BinaryIO, names: Collection[str], where: str | Path, *, references: bool = False) -> Any:
    """The contents of the pickle at the position of `file`, which is left after it. Nothing in it is executed.

    Sets are read as lists, and `DICTS` as dicts. `names` are the classes and functions that may occur, and
    `references` allows `Reference`. Every structure is shared and not copied, as in the file, so that memory is bounded
    by the size of the file; it may contain itself. Raises CheckpointError, which names `where`, for another name, for
    an operation that is not needed for data, and for a truncated or malformed file.
    """
    machine = _Machine(names, references)
    try:
        for number, (operation, argument, _) in enumerate(pickletools.genops(cast(BinaryIO, _Bounded(file)))):
            if number >= MOST_OPERATIONS:
                raise CheckpointError(f"{where}: refused, because it has more than {MOST_OPERATIONS} operations")
            if operation.name == "STOP":
                return machine.pop()
            _carry_out(machine, operation.name, argument)
    except _Refused as refused:
        raise CheckpointError(
            f"{where}: refused, because it names {str(refused)[:200]!r}, which does not belong in a file of weights; "
            "nothing was executed"
        ) from None
    except (ValueError, TypeError, IndexError, KeyError, OverflowError, EOFError) as error:
        raise CheckpointError(f"{where} is not a valid pickle of weights: {str(error)[:200]}") from error
    raise CheckpointError(f"{where} is not a valid pickle of weights: it has no end")
