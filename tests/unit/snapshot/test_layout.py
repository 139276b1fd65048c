import json
import math
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from everstep.proto import state_pb2
from everstep.proto.envelope import open_envelope, seal
from everstep.proto.errors import FormatInvalid, NotCapturable
from everstep.snapshot.layout import (
    Block,
    Layout,
    LeafSpec,
    Part,
    decode,
    element_bytes,
    encode,
    knows,
    pack,
)

thorough = settings(max_examples=100)
DTYPES = sorted(
    name for name in dir(torch) if isinstance(getattr(torch, name), torch.dtype) and knows(name)
)
PART = Part("model", "module", "torch.nn.Linear")


def whole(name: str, dtype: str, *shape: int) -> LeafSpec:
    return LeafSpec(name, dtype, shape, 0, math.prod(shape) * element_bytes(dtype))


def image_of(layout: Layout, seed: int = 0) -> bytes:
    data_bytes = layout.image_bytes - len(layout.header)
    return layout.header + random.Random(seed).randbytes(data_bytes)


@st.composite
def specs(draw: st.DrawFn) -> LeafSpec:
    dtype = draw(st.sampled_from(DTYPES))
    shape = tuple(draw(st.lists(st.integers(0, 5), max_size=4)))
    count, element = math.prod(shape), element_bytes(dtype)
    replicated = draw(st.booleans())
    start = draw(st.integers(0, count)) if replicated else 0
    stop = draw(st.integers(start, count)) if replicated else count
    name, group = draw(st.text(max_size=6)), draw(st.integers(0, 2**32 - 1)) if replicated else 0
    return LeafSpec(name, dtype, shape, start * element, stop * element, replicated, group=group)


spec_lists = st.lists(specs(), max_size=12, unique_by=lambda spec: spec.name)


def test_every_float_complex_integer_and_bool_type_of_torch_can_be_stored() -> None:
    spare = ("quint", "qint", "bits", "uint1", "uint2", "uint3", "uint4", "uint5", "uint6", "uint7")
    unknown = set()
    for dtype in vars(torch).values():
        if isinstance(dtype, torch.dtype):
            name = str(dtype).removeprefix("torch.")
            if knows(name):
                assert element_bytes(name) == dtype.itemsize
            elif not name.startswith(spare) or name == "uint16":
                unknown.add(name)
    assert unknown <= {f"int{bits}" for bits in range(1, 8)}


@thorough
@given(spec_lists)
def test_leaves_fill_the_image_aligned_and_without_gaps(specs: list[LeafSpec]) -> None:
    layout = pack([PART], specs, {}, {})
    assert [leaf.name for leaf in layout.leaves] == [spec.name for spec in specs]
    assert [leaf.group for leaf in layout.leaves] == [spec.group for spec in specs]
    assert len(layout.header) % 4096 == 0
    end = len(layout.header)
    for leaf in sorted(layout.leaves, key=lambda leaf: (leaf.offset, leaf.held_bytes)):
        assert leaf.offset == end
        assert leaf.offset % element_bytes(leaf.dtype) == 0
        end += leaf.held_bytes
    assert end == layout.image_bytes


def test_the_order_in_the_image() -> None:
    layout = pack(
        [],
        [
            whole("b", "float32", 2),
            whole("flag", "bool", 1000),
            whole("a", "float32", 2),
            whole("half", "float16", 500),
            whole("c", "float32", 3),
            whole("wide", "int64", 1),
        ],
        {},
        {},
    )
    in_image = [leaf.name for leaf in sorted(layout.leaves, key=lambda leaf: leaf.offset)]
    assert in_image == ["wide", "c", "a", "b", "half", "flag"]


@thorough
@given(spec_lists, st.randoms())
def test_places_do_not_depend_on_the_order_given(
    specs: list[LeafSpec], chance: random.Random
) -> None:
    layout = pack([], specs, {}, {})
    shuffled = list(specs)
    chance.shuffle(shuffled)
    other = pack([], shuffled, {}, {})
    assert other.header == layout.header
    assert set(other.leaves) == set(layout.leaves)


@thorough
@given(spec_lists)
def test_a_layout_comes_back_from_its_bytes(specs: list[LeafSpec]) -> None:
    aliases = {f"{specs[0].name} tied": specs[0].name} if specs else {}
    containers = {"model": "ordered", "": "dict:0,3"}
    parts = [PART, Part("loader", "stateful", "x.Loader", per_rank=True)]
    layout = pack(parts, specs, aliases, containers)
    assert decode(encode(layout), "here") == layout
    assert decode(memoryview(encode(layout, repairable=True)), "here") == layout


def test_the_id_follows_from_the_content() -> None:
    specs = [whole("a", "float32", 2), whole("b", "float32", 2)]
    layout = pack([PART], specs, {}, {})
    assert len(bytes.fromhex(layout.layout_id)) == 16
    assert pack([PART], specs, {}, {}).layout_id == layout.layout_id
    others = [
        pack([], specs, {}, {}),
        pack([PART], specs[::-1], {}, {}),
        pack([PART], specs, {"c": "a"}, {}),
        pack([PART], specs, {}, {"x": "list"}),
        pack([PART], [specs[0], whole("b", "int32", 2)], {}, {}),
    ]
    assert len({layout.layout_id, *(other.layout_id for other in others)}) == 6


@thorough
@given(spec_lists)
def test_safetensors_opens_the_image_and_finds_the_same_bytes(
    specs: list[LeafSpec],
) -> None:
    layout = pack([PART], specs, {}, {})
    image = image_of(layout)
    found = safetensors.deserialize(image)
    listed = sorted(bytes(entry["data"]) for _, entry in found)
    expected = sorted(
        image[leaf.offset : leaf.offset + leaf.held_bytes]
        for leaf in layout.leaves
        if leaf.held_bytes or not leaf.whole_bytes
    )
    assert listed == expected


@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_reads_each_type_from_the_image(tmp_path: Path, dtype: str) -> None:
    layout = pack([], [whole("group/a.weight", dtype, 3, 4), whole("one", "float64", 9)], {}, {})
    path = tmp_path / "shard.safetensors"
    image = image_of(layout)
    path.write_bytes(image)
    with safetensors.safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt", "everstep": "1"}
        tensor = file.get_tensor("group/a.weight")
    assert tensor.shape[:2] == (3, 4)
    leaf = layout.leaves[0]
    expected = image[leaf.offset : leaf.offset + leaf.held_bytes]
    assert tensor.contiguous().view(torch.uint8).numpy().tobytes() == expected


def test_names_and_shapes_in_the_header() -> None:
    layout = pack(
        [],
        [
            whole("scalar", "float32"),
            whole("none", "float32", 0, 3),
            whole("pair", "complex64", 2),
            whole("__metadata__", "uint8", 1),
            whole("cut[2:5]", "uint8", 1),
            LeafSpec("cut", "float32", (10, 10), 8, 20, True),
            LeafSpec("elsewhere", "float32", (10,), 40, 40, True),
            LeafSpec("all", "float32", (2, 2), 0, 16, True),
        ],
        {},
        {},
    )
    header = json.loads(layout.header[8:])
    assert header.pop("__metadata__") == {"format": "pt", "everstep": "1"}
    assert {name: (entry["dtype"], entry["shape"]) for name, entry in header.items()} == {
        "scalar": ("F32", []),
        "none": ("F32", [0, 3]),
        "pair": ("F32", [2, 2]),
        "__metadata__~": ("U8", [1]),
        "cut[2:5]": ("F32", [3]),
        "cut[2:5]~": ("U8", [1]),
        "all": ("F32", [2, 2]),
    }


def test_a_state_without_tensors_has_an_image_too() -> None:
    layout = pack([PART], [], {}, {})
    assert layout.image_bytes == len(layout.header) == 4096
    assert decode(encode(layout), "here") == layout
    assert safetensors.deserialize(layout.header) == []


def test_a_type_that_cannot_be_stored_is_refused_by_name() -> None:
    with pytest.raises(NotCapturable) as caught:
        pack([], [LeafSpec("a/b", "qint8", (1,), 0, 1)], {}, {})
    assert caught.value.path == "a/b"


@pytest.mark.parametrize(
    ("specs", "aliases"),
    [
        ([whole("a", "int8", 1), whole("a", "int8", 2)], {}),
        ([whole("a", "int8", 1)], {"b": "c"}),
        ([whole("a", "int8", 1)], {"a": "a"}),
        ([LeafSpec("a", "float32", (4,), 2, 8, True)], {}),
        ([LeafSpec("a", "float32", (4,), 0, 20, True)], {}),
        ([LeafSpec("a", "float32", (4,), 8, 4, True)], {}),
        ([LeafSpec("a", "float32", (4,), 0, 8, False)], {}),
        ([LeafSpec("a", "float32", (-1,), 0, 0)], {}),
        ([LeafSpec("a", "float32", (1 << 40, 1 << 40, 0), 0, 0)], {}),
        ([LeafSpec("a", "float32", (1,) * 65, 0, 4)], {}),
        ([whole("a", "float64", 1 << 46)], {}),
    ],
)
def test_contradictory_arguments_are_refused(
    specs: list[LeafSpec], aliases: dict[str, str]
) -> None:
    with pytest.raises(FormatInvalid):
        pack([], specs, aliases, {})


def message_of() -> state_pb2.Layout:
    specs = [
        whole("a", "float32", 4),
        whole("b", "float16", 4),
        LeafSpec("c", "int8", (100,), 8, 16, True),
    ]
    layout = pack([PART], specs, {"tied": "a"}, {"x": "list"})
    message = state_pb2.Layout()
    message.ParseFromString(open_envelope("layout", encode(layout), "here"))
    return message


def sealed(message: state_pb2.Layout) -> bytes:
    return seal("layout", message.SerializeToString(deterministic=True))


def swap_places(message: state_pb2.Layout) -> None:
    a, c = message.leaves[0], message.leaves[2]
    a.offset, c.offset = c.offset, a.offset


def shift_all(message: state_pb2.Layout, by: int) -> None:
    for leaf in message.leaves:
        leaf.offset += by
    message.image_bytes += by


@pytest.mark.parametrize(
    "damage",
    [
        lambda m: m.leaves[0].shape.append(2),
        lambda m: setattr(m.leaves[0], "dtype", "float64"),
        lambda m: setattr(m.leaves[0], "dtype", "float128"),
        lambda m: setattr(m.leaves[0], "dtype", ""),
        lambda m: setattr(m.leaves[0], "stop", 12),
        lambda m: setattr(m.leaves[0], "offset", 0),
        lambda m: setattr(m.leaves[1], "offset", m.leaves[0].offset),
        lambda m: setattr(m.leaves[1], "offset", m.leaves[1].offset + 2),
        lambda m: setattr(m.leaves[1], "offset", 1 << 63),
        lambda m: setattr(m.leaves[2], "replicated", False),
        lambda m: setattr(m.leaves[0], "group", 1),
        lambda m: setattr(m.leaves[2], "start", 1 << 63),
        lambda m: setattr(m.leaves[1], "name", "a"),
        lambda m: setattr(m.leaves[1], "name", "tied"),
        lambda m: m.leaves.append(m.leaves[0]),
        lambda m: m.leaves.pop(),
        lambda m: m.leaves[0].shape.extend([1] * 70),
        lambda m: setattr(m, "image_bytes", m.image_bytes + 1),
        lambda m: setattr(m, "image_bytes", 0),
        lambda m: setattr(m.aliases[0], "of", "z"),
        lambda m: m.aliases.append(m.aliases[0]),
        lambda m: m.containers.append(m.containers[0]),
        lambda m: m.parts.append(m.parts[0]),
        lambda m: setattr(m.parts[0], "kind", "pickle"),
        swap_places,
        lambda m: shift_all(m, -4096),
        lambda m: shift_all(m, 8),
        lambda m: shift_all(m, 1 << 40),
    ],
)
def test_a_layout_that_contradicts_itself_is_refused(
    damage: Callable[[state_pb2.Layout], object],
) -> None:
    message = message_of()
    decode(sealed(message), "here")
    damage(message)
    with pytest.raises(FormatInvalid) as caught:
        decode(sealed(message), "this shard")
    assert caught.value.where == "this shard"


def test_an_older_writers_longer_header_is_accepted() -> None:
    message = message_of()
    shift_all(message, 4096)
    layout = decode(sealed(message), "here")
    assert len(layout.header) == 8192
    assert [name for name, _ in safetensors.deserialize(image_of(layout))]


numbers = st.integers(0, 2**64 - 1) | st.integers(0, 5000) | st.sampled_from([4096, 4100, 8192])
leaf_messages = st.builds(
    state_pb2.Leaf,
    name=st.sampled_from(["a", "b", "a[0:1]", "__metadata__"]),
    dtype=st.sampled_from(["float32", "int8", "complex128", "?"]),
    shape=st.lists(numbers, max_size=3),
    offset=numbers,
    start=numbers,
    stop=numbers,
    replicated=st.booleans(),
)


@thorough
@given(st.lists(leaf_messages, max_size=3), numbers)
def test_odd_layouts_raise_nothing_but_format_invalid(
    leaves: list[state_pb2.Leaf], image_bytes: int
) -> None:
    try:
        decode(sealed(state_pb2.Layout(leaves=leaves, image_bytes=image_bytes)), "here")
    except FormatInvalid:
        pass


@thorough
@given(st.binary(max_size=200), st.booleans())
def test_noise_raises_nothing_but_format_invalid(noise: bytes, in_envelope: bool) -> None:
    data = seal("layout", noise) if in_envelope else noise
    try:
        decode(data, "here")
    except FormatInvalid:
        pass


def blocked(box: tuple[int, ...], whole: tuple[int, ...], at: tuple[int, ...]) -> LeafSpec:
    size = math.prod(box) * 4
    return LeafSpec("model/w", "float32", box, 0, size, False, Block("model/w", whole, at))


def test_blocks_travel_with_their_leaves() -> None:
    spec = blocked((2, 3), (5, 9), (3, 6))
    found = decode(encode(pack([PART], [spec], {}, {})), "test").leaves[0]
    assert found.block == spec.block
    assert (found.tensor, found.global_shape, found.block_offset) == ("model/w", (5, 9), (3, 6))


@pytest.mark.parametrize(
    ("spec", "what"),
    [
        (blocked((2, 3), (5, 9), (4, 0)), "outside of"),
        (blocked((2, 3), (5,), (0,)), "dimensions"),
        (blocked((2, 3), (5, 9), (0,)), "dimensions"),
        (blocked((1, 1), (1 << 40, 1 << 40), (0, 0)), "impossible shape"),
        (replace(blocked((2,), (4,), (0,)), block=Block("", (4,), (0,))), "without a name"),
    ],
)
def test_impossible_blocks_are_refused(spec: LeafSpec, what: str) -> None:
    with pytest.raises(FormatInvalid, match=what):
        pack([PART], [spec], {}, {})
