"""Values that are not tensors, as exact typed JSON. Never pickle.

What JSON says exactly is written as itself: None, bool, int of 64 bits, finite float, str, list,
and dict with str keys. Everything else is an object ``{"~": tag, "is": payload}``; a dict that
could be mistaken for one is tagged too. Tags:

    int        hexadecimal text, beyond 64 bits       float      "nan", "inf" or "-inf"
    complex    [real, imaginary]                      str        base64 of UTF-8 with surrogates
    bytes, bytearray   base64                         tuple, set, frozenset   [item, ...]
    dict, ordered      [[key, value], ...]            range, slice            [start, stop, step]
    ndarray, numpy     [dtype, [length, ...], base64 of the elements in C order]

A caller's hook adds types (torch's, say) under tags of its own, which contain a dot.

Promises that decoding gives an equal value of the same types, in the same order; that another type
(named tuples, enums, dataclasses, subclasses of int, dict and so on) is refused by path; that
nesting and size are bounded; and that only `FormatInvalid` is raised for text from outside.
Does not promise that one object referenced twice comes back as one object, that a NaN keeps its
payload (those in arrays do), or that an array keeps its memory order.
"""

import base64
import json
import math
import re
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any

from everstep.proto.errors import FormatInvalid, NotCapturable

MAX_DEPTH = 100
MAX_ITEMS = 1 << 22
MAX_TEXT_CHARS = 256 << 20

EncodeHook = Callable[[object], Any]
"""Takes a value of a type unknown here; returns ``(tag, payload)`` or NotImplemented. The tag
contains a dot; the payload is anything that can be encoded, bytes included."""
DecodeHook = Callable[[str, Any], object]
"""Takes a tag and the decoded payload; returns the value or NotImplemented. For a payload that it
cannot use it raises FormatInvalid, ValueError, TypeError, LookupError or RuntimeError."""

_INT_LIMIT = 1 << 63
_NOT_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
_NUMPY_DTYPE = re.compile(r"[<>|](?:b1|[iu][1248]|f(?:2|4|8|12|16)|c(?:8|16|24|32)|[mM]8.{0,32})")


def encode(value: object, path: str, *, hook: EncodeHook | None = None) -> str:
    """Return `value` as ASCII text.

    Args:
        value: Any value of the types above.
        path: Where it is in the state, for the error.
        hook: For types unknown here.

    Raises:
        NotCapturable: If something in it is of another type, or nested deeper than `MAX_DEPTH`,
            as every reference cycle is.
    """
    plain = _Encoder(path, hook).converted(value, 0)
    text = json.dumps(plain, allow_nan=False, check_circular=False, separators=(",", ":"))
    if len(text) > MAX_TEXT_CHARS:
        raise NotCapturable(path, type(value).__name__, f"{len(text)} characters as text")
    return text


def decode(text: str, *, hook: DecodeHook | None = None, where: str = "a stored value") -> Any:
    """Return the value that `text` says.

    Args:
        text: What `encode` returned.
        hook: For tags unknown here.
        where: What is being read, for the error.

    Raises:
        FormatInvalid: If it is not what `encode` returns.
    """
    if len(text) > MAX_TEXT_CHARS:
        raise FormatInvalid(where, f"a value of {len(text)} characters is over the limit")
    try:
        return json.loads(
            text,
            object_pairs_hook=_Decoder(hook).object,
            parse_float=_finite,
            parse_constant=_refused,
        )
    # A RuntimeError is what torch raises in a hook, and what too deep a text raises in json.
    except (ValueError, TypeError, LookupError, ArithmeticError, RuntimeError) as error:
        raise FormatInvalid(where, f"a stored value cannot be read ({error})") from error


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"the number {text} is out of range")
    return number


def _refused(text: str) -> float:
    raise ValueError(f"{text} is not JSON")


def _exact_text(text: str) -> bool:
    # Two lone surrogates side by side would come back from JSON as one character.
    return text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text)


def _tagged(tag: str, payload: object) -> dict[str, object]:
    return {"~": tag, "is": payload}


def _base64(data: bytes | bytearray) -> str:
    return base64.b64encode(data).decode("ascii")


class _Encoder:
    def __init__(self, path: str, hook: EncodeHook | None) -> None:
        self.path = path
        self.hook = hook
        self.items = 0

    def refusal(self, value: object, detail: str = "") -> NotCapturable:
        kind = type(value)
        module = "" if kind.__module__ == "builtins" else f"{kind.__module__}."
        return NotCapturable(self.path, module + kind.__qualname__, detail)

    def converted(self, value: object, depth: int) -> object:
        """The value as json.dumps takes it."""
        kind = type(value)
        scalar = _SCALARS.get(kind)
        if scalar is not None:
            return scalar(value)
        if kind in _CONTAINERS:
            if depth >= MAX_DEPTH:
                raise self.refusal(value, f"deeper than {MAX_DEPTH} levels, or inside itself")
            self.items += len(value)  # type: ignore[arg-type]
            if self.items > MAX_ITEMS:
                raise self.refusal(value, f"more than {MAX_ITEMS} items")
            return self.container(value, kind, depth + 1)
        numpy = sys.modules.get("numpy")
        if numpy is not None and (kind is numpy.ndarray or isinstance(value, numpy.generic)):
            return self.numpy_value(value, "ndarray" if kind is numpy.ndarray else "numpy")
        if kind is slice:
            assert isinstance(value, slice)
            return _tagged("slice", self.sequence((value.start, value.stop, value.step), depth + 1))
        return self.hooked(value, depth)

    def sequence(self, values: Iterable[object], depth: int) -> list[object]:
        converted, scalars = self.converted, _SCALARS
        result = []
        for value in values:
            scalar = scalars.get(type(value))
            # The test is repeated here to save the call: this runs for every step captured.
            result.append(converted(value, depth) if scalar is None else scalar(value))
        return result

    def container(self, value: Any, kind: type, depth: int) -> object:
        if kind is list:
            return self.sequence(value, depth)
        if kind is dict:
            if "~" not in value and all(type(key) is str and _exact_text(key) for key in value):
                return dict(zip(value, self.sequence(value.values(), depth), strict=True))
            return _tagged("dict", self.pairs(value, depth))
        if kind is OrderedDict:
            return _tagged("ordered", self.pairs(value, depth))
        items = self.sequence(value, depth)
        if kind is not tuple:
            items.sort(key=json.dumps)  # equal sets give equal text
        return _tagged(kind.__name__, items)

    def pairs(self, value: dict[object, object], depth: int) -> list[list[object]]:
        keys = self.sequence(value.keys(), depth)
        values = self.sequence(value.values(), depth)
        return [list(pair) for pair in zip(keys, values, strict=True)]

    def numpy_value(self, value: Any, tag: str) -> object:
        name = value.dtype.str
        known = _NUMPY_DTYPE.fullmatch(name) is not None and value.dtype.metadata is None
        # A longlong is an int64 by another name; its name would not come back.
        renamed = tag == "numpy" and type(value) is not _numpy().dtype(name).type
        if not known or renamed:
            raise self.refusal(value, f"dtype {value.dtype}")
        return _tagged(tag, [name, list(value.shape), _base64(value.tobytes())])

    def hooked(self, value: object, depth: int) -> object:
        answer = NotImplemented if self.hook is None else self.hook(value)
        if answer is NotImplemented:
            raise self.refusal(value)
        tag, payload = answer
        assert "." in tag, f"the tag {tag!r} of a hook needs a dot"
        return _tagged(tag, self.sequence([payload], depth + 1)[0])


def _encode_int(value: Any) -> object:
    return value if -_INT_LIMIT <= value < _INT_LIMIT else _tagged("int", hex(value))


def _encode_float(value: Any) -> object:
    return value if math.isfinite(value) else _tagged("float", repr(value))


def _encode_complex(value: Any) -> object:
    return _tagged("complex", [_encode_float(value.real), _encode_float(value.imag)])


def _encode_str(value: Any) -> object:
    if _exact_text(value):
        return value
    return _tagged("str", _base64(value.encode("utf-8", "surrogatepass")))


def _encode_range(value: Any) -> object:
    return _tagged("range", [_encode_int(part) for part in (value.start, value.stop, value.step)])


_SCALARS: dict[type, Callable[[Any], object]] = {
    type(None): lambda value: value,
    bool: lambda value: value,
    int: _encode_int,
    float: _encode_float,
    str: _encode_str,
    complex: _encode_complex,
    bytes: lambda value: _tagged("bytes", _base64(value)),
    bytearray: lambda value: _tagged("bytearray", _base64(value)),
    range: _encode_range,
}
_CONTAINERS = frozenset({list, dict, tuple, set, frozenset, OrderedDict})


class _Decoder:
    """Decodes from the inside out, as json meets the end of each object."""

    def __init__(self, hook: DecodeHook | None) -> None:
        self.hook = hook

    def object(self, pairs: list[tuple[str, Any]]) -> Any:
        value = dict(pairs)
        if len(value) != len(pairs):
            raise ValueError("a key occurs twice")
        if "~" not in value:
            return value
        if list(value) != ["~", "is"] or type(value["~"]) is not str:
            raise ValueError("a tagged value is malformed")
        tag, payload = value["~"], value["is"]
        if tag in _DECODERS:
            return _DECODERS[tag](payload)
        answer = NotImplemented if self.hook is None else self.hook(tag, payload)
        if answer is NotImplemented:
            raise ValueError(f"type {tag[:80]!r} is unknown here")
        return answer


def _text(payload: Any) -> str:
    if type(payload) is not str:
        raise TypeError("text was expected")
    return payload


def _items(payload: Any) -> list[Any]:
    if type(payload) is not list:
        raise TypeError("a list was expected")
    return payload


def _decode_bytes(payload: Any) -> bytes:
    return base64.b64decode(_text(payload), validate=True)


def _decode_str(payload: Any) -> str:
    return _decode_bytes(payload).decode("utf-8", "surrogatepass")


def _decode_int(payload: Any) -> int:
    if not re.fullmatch(r"-?0x[0-9a-f]+", _text(payload)):
        raise ValueError("a large integer is malformed")
    return int(payload, 16)


def _decode_complex(payload: Any) -> complex:
    real, imaginary = _items(payload)
    if type(real) is not float or type(imaginary) is not float:
        raise TypeError("a complex number is malformed")
    return complex(real, imaginary)


def _decode_range(payload: Any) -> range:
    if not all(type(part) is int for part in _items(payload)) or len(payload) != 3:
        raise TypeError("a range is malformed")
    return range(*payload)


def _decode_slice(payload: Any) -> slice:
    start, stop, step = _items(payload)
    return slice(start, stop, step)


def _decode_set(payload: Any) -> set[Any]:
    result = set(_items(payload))
    if len(result) != len(payload):
        raise ValueError("a set has an item twice")
    return result


def _decode_dict(payload: Any) -> dict[Any, Any]:
    result = {}
    for pair in _items(payload):
        key, value = _items(pair)
        result[key] = value
    if len(result) != len(payload):
        raise ValueError("a dict has a key twice")
    return result


def _decode_ndarray(payload: Any) -> Any:
    name, shape, data = _items(payload)
    if not _NUMPY_DTYPE.fullmatch(_text(name)):
        raise ValueError(f"dtype {name[:80]!r} is unknown here")
    if not all(type(length) is int and length >= 0 for length in _items(shape)):
        raise ValueError("a shape is malformed")
    numpy = _numpy()
    elements = bytearray(_decode_bytes(data))  # a bytearray, so that the array can be written to
    array = numpy.frombuffer(elements, numpy.dtype(name)) if elements else numpy.empty(0, name)
    return array.reshape(shape)


def _decode_numpy_scalar(payload: Any) -> Any:
    array = _decode_ndarray(payload)
    if array.shape != ():
        raise ValueError("a scalar has a shape")
    return array[()]


def _numpy() -> ModuleType:
    import numpy  # the agent and most states never need it

    return numpy


_DECODERS: dict[str, Callable[[Any], Any]] = {
    "int": _decode_int,
    "float": lambda payload: _NOT_FINITE[_text(payload)],
    "complex": _decode_complex,
    "str": _decode_str,
    "bytes": _decode_bytes,
    "bytearray": lambda payload: bytearray(_decode_bytes(payload)),
    "tuple": lambda payload: tuple(_items(payload)),
    "set": _decode_set,
    "frozenset": lambda payload: frozenset(_decode_set(payload)),
    "dict": _decode_dict,
    "ordered": lambda payload: OrderedDict(_decode_dict(payload)),
    "range": _decode_range,
    "slice": _decode_slice,
    "ndarray": _decode_ndarray,
    "numpy": _decode_numpy_scalar,
}
