"""A nested state taken apart into named tensors and named values, and put together again.

Owns the spelling of names. A name is a path: its elements joined by "/", the empty path being the
whole tree. An element is a dict key or a list index:

    str                    as it is, with "~0" for "~" and "~1" for "/"; dots mean nothing
    "" or lone surrogates  "~e", or "~x" and the hexadecimal of its UTF-8 with surrogates
    int, list index        "~i" and the number
    None, bool, float      "~j" and its JSON

A subtree without tensors is one value at its path, so that names stay few. Containers on the way
to a tensor are recorded by path unless they are plain dicts with their values last: the kind is
"list", "tuple", "ordered" or "dict". For the latter two, a colon and the positions of the values
among the entries follow unless the values come last ("dict:0" for {"step": 1, "average": tensor}).

Promises that `unflatten` gives back types and order of keys, if the tensors and the values come in
the order of `flatten`; otherwise the order of keys is that in which they come. Does not promise
that one container referenced twice comes back as one, and does not look into other containers
than dict, OrderedDict, list and tuple: they are values.
"""

import functools
import itertools
import json
import math
import re
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from everstep.proto.errors import FormatInvalid, NotCapturable

Key = str | int | float | bool | None

MAX_DEPTH = 100
MAX_ENTRIES = 1 << 22
MAX_NAME_CHARS = 1 << 16
MAX_KEY_BITS = 4096

_WHERE = "the names of a snapshot"
_ESCAPED = re.compile(r"~(?:e|x[0-9a-f]+|i-?[0-9]{1,4000}|j[-+.a-z0-9]{1,32})")
_CONTAINER = re.compile(r"list|tuple|(?:dict|ordered)(?::([0-9]{1,9}(?:,[0-9]{1,9})*))?")
_SCALARS = frozenset({type(None), bool, int, float, complex, str, bytes})


@dataclass(frozen=True, slots=True)
class Flat:
    """A tree taken apart.

    Attributes:
        tensors: Name and tensor of each, in the order of the tree.
        values: Name and value of each largest subtree without tensors, in that order too.
        containers: Kind of the container at a path, where it is no plain dict with values last.
    """

    tensors: list[tuple[str, object]]
    values: list[tuple[str, object]]
    containers: dict[str, str]


def join(*elements: Key) -> str:
    """The name that the elements spell.

    Raises:
        NotCapturable: If a key is of a type that has no spelling, or the name gets too long.
    """
    name = "/".join([_element(element, "") for element in elements])
    if len(name) > MAX_NAME_CHARS:
        raise NotCapturable(name[:200], "str", f"a name of {len(name)} characters")
    return name


def split(path: str) -> tuple[Key, ...]:
    """The elements of a name: the inverse of `join`.

    Raises:
        FormatInvalid: If it is not what `join` returns.
    """
    if not path:
        return ()
    if len(path) > MAX_NAME_CHARS:
        raise FormatInvalid(_WHERE, f"a name has {len(path)} characters")
    return tuple([_key(element) for element in path.split("/")])


def flatten(tree: object, is_tensor: Callable[[object], bool]) -> Flat:
    """Take `tree` apart.

    Args:
        tree: Nested dicts, OrderedDicts, lists and tuples; or just a tensor, or just a value.
        is_tensor: Says what is a tensor; not asked about numbers, strings and containers.

    Raises:
        NotCapturable: If a container is inside itself or too deep, or if a key on the way to a
            tensor has no spelling.
    """
    flattening = _Flattening(is_tensor)
    if type(tree) in _WALKERS:
        if not flattening.walk(tree, "", 0):
            flattening.values.append(("", tree))
    elif type(tree) not in _SCALARS and is_tensor(tree):
        flattening.tensors.append(("", tree))
    else:
        flattening.values.append(("", tree))
    for name, leaf in itertools.chain(flattening.tensors, flattening.values):
        if len(name) > MAX_NAME_CHARS:
            detail = f"a name of {len(name)} characters"
            raise NotCapturable(name[:200], type(leaf).__name__, detail)
    return Flat(flattening.tensors, flattening.values, flattening.containers)


def unflatten(
    tensors: Mapping[str, object], values: Mapping[str, object], containers: Mapping[str, str]
) -> Any:
    """Put a tree together: the inverse of `flatten`.

    Args:
        tensors: By name, in the order of `flatten`.
        values: By name, in the order of `flatten`.
        containers: By path; those that nothing lies in are ignored.

    Raises:
        FormatInvalid: If the names contradict each other.
    """
    root = _Node()
    for leaves, are_values in ((tensors, False), (values, True)):
        for name, leaf in leaves.items():
            if not name:
                if len(tensors) + len(values) != 1:
                    raise FormatInvalid(_WHERE, "the whole tree and a part of it are both given")
                return leaf
            root.plant(name, leaf, are_values)
    return root.grown("", containers)


class _Flattening:
    def __init__(self, is_tensor: Callable[[object], bool]) -> None:
        self.is_tensor = is_tensor
        self.tensors: list[tuple[str, object]] = []
        self.values: list[tuple[str, object]] = []
        self.containers: dict[str, str] = {}
        self.entries = 0

    def walk(self, tree: Any, path: str, depth: int) -> bool:
        """Take a container apart if a tensor is in it; say whether there is."""
        kind = type(tree)
        self.entries += len(tree)
        if depth >= MAX_DEPTH or self.entries > MAX_ENTRIES:
            detail = f"deeper than {MAX_DEPTH} levels, more than {MAX_ENTRIES} entries, or "
            raise NotCapturable(path[:200], kind.__name__, detail + "inside itself")
        prefix = path + "/" if depth else ""
        values: list[tuple[int, Key, object]] = []
        for position, (key, child) in enumerate(_WALKERS[kind](tree)):
            child_kind = type(child)
            if child_kind in _SCALARS:
                values.append((position, key, child))
            elif child_kind in _WALKERS:
                element = _spelled(key)
                if not self.walk(child, prefix + (element or "?"), depth + 1):
                    values.append((position, key, child))
                elif element is None:  # it matters only now that there is a tensor behind it
                    raise _no_spelling(path, key)
            elif self.is_tensor(child):
                self.tensors.append((prefix + _element(key, path), child))
            else:
                values.append((position, key, child))
        found = len(values) < len(tree)
        if found:
            self.describe(path, kind, len(tree), [position for position, _, _ in values])
            self.values.extend([(prefix + _element(key, path), leaf) for _, key, leaf in values])
        return found

    def describe(self, path: str, kind: type, length: int, positions: list[int]) -> None:
        name = _CONTAINER_NAMES[kind]
        last = not positions or positions[0] == length - len(positions)
        if name in ("dict", "ordered") and not last:
            self.containers[path] = f"{name}:{','.join(map(str, positions))}"
        elif name != "dict":
            self.containers[path] = name


def _dict_items(tree: dict[Key, object]) -> Iterable[tuple[Key, object]]:
    return tree.items()


_WALKERS: dict[type, Callable[[Any], Iterable[tuple[Key, object]]]] = {
    dict: _dict_items,
    OrderedDict: _dict_items,
    list: enumerate,
    tuple: enumerate,
}
_CONTAINER_NAMES: dict[type, str] = {
    dict: "dict",
    OrderedDict: "ordered",
    list: "list",
    tuple: "tuple",
}


def _no_spelling(path: str, key: object) -> NotCapturable:
    return NotCapturable(path[:200], type(key).__name__, "a dict key that has no spelling in names")


def _element(key: Key, path: str) -> str:
    element = _spelled(key)
    if element is None:
        raise _no_spelling(path, key)
    return element


def _spelled(key: Key) -> str | None:
    spell = _KEYS.get(type(key))
    return None if spell is None else spell(key)


def _spell_str(key: str) -> str:
    if key.isascii() or not any("\ud800" <= character <= "\udfff" for character in key):
        if "~" in key or "/" in key:
            return key.replace("~", "~0").replace("/", "~1")
        return key or "~e"
    return "~x" + key.encode("utf-8", "surrogatepass").hex()


def _spell_int(key: int) -> str | None:
    return f"~i{key}" if key.bit_length() <= MAX_KEY_BITS else None


def _spell_float(key: float) -> str | None:
    return f"~j{json.dumps(key)}" if math.isfinite(key) else None


_KEYS: dict[type, Callable[[Any], str | None]] = {
    str: _spell_str,
    int: _spell_int,
    float: _spell_float,
    bool: lambda key: "~jtrue" if key else "~jfalse",
    type(None): lambda key: "~jnull",
}


@functools.lru_cache(maxsize=4096)
def _key(element: str) -> Key:
    try:
        key = _unspelled(element)
        if _element(key, "") == element:  # one spelling only, or names could be equal unseen
            return key
    except (ValueError, NotCapturable):
        pass
    raise FormatInvalid(_WHERE, f"{element[:80]!r} is not a valid part of a name")


def _unspelled(element: str) -> Key:
    if not element.startswith(("~e", "~x", "~i", "~j")):
        return element.replace("~1", "/").replace("~0", "~")
    if not _ESCAPED.fullmatch(element):
        raise ValueError(element)
    text = element[2:]
    if element[1] == "e":
        return ""
    if element[1] == "x":
        return bytes.fromhex(text).decode("utf-8", "surrogatepass")
    if element[1] == "i":
        return int(text)
    key: Key = json.loads(text)
    return key


class _Node:
    """A container under construction. Entries are kept by the spelling of their keys: the keys 1
    and True are equal, their spellings are not."""

    __slots__ = ("entries", "values")

    def __init__(self) -> None:
        self.entries: dict[str, object] = {}
        self.values: list[str] = []

    def plant(self, name: str, leaf: object, is_value: bool) -> None:
        split(name)
        *way, last = name.split("/")
        if len(way) >= MAX_DEPTH:
            raise FormatInvalid(_WHERE, f"{name[:80]!r} is deeper than {MAX_DEPTH} levels")
        node = self
        for element in way:
            below = node.entries.setdefault(element, _ABSENT)
            if below is _ABSENT:
                below = node.entries[element] = _Node()
            if not isinstance(below, _Node):
                raise FormatInvalid(_WHERE, f"{name[:80]!r} lies inside a tensor or a value")
            node = below
        if last in node.entries:
            raise FormatInvalid(_WHERE, f"{name[:80]!r} is given twice, or has others inside it")
        node.entries[last] = leaf
        if is_value:
            node.values.append(last)

    def grown(self, path: str, containers: Mapping[str, str]) -> Any:
        kind = containers.get(path, "dict")
        match = _CONTAINER.fullmatch(kind)
        if match is None:
            raise FormatInvalid(_WHERE, f"{path[:80]!r} is a container of unknown kind {kind[:80]}")
        prefix = path + "/" if path else ""
        grown = {
            element: entry.grown(prefix + element, containers)
            if isinstance(entry, _Node)
            else entry
            for element, entry in self.entries.items()
        }
        if kind in ("list", "tuple"):
            return _sequence(path, kind, grown)
        order = self.merged(match[1]) if match[1] else grown
        result: dict[Key, object] = OrderedDict() if kind.startswith("ordered") else {}
        for element in order:
            result[_key(element)] = grown[element]
        if len(result) != len(grown):
            raise FormatInvalid(_WHERE, f"two keys at {path[:80]!r} are equal")
        return result

    def merged(self, positions: str) -> Iterator[str]:
        """The entries in order, the values being at these positions as far as there are any."""
        at = {int(position) for position in positions.split(",")}
        values = iter(self.values)
        are_values = set(self.values)
        others = iter([element for element in self.entries if element not in are_values])
        for position in range(len(self.entries)):
            first, second = (values, others) if position in at else (others, values)
            yield next(first, None) or next(second)


_ABSENT = object()


def _sequence(
    path: str, kind: str, entries: dict[str, object]
) -> list[object] | tuple[object, ...]:
    try:
        items = [entries[f"~i{index}"] for index in range(len(entries))]
    except KeyError as missing:
        raise FormatInvalid(
            _WHERE, f"item {missing} of the {kind} at {path[:80]!r} is missing"
        ) from None
    return tuple(items) if kind == "tuple" else items
