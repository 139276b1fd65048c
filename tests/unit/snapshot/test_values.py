import collections
import dataclasses
import enum
import math
import struct
import time
from typing import Any, NamedTuple

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from everstep.proto.errors import FormatInvalid, NotCapturable
from everstep.snapshot.values import MAX_DEPTH, decode, encode

thorough = settings(max_examples=150)


def exact(value: Any) -> Any:
    """A form in which two values are equal only if types, order and bits are."""
    kind = type(value)
    if kind is float:
        return kind, "nan" if math.isnan(value) else struct.pack("<d", value)
    if kind is complex:
        return kind, exact(value.real), exact(value.imag)
    if kind in (list, tuple):
        return kind, [exact(item) for item in value]
    if kind in (set, frozenset):
        return kind, sorted(repr(exact(item)) for item in value)
    if kind in (dict, collections.OrderedDict):
        return kind, [(exact(key), exact(item)) for key, item in value.items()]
    if isinstance(value, numpy.ndarray | numpy.generic):
        return kind, value.dtype.str, value.shape, value.tobytes()
    return kind, value


any_text = st.text(st.characters(exclude_categories=[]))  # with surrogates
hashable = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.complex_numbers()
    | any_text
    | st.binary()
    | st.just("~"),
    lambda inner: st.lists(inner, max_size=3).map(tuple) | st.frozensets(inner, max_size=3),
    max_leaves=5,
)
values = st.recursive(
    hashable | st.binary().map(bytearray) | st.integers().map(lambda n: n << 70),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.sets(hashable, max_size=4)
        | st.dictionaries(hashable, inner, max_size=4)
        | st.dictionaries(any_text, inner, max_size=4)
        | st.dictionaries(hashable, inner, max_size=4).map(collections.OrderedDict)
    ),
    max_leaves=20,
)


@thorough
@given(values)
def test_any_value_comes_back_exactly(value: Any) -> None:
    text = encode(value, "here")
    assert text.isascii()
    assert exact(decode(text)) == exact(value)


plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.text(),
    lambda inner: (
        st.lists(inner) | st.dictionaries(st.text().filter(lambda key: key != "~"), inner)
    ),
    max_leaves=20,
)


@thorough
@given(plain)
def test_plain_json_stays_itself(value: Any) -> None:
    import json

    assert json.loads(encode(value, "here")) == value


@pytest.mark.parametrize(
    "value",
    [
        1 << 100_000,
        -(1 << 63),
        1 << 63,
        -0.0,
        5e-324,
        math.inf,
        -math.inf,
        math.nan,
        complex(-0.0, math.nan),
        "\ud83d\ude00",  # two surrogates, not one character
        "\ud83d\ude00".encode("utf-16", "surrogatepass").decode("utf-16"),
        {"\ud800": 1},
        {"~": "tuple", "is": []},
        {1: 0, "1": 0, None: 0, (1,): 0, b"1": 0},
        collections.OrderedDict(b=1, a=2),
        range(10, 0, -3),
        slice(None, 3),
    ],
    ids=lambda value: type(value).__name__,
)
def test_hard_values_come_back_exactly(value: Any) -> None:
    assert exact(decode(encode(value, "here"))) == exact(value)


@pytest.mark.parametrize(
    "value",
    [
        numpy.float64(1.5),
        numpy.float32("nan"),
        numpy.bool_(True),
        numpy.int64(-3),
        numpy.datetime64("2026-01-01T00:00", "s"),
        numpy.arange(6, dtype=">i4").reshape(2, 3),
        numpy.asfortranarray(numpy.arange(6.0).reshape(2, 3)),
        numpy.array(7, numpy.uint8),
        numpy.zeros((0, 3), numpy.complex64),
        numpy.frombuffer(bytes.fromhex("010000000000f87f"), numpy.float64),  # a NaN with payload
        numpy.random.RandomState(1).get_state(),
    ],
    ids=lambda value: type(value).__name__,
)
def test_numpy_comes_back_exactly(value: Any) -> None:
    assert exact(decode(encode(value, "here"))) == exact(value)


def test_a_decoded_array_can_be_written_to() -> None:
    array = decode(encode(numpy.arange(3), "here"))
    array[0] = 9
    assert array.tolist() == [9, 1, 2]


class Colour(enum.IntEnum):
    RED = 1


class Name(str):
    __slots__ = ()


class Point(NamedTuple):
    x: int


@dataclasses.dataclass
class Thing:
    x: int


@pytest.mark.parametrize(
    "value",
    [
        Colour.RED,
        Name("a"),
        Point(1),
        Thing(1),
        object(),
        len,
        int,
        collections.defaultdict(int),
        collections.Counter(),
        numpy.array([object()]),
        numpy.array(["text"]),
        numpy.zeros(2, [("a", "i4")]),
        numpy.longlong(1),
        memoryview(b""),
    ],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize("wrap", [lambda v: v, lambda v: [v], lambda v: {"a": (v,)}])
def test_other_types_are_refused_by_path_and_type(value: Any, wrap: Any) -> None:
    with pytest.raises(NotCapturable) as caught:
        encode(wrap(value), "loader/state")
    assert caught.value.path == "loader/state"
    assert caught.value.type_name.endswith(type(value).__name__)


@pytest.mark.parametrize("key", [Colour.RED, Name("a"), Point(1), len], ids=repr)
def test_other_types_are_refused_as_keys(key: Any) -> None:
    with pytest.raises(NotCapturable):
        encode({key: 1}, "here")


def nested(levels: int) -> Any:
    value: Any = 1
    for level in range(levels):
        value = {level: value} if level % 2 else [value]
    return value


def test_nesting_is_bounded() -> None:
    assert decode(encode(nested(MAX_DEPTH), "here")) == nested(MAX_DEPTH)
    with pytest.raises(NotCapturable, match="deeper than"):
        encode(nested(MAX_DEPTH + 1), "here")


def test_a_cycle_is_an_error() -> None:
    cycle: list[Any] = []
    cycle += [cycle, {"again": cycle}]
    with pytest.raises(NotCapturable, match="inside itself"):
        encode(cycle, "here")


def test_a_value_that_grows_by_sharing_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("everstep.snapshot.values.MAX_ITEMS", 1000)
    value: Any = 1
    for _ in range(40):
        value = [value, value]
    with pytest.raises(NotCapturable, match="more than 1000 items"):
        encode(value, "here")


class Size(tuple[int, ...]):
    pass


def to_json(value: object) -> Any:
    return ("test.Size", (list(value), b"x")) if type(value) is Size else NotImplemented


def from_json(tag: str, payload: Any) -> object:
    return Size(payload[0]) if tag == "test.Size" else NotImplemented


def test_a_hook_adds_types() -> None:
    value = {"a": [Size((1, 2))], Size((3,)): 0}
    back = decode(encode(value, "here", hook=to_json), hook=from_json)
    assert back == value
    assert type(back["a"][0]) is Size
    with pytest.raises(NotCapturable):
        encode(Thing(1), "here", hook=to_json)
    with pytest.raises(FormatInvalid, match=r"test\.Size"):
        decode(encode(value, "here", hook=to_json))
    with pytest.raises(FormatInvalid):
        decode('{"~":"test.Size","is":[]}', hook=from_json)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "nul",
        "1 2",
        "NaN",
        "-Infinity",
        "1e999",
        "1" * 5000,
        '{"a":1,"a":2}',
        '{"~":"tuple"}',
        '{"is":[],"~":"tuple"}',
        '{"~":"tuple","is":[],"x":1}',
        '{"~":"tuple","is":3}',
        '{"~":["tuple"],"is":3}',
        '{"~":"pickle","is":"gASVAA=="}',
        '{"~":"int","is":"1_0"}',
        '{"~":"float","is":"1.0"}',
        '{"~":"complex","is":[1,2]}',
        '{"~":"bytes","is":"?"}',
        '{"~":"str","is":"/w=="}',
        '{"~":"set","is":[1,1]}',
        '{"~":"set","is":[[]]}',
        '{"~":"dict","is":[[1,2],[1,3]]}',
        '{"~":"dict","is":[[1]]}',
        '{"~":"dict","is":[[[],1]]}',
        '{"~":"range","is":[0,1,0]}',
        '{"~":"slice","is":[0,1]}',
        '{"~":"ndarray","is":["|O",[1],"AAAAAAAAAAA="]}',
        '{"~":"ndarray","is":["<f8",[2],"AAAAAAAAAAA="]}',
        '{"~":"ndarray","is":["<f8",[-1],"AAAAAAAAAAA="]}',
        '{"~":"ndarray","is":["<f8",[4611686018427387904,0,9],""]}',
        '{"~":"ndarray","is":["<M8[nonsense]",[1],"AAAAAAAAAAA="]}',
        '{"~":"numpy","is":["<f8",[1],"AAAAAAAAAAA="]}',
        "[" * 100_000,
        '{"a":' * 100_000,
    ],
    ids=lambda text: text[:30],
)
def test_malformed_text_is_format_invalid(text: str) -> None:
    with pytest.raises(FormatInvalid) as caught:
        decode(text, where="record of rank 3")
    assert caught.value.where == "record of rank 3"


json_like = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(max_size=3), inner, max_size=3)
        | st.builds(
            lambda tag, payload: {"~": tag, "is": payload},
            st.sampled_from(
                "int float complex str bytes bytearray tuple set frozenset dict ordered range "
                "slice ndarray numpy test.Size".split()
            ),
            inner
            | st.tuples(
                st.sampled_from(["<f8", "<M8[s]", "|b1", ">c16", "<f12"]),
                st.lists(st.integers(-1, 3)),
                st.sampled_from(["", "AAAAAAAAAAA=", "AA=="]),
            ),
        )
    ),
    max_leaves=12,
)


@thorough
@given(json_like)
def test_odd_json_raises_nothing_but_format_invalid(value: Any) -> None:
    import json

    try:
        decode(json.dumps(value), hook=from_json)
    except FormatInvalid:
        pass


@thorough
@given(st.text(max_size=80))
def test_noise_raises_nothing_but_format_invalid(text: str) -> None:
    try:
        decode(text)
    except FormatInvalid:
        pass


def test_equal_sets_give_equal_text() -> None:
    # In a set of this size 0 and 8 collide, so that it iterates in the order of insertion.
    assert list({0, 8}) != list({8, 0})
    assert encode({0, 8}, "here") == encode({8, 0}, "here")


def test_a_large_plain_value_is_quick() -> None:
    groups = [{"lr": 1e-3, "betas": [0.9, 0.99], "params": list(range(20))} for _ in range(500)]
    fastest_s = math.inf
    for _ in range(5):
        begin_s = time.perf_counter()
        encode(groups, "here")
        fastest_s = min(fastest_s, time.perf_counter() - begin_s)
    assert fastest_s < 0.1  # 7 ms when measured; guards against something quadratic
