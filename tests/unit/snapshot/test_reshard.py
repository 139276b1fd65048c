"""Against a reference that moves one element at a time."""

import itertools
import math
import random
from collections.abc import Iterator

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from everstep.proto.errors import FormatInvalid
from everstep.snapshot.layout import Block, Layout, LeafSpec, Part, pack
from everstep.snapshot.replicas import share
from everstep.snapshot.reshard import Box, Holdings, runs

NAME = "model/w"
PART = Part("model", "module", "torch.nn.Linear")
thorough = settings(max_examples=300, deadline=None)


def elements(box: Box) -> Iterator[tuple[int, ...]]:
    """All indices in a box, row by row."""
    return itertools.product(
        *(range(at, at + n) for at, n in zip(box.offset, box.shape, strict=True))
    )


@st.composite
def cuts(draw: st.DrawFn, length: int) -> list[tuple[int, int]]:
    """A dimension in pieces, of which some may be empty."""
    at = sorted(draw(st.lists(st.integers(0, length), max_size=3)))
    return [(a, b) for a, b in itertools.pairwise([0, *at, length])]


@st.composite
def grids(draw: st.DrawFn) -> tuple[tuple[int, ...], list[Box]]:
    shape = tuple(draw(st.lists(st.integers(0, 5), max_size=3)))
    along = [draw(cuts(length)) for length in shape]
    boxes = [
        Box(tuple(a for a, _ in pairs), tuple(b - a for a, b in pairs))
        for pairs in itertools.product(*along)
    ]
    return shape, boxes


@st.composite
def parts(draw: st.DrawFn, shape: tuple[int, ...]) -> Box:
    offset, lengths = [], []
    for length in shape:
        begin = draw(st.integers(0, length))
        offset.append(begin)
        lengths.append(draw(st.integers(0, length - begin)))
    return Box(tuple(offset), tuple(lengths))


def spec(box: Box, shape: tuple[int, ...], held: tuple[int, int], *, shared: bool) -> LeafSpec:
    return LeafSpec(NAME, "float32", box.shape, *held, shared, Block(NAME, shape, box.offset))


def world_of(
    shape: tuple[int, ...], boxes: list[Box], replicas: int
) -> tuple[dict[int, Layout], dict[int, bytes]]:
    """Every box on `replicas` ranks, each of which holds its share; and the ranks' images."""
    numbers = numpy.arange(math.prod(shape), dtype=numpy.float32).reshape(shape)
    layouts, images = {}, {}
    for rank, (box, replica) in enumerate(itertools.product(boxes, range(replicas))):
        size = box.elements * 4
        held = share([(NAME, size, 4)], replica, replicas)[NAME] if replicas > 1 else (0, size)
        layout = layouts[rank] = pack([PART], [spec(box, shape, held, shared=replicas > 1)], {}, {})
        where = tuple(slice(a, a + n) for a, n in zip(box.offset, box.shape, strict=True))
        data = numbers[where].tobytes()[held[0] : held[1]]
        images[rank] = layout.header + data
    return layouts, images


def read(holdings: Holdings, images: dict[int, bytes], wanted: Box, own_rank: int) -> bytes:
    target = bytearray(b"\xff" * (wanted.elements * 4))
    times = bytearray(len(target))
    for rank, rows in holdings.tensors[NAME].rows(wanted, own_rank).items():
        for at, offset, size in rows.tolist():
            target[at : at + size] = images[rank][offset : offset + size]
            for byte in range(at, at + size):
                times[byte] += 1
    assert set(times) <= {1}, "a byte was named twice, or not at all"
    return bytes(target)


@thorough
@given(grids(), st.integers(1, 3), st.data())
def test_any_box_is_read_from_any_grid(
    grid: tuple[tuple[int, ...], list[Box]], replicas: int, data: st.DataObject
) -> None:
    shape, boxes = grid
    layouts, images = world_of(shape, boxes, replicas)
    wanted = data.draw(parts(shape))
    own_rank = data.draw(st.integers(0, len(layouts)))
    holdings = Holdings(layouts)
    assert holdings.check([NAME]) == []
    expected = [
        float(sum(i * math.prod(shape[d + 1 :]) for d, i in enumerate(index)))
        for index in elements(wanted)
    ]
    found = read(holdings, images, wanted, own_rank)
    assert found == numpy.array(expected, dtype=numpy.float32).tobytes()


@thorough
@given(st.data())
def test_runs_are_as_long_as_they_can_be(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=3)))
    source, wanted = data.draw(parts(shape)), data.draw(parts(shape))
    rows = runs(source, wanted, 2).tolist()
    for before, after in itertools.pairwise(rows):
        assert after[1] >= before[1] + before[2]
        joined = after[1] == before[1] + before[2] and after[0] == before[0] + before[2]
        assert not joined or len(shape) > 1
    common = source.meet(wanted)
    assert sum(row[2] for row in rows) == (common.elements * 2 if common else 0)


def test_a_rank_reads_its_own_replica_first() -> None:
    boxes = [Box((0,), (64 << 10,))]
    layouts, _ = world_of((64 << 10,), boxes, 2)
    rows = Holdings(layouts).tensors[NAME].rows(boxes[0], 1)
    half = 128 << 10
    assert {rank: int(found[:, 2].sum()) for rank, found in rows.items()} == {0: half, 1: half}


def test_missing_bytes_are_named() -> None:
    layouts, _ = world_of((8,), [Box((0,), (4,)), Box((4,), (4,))], 1)
    del layouts[1]
    with pytest.raises(FormatInvalid, match=r"only 8 bytes are held"):
        Holdings(layouts).tensors[NAME].rows(Box((2,), (4,)), 0)


def test_contradictions_are_all_listed() -> None:
    def layout(name: str, box: Box, shape: tuple[int, ...], dtype: str = "float32") -> LeafSpec:
        size = box.elements * (4 if dtype == "float32" else 2)
        return LeafSpec(name, dtype, box.shape, 0, size, False, Block(name, shape, box.offset))

    first = [
        layout("model/a", Box((0,), (4,)), (8,)),
        layout("model/b", Box((0, 0), (4, 2)), (4, 4)),
        layout("model/c", Box((0,), (4,)), (8,)),
    ]
    second = [
        layout("model/a", Box((3,), (4,)), (8,)),
        layout("model/b", Box((0, 2), (4, 2)), (5, 4)),
        layout("model/c", Box((4,), (4,)), (8,), "bfloat16"),
    ]
    holdings = Holdings({0: pack([PART], first, {}, {}), 1: pack([PART], second, {}, {})})
    problems = "\n".join(holdings.check(["model/a", "model/b", "model/c"]))
    assert "model/a: blocks [0:4] and [3:7] overlap" in problems
    assert "model/b: ranks have it as float32[4, 4] and float32[5, 4]" in problems
    assert "model/c: ranks have it as bfloat16[8] and float32[8]" in problems


def test_states_of_their_own_are_never_merged() -> None:
    plain = LeafSpec(NAME, "float32", (4,), 0, 16)
    holdings = Holdings({rank: pack([PART], [plain], {}, {}) for rank in (0, 1)})
    tensor = holdings.tensors[NAME]
    assert tensor.is_divergent
    assert holdings.check([NAME]) == []
    assert set(tensor.rows(Box.whole((4,)), 1)) == {1}
    with pytest.raises(FormatInvalid, match="no block"):
        tensor.rows(Box.whole((4,)), 7)


def test_groups_with_states_of_their_own_are_never_merged() -> None:
    """Two stages with one name, each shared out among its replicas: 0 and 2, 1 and 3."""

    def half(second: bool, group: int) -> LeafSpec:
        return LeafSpec(NAME, "float32", (4,), 8 * second, 8 + 8 * second, True, group=group)

    halves = [half(False, 7), half(False, 9), half(True, 7), half(True, 9)]
    holdings = Holdings({r: pack([PART], [spec], {}, {}) for r, spec in enumerate(halves)})
    tensor = holdings.tensors[NAME]
    assert tensor.is_divergent
    assert holdings.check([NAME]) == []
    for rank in range(4):
        assert set(tensor.rows(Box.whole((4,)), rank)) == {rank, (rank + 2) % 4}
    same = [half(rank > 1, 7) for rank in range(4)]
    holdings = Holdings({r: pack([PART], [spec], {}, {}) for r, spec in enumerate(same)})
    assert not holdings.tensors[NAME].is_divergent


def test_one_rank_alone_holds_a_stage() -> None:
    plain = LeafSpec(NAME, "float32", (4,), 0, 16)
    other = LeafSpec("model/v", "float32", (2,), 0, 8)
    holdings = Holdings({0: pack([PART], [plain], {}, {}), 1: pack([PART], [other], {}, {})})
    assert not holdings.tensors[NAME].is_divergent
    assert set(holdings.tensors[NAME].rows(Box.whole((4,)), 1)) == {0}


def test_overlaps_are_found_in_any_number_of_blocks() -> None:
    generator = random.Random(1)
    for _ in range(200):
        boxes = [
            Box(
                (generator.randrange(8), generator.randrange(8)),
                (generator.randint(1, 3), generator.randint(1, 3)),
            )
            for _ in range(generator.randint(2, 5))
        ]
        boxes = list(dict.fromkeys(boxes))
        shape = (16, 16)
        layouts = {
            rank: pack([PART], [spec(box, shape, (0, box.elements * 4), shared=False)], {}, {})
            for rank, box in enumerate(boxes)
        }
        cells = [cell for box in boxes for cell in elements(box)]
        overlap = len(set(cells)) < len(cells)
        found = Holdings(layouts).check([NAME])
        assert any("overlap" in problem for problem in found) == overlap


def test_states_of_their_own_may_be_of_any_form() -> None:
    specs = [LeafSpec(NAME, "float32", (4 + rank,), 0, 4 * (4 + rank)) for rank in (0, 1)]
    holdings = Holdings({rank: pack([PART], [specs[rank]], {}, {}) for rank in (0, 1)})
    tensor = holdings.tensors[NAME]
    assert tensor.is_divergent
    assert holdings.check([NAME]) == []
    assert [tensor.of(rank).shape for rank in (0, 1)] == [(4,), (5,)]
    assert set(tensor.of(1).rows(Box.whole((5,)), 1)) == {1}
