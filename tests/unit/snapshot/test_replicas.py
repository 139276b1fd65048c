import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from everstep.proto.errors import FormatInvalid
from everstep.snapshot.replicas import divide, gather, share

thorough = settings(max_examples=150)
KIB = 1024
sizes = st.one_of(
    st.integers(0, 300),
    st.integers(0, 300_000).map(lambda count: count * 16),
    st.sampled_from([64 * KIB - 4, 64 * KIB, 64 * KIB + 4, 4096, 1 << 24]),
)
leaf_lists = st.lists(st.tuples(sizes, st.sampled_from([1, 2, 4])), max_size=12).map(
    lambda items: [
        (f"leaf{index}", size * element, element) for index, (size, element) in enumerate(items)
    ]
)


@thorough
@given(leaf_lists, st.integers(1, 9))
def test_every_byte_is_held_once_and_cuts_are_allowed(
    leaves: list[tuple[str, int, int]], world: int
) -> None:
    shares = divide(leaves, world)
    assert len(shares) == world
    for name, nbytes, element_bytes in leaves:
        held = [ranges[name] for ranges in shares if ranges[name] != (0, 0)]
        edges = [0, *(stop for _, stop in held)]
        assert held == list(itertools.pairwise(edges))
        assert edges[-1] == nbytes
        for cut in edges[1:-1]:
            assert cut % 4096 == 0
            assert cut % element_bytes == 0
        if nbytes < 64 * KIB:
            assert len(held) <= 1


@thorough
@given(leaf_lists, st.integers(1, 9))
def test_shares_are_balanced(leaves: list[tuple[str, int, int]], world: int) -> None:
    mean = sum(nbytes for _, nbytes, _ in leaves) / world
    end = 0
    for rank, ranges in enumerate(divide(leaves, world)):
        share_bytes = sum(stop - start for start, stop in ranges.values())
        assert abs(share_bytes - mean) <= 64 * KIB
        end += share_bytes
        assert abs(end - mean * (rank + 1)) <= 32 * KIB + 1  # the nearest place to cut


def test_one_rank_alone_gets_the_same_answer() -> None:
    leaves = [("a", 1 << 20, 4), ("b", 8, 8), ("c", 3 << 20, 2)]
    assert [share(leaves, rank, 5) for rank in range(5)] == divide(leaves, 5)


def test_a_division_in_numbers() -> None:
    leaves = [("a", 256 * KIB, 4), ("b", 60 * KIB, 2), ("c", 0, 4)]
    assert divide(leaves, 2) == [
        {"a": (0, 160 * KIB), "b": (0, 0), "c": (0, 0)},
        {"a": (160 * KIB, 256 * KIB), "b": (0, 60 * KIB), "c": (0, 0)},
    ]


@thorough
@given(leaf_lists, st.integers(1, 9), st.integers(0, 8) | st.none())
def test_what_was_divided_can_be_gathered(
    leaves: list[tuple[str, int, int]], world: int, own_rank: int | None
) -> None:
    shares = divide(leaves, world)
    for name, nbytes, _ in leaves:
        holders = {rank: [ranges[name]] for rank, ranges in enumerate(shares)}
        pieces = gather(name, nbytes, holders, own_rank)
        assert pieces == [
            (rank, *ranges[name]) for rank, ranges in enumerate(shares) if ranges[name] != (0, 0)
        ]


WHOLE = 40
ranges = st.tuples(st.integers(0, WHOLE), st.integers(0, WHOLE)).map(lambda pair: sorted(pair))
holder_maps = st.dictionaries(
    st.integers(0, 5), st.lists(ranges.map(lambda pair: (pair[0], pair[1])), max_size=4)
)


@settings(max_examples=500)
@given(holder_maps, st.integers(0, 5) | st.none())
def test_gathering_covers_the_whole_once_or_names_the_gaps(
    holders: dict[int, list[tuple[int, int]]], own_rank: int | None
) -> None:
    held = {
        rank: {byte for start, stop in held for byte in range(start, stop)}
        for rank, held in holders.items()
    }
    missing = sorted(set(range(WHOLE)) - set().union(*held.values()))
    if missing:
        with pytest.raises(FormatInvalid, match="no rank holds") as caught:
            gather("leaf", WHOLE, holders, own_rank)
        assert f"bytes {missing[0]} to" in str(caught.value)
        assert f"to {missing[-1] + 1}" in str(caught.value)
        return
    own = held.get(own_rank, set()) if own_rank is not None else set()
    position = 0
    for rank, start, stop in gather("leaf", WHOLE, holders, own_rank):
        assert start == position < stop
        assert set(range(start, stop)) <= held[rank]
        if rank != own_rank:
            assert not own & set(range(start, stop))
        position = stop
    assert position == WHOLE


def test_the_rank_itself_is_preferred() -> None:
    holders = {0: [(0, 100)], 1: [(20, 30), (40, 50)], 2: [(0, 100)]}
    assert gather("leaf", 100, holders, own_rank=1) == [
        (0, 0, 20),
        (1, 20, 30),
        (0, 30, 40),
        (1, 40, 50),
        (0, 50, 100),
    ]
    assert gather("leaf", 100, holders, own_rank=2) == [(2, 0, 100)]


def test_a_leaf_without_bytes_needs_nobody() -> None:
    assert gather("leaf", 0, {}) == []
    assert gather("leaf", 0, {0: [(0, 0)]}, own_rank=0) == []


@pytest.mark.parametrize("claim", [(-1, 5), (5, 4), (0, 11)])
def test_an_impossible_range_is_refused(claim: tuple[int, int]) -> None:
    with pytest.raises(FormatInvalid, match="rank 3 claims"):
        gather("leaf", 10, {0: [(0, 10)], 3: [claim]})


def test_several_gaps_are_all_named() -> None:
    with pytest.raises(FormatInvalid, match="bytes 0 to 10, 20 to 30, 90 to 100"):
        gather("leaf", 100, {0: [(10, 20)], 1: [(30, 90)]}, own_rank=1)
