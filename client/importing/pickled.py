"""A pickle read as data: nothing in it is imported, called or built.

Owns the machine that goes through the opcodes. What a pickle would import becomes a `Global`, what
it would call a `Call`, what it would instantiate an `Instance`: records that whoever asked for the
file interprets. Promises that only names on a list are accepted, that memory is bounded by the
pickle's size, and that anything else in it is `FormatInvalid`.
"""

import pickletools
from collections.abc import Callable, Collection, Hashable
from dataclasses import dataclass
from io import BytesIO
from typing import Any

from everstep.proto.errors import FormatInvalid

MAX_PICKLE_BYTES = 256 << 20
_ORDERED = ("collections", "OrderedDict")


@dataclass(frozen=True, slots=True)
class Global:
    """Something that the pickle names, by module and name."""

    module: str
    name: str


@dataclass(slots=True, eq=False)
class Call:
    """What a function would return."""

    function: Global
    arguments: tuple[Any, ...]
    state: Any = None


@dataclass(slots=True, eq=False)
class Instance:
    """An object of a class; usable as a key, equal to itself only."""

    cls: Global
    arguments: tuple[Any, ...]
    state: Any = None


@dataclass(frozen=True, slots=True)
class Persistent:
    """What lies outside of the pickle."""

    key: Any


def unpickled(data: bytes, allowed: Collection[tuple[str, str]], where: str) -> Any:
    """Read a pickle.

    Args:
        data: The pickle.
        allowed: Module and name of what it may name; "*" for all names of a module.
        where: For messages.

    Raises:
        FormatInvalid: If it names anything else, or is damaged.
    """
    if len(data) > MAX_PICKLE_BYTES:
        raise FormatInvalid(where, f"a pickle of {len(data)} bytes is over the limit")
    machine = _Machine(allowed, where)
    try:
        for opcode, argument, _ in pickletools.genops(BytesIO(data)):
            if opcode.name == "STOP":
                return machine.stack.pop()
            machine.do(opcode.name, argument)
    except FormatInvalid:
        raise
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise FormatInvalid(where, f"not a pickle that can be read as data: {error}") from error
    raise FormatInvalid(where, "its pickle has no end")


class _Machine:
    def __init__(self, allowed: Collection[tuple[str, str]], where: str) -> None:
        self.stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}
        self._allowed = frozenset(allowed)
        self._where = where

    def do(self, name: str, argument: Any) -> None:
        if name in _LITERALS:
            self.stack.append(argument)
        elif name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name]())
        elif name not in ("PROTO", "FRAME"):
            action = _ACTIONS.get(name)
            if action is None:
                raise FormatInvalid(self._where, f"its pickle has an opcode {name}")
            action(self, argument)

    def since_mark(self) -> list[Any]:
        begin = self._marks.pop()
        items = self.stack[begin:]
        del self.stack[begin:]
        return items

    def mark(self) -> None:
        self._marks.append(len(self.stack))

    def remember(self, index: int | None) -> None:
        self._memo[len(self._memo) if index is None else index] = self.stack[-1]

    def recall(self, index: int) -> None:
        self.stack.append(self._memo[index])

    def named(self, module: object, name: object) -> None:
        found = Global(str(module), str(name))
        if not {(found.module, found.name), (found.module, "*")} & self._allowed:
            raise FormatInvalid(
                self._where,
                f"its pickle names {found.module}.{found.name}, which is not one of the few types "
                "that such a file needs. Nothing of it was executed",
            )
        self.stack.append(found)

    def called(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if not isinstance(function, Global) or not isinstance(arguments, tuple):
            raise FormatInvalid(self._where, "its pickle calls what is no function")
        ordered = (function.module, function.name) == _ORDERED and not arguments
        self.stack.append({} if ordered else Call(function, arguments))

    def instantiated(self) -> None:
        arguments, cls = self.stack.pop(), self.stack.pop()
        if not isinstance(cls, Global) or not isinstance(arguments, tuple):
            raise FormatInvalid(self._where, "its pickle makes an object of what is no class")
        self.stack.append(Instance(cls, arguments))

    def built(self) -> None:
        state, thing = self.stack.pop(), self.stack[-1]
        if isinstance(thing, Instance | Call):
            thing.state = state
        elif not isinstance(thing, dict):  # an OrderedDict may have attributes: not of interest
            raise FormatInvalid(self._where, "its pickle gives a state to what has none")

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict) or len(items) % 2:
            raise FormatInvalid(self._where, "its pickle fills what is no dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, Hashable):
                raise FormatInvalid(self._where, "its pickle has a key that is none")
            target[key] = value

    def extend(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, set):
            target.update(items)
        elif isinstance(target, list):
            target.extend(items)
        else:
            raise FormatInvalid(self._where, "its pickle fills what is no list")

    def tuple_of(self, count: int) -> None:
        items = tuple(self.stack[len(self.stack) - count :])
        if len(items) != count:
            raise FormatInvalid(self._where, "its pickle lacks something")
        del self.stack[len(self.stack) - count :]
        self.stack.append(items)


_LITERALS = frozenset(
    {"BININT", "BININT1", "BININT2", "LONG1", "INT", "LONG", "BINFLOAT", "FLOAT"}
    | {"SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "UNICODE"}
    | {"SHORT_BINBYTES", "BINBYTES", "BINBYTES8"}
)
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "EMPTY_SET": set,
}
_ACTIONS: dict[str, Callable[[_Machine, Any], None]] = {
    "MARK": lambda m, _: m.mark(),
    "MEMOIZE": lambda m, _: m.remember(None),
    "BINPUT": lambda m, at: m.remember(at),
    "LONG_BINPUT": lambda m, at: m.remember(at),
    "BINGET": lambda m, at: m.recall(at),
    "LONG_BINGET": lambda m, at: m.recall(at),
    "GLOBAL": lambda m, names: m.named(*names.split(" ", 1)),
    "STACK_GLOBAL": lambda m, _: m.named(m.stack.pop(-2), m.stack.pop()),
    "REDUCE": lambda m, _: m.called(),
    "NEWOBJ": lambda m, _: m.instantiated(),
    "BUILD": lambda m, _: m.built(),
    "SETITEM": lambda m, _: m.set_items([m.stack.pop(-2), m.stack.pop()]),
    "SETITEMS": lambda m, _: m.set_items(m.since_mark()),
    "APPEND": lambda m, _: m.extend([m.stack.pop()]),
    "APPENDS": lambda m, _: m.extend(m.since_mark()),
    "ADDITEMS": lambda m, _: m.extend(m.since_mark()),
    "TUPLE": lambda m, _: m.stack.append(tuple(m.since_mark())),
    "TUPLE1": lambda m, _: m.tuple_of(1),
    "TUPLE2": lambda m, _: m.tuple_of(2),
    "TUPLE3": lambda m, _: m.tuple_of(3),
    "BINPERSID": lambda m, _: m.stack.append(Persistent(m.stack.pop())),
}
