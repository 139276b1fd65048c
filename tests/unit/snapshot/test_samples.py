"""Drift of replicas is found group by group, and by the exact leaves; no bytes do any harm."""

import random
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from everstep.snapshot import samples
from everstep.snapshot.samples import GROUP_OF_ALL, Group, drifted, encode, group_id_of, leaf_of

PLAN, OTHER_PLAN = b"planplan", b"otherpla"
A, B, C = b"a" * 8, b"b" * 8, b"c" * 8


def group(number: int, *leaves: bytes, plan: bytes = PLAN) -> Group:
    return Group(number, plan, b"".join(leaves))


def said(*groups: Group) -> bytes:
    return encode(groups)


def key(number: int, index: int) -> int:
    return number << 32 | index


def test_the_bytes_are_as_described() -> None:
    found = said(Group(0x01020304, PLAN, A + B))
    assert found == b"\x01\x02\x03\x04" + b"\0\0\0\x02" + PLAN + A + B
    assert said(group(7, A), group(2)) == said(group(2)) + said(group(7, A))
    assert said() == b""


def test_leaves_are_compared_one_by_one() -> None:
    assert drifted([said(group(5, A, A, B)), said(group(5, A, B, B)), said(group(5, A, A, A))]) == (
        key(5, 1),
        key(5, 2),
    )
    assert drifted([said(group(5, A, B))] * 3) == ()
    assert drifted([]) == ()


def test_a_difference_cannot_cancel_another_one() -> None:
    assert drifted([said(group(1, A)), said(group(1, B)), said(group(1, C))]) == (key(1, 0),)
    ones, zeros = b"\xff" * 8, bytes(8)
    assert drifted([said(group(1, ones)), said(group(1, zeros))]) == (key(1, 0),)
    assert drifted([said(group(1, A, zeros)), said(group(1, A, zeros[:7] + b"\1"))]) == (key(1, 1),)


def test_a_group_concerns_only_those_who_name_it() -> None:
    assert drifted([said(group(1, A)), said(group(2, B)), said(group(3, C, plan=OTHER_PLAN))]) == ()
    shards = [
        said(group(1, A), group(8, C)),
        said(group(1, A), group(9, A, A)),
        said(group(2, B), group(8, B)),
        said(group(2, B), group(9, A, C)),
    ]
    assert drifted(shards) == (key(8, 0), key(9, 1))
    assert leaf_of(key(9, 1)) == (9, 1)


def test_groups_that_disagree_on_what_is_replicated() -> None:
    assert drifted([said(group(1, A)), said(group(1, A, plan=OTHER_PLAN))]) is None
    assert drifted([said(group(1, A)), said(group(1, A, A))]) is None
    assert drifted([said(group(1, A)), said(group(1))]) is None
    sound = [said(group(1, A)), said(group(1, B))]
    assert drifted([*sound, said(group(2)), said(group(2, plan=OTHER_PLAN))]) is None


def test_every_shard_belongs_to_the_group_of_all() -> None:
    everywhere = said(group(GROUP_OF_ALL, A))
    assert drifted([everywhere, said()]) is None
    assert drifted([everywhere, said(group(4, A))]) is None
    assert drifted([everywhere, said(group(GROUP_OF_ALL, A), group(4, A))]) == ()
    assert drifted([said(group(GROUP_OF_ALL)), said(), said(group(4, A))]) == ()
    other = said(group(GROUP_OF_ALL, plan=OTHER_PLAN))
    assert drifted([said(group(GROUP_OF_ALL)), said(), other]) is None


@pytest.mark.parametrize(
    "opaque",
    [
        PLAN,
        PLAN + A,
        PLAN + A + B,
        said(group(1, A))[:-1],
        said(group(1, A))[:-8],
        said(group(1, A)) + b"\0",
        said(group(1, A)) * 2,
        b"\0",
        b"\xff" * 16,
    ],
)
def test_bytes_of_other_forms_are_equal_or_disagree(opaque: bytes) -> None:
    assert drifted([opaque, opaque]) == ()
    assert drifted([opaque, opaque + A]) is None
    assert drifted([opaque, said(group(1, A))]) is None
    assert drifted([opaque, said()]) is None


def test_the_id_of_a_group_is_the_same_everywhere() -> None:
    assert group_id_of(()) == GROUP_OF_ALL
    assert group_id_of((0, 4, 8)) == 0xD30799A8
    assert group_id_of([0, 4, 8]) == group_id_of((0, 4, 8))
    rows = [tuple(range(at, at + 8)) for at in range(0, 4096, 8)]
    columns = [tuple(range(at, 4096, 8)) for at in range(8)]
    found = {group_id_of(ranks) for ranks in rows + columns}
    assert len(found) == len(rows) + len(columns)
    assert all(0 < number < 1 << 32 for number in found)


def test_no_more_leaves_are_named_than_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "MAXIMUM_DRIFTED", 3)
    one = [group(1, A, A), group(2, A, A)]
    assert drifted([said(*one), said(group(1, B, B), group(2, B, B))]) == (
        key(1, 0),
        key(1, 1),
        key(2, 0),
    )


@given(st.lists(st.binary(max_size=80), max_size=5))
def test_no_bytes_raise(shards: list[bytes]) -> None:
    found = drifted(shards)
    assert found == () if len(set(shards)) <= 1 else found is None or isinstance(found, tuple)


@given(st.data())
def test_what_was_changed_is_what_is_named(data: st.DataObject) -> None:
    """Some ranks in some groups, and some samples of theirs flipped: exactly these leaves."""
    sizes = data.draw(st.dictionaries(st.integers(1, 9), st.integers(0, 6), max_size=4))
    whole = {number: bytes(8 * count) for number, count in sizes.items()}
    numbers = st.sampled_from(sorted(sizes)) if sizes else st.nothing()
    members = data.draw(st.lists(st.sets(numbers), min_size=1, max_size=5))
    held = [{number: bytearray(whole[number]) for number in ranks} for ranks in members]
    expected = set()
    places = [(r, n, i) for r, ranks in enumerate(members) for n in ranks for i in range(sizes[n])]
    for rank, number, index in data.draw(
        st.lists(st.sampled_from(places) if places else st.nothing(), unique=True)
    ):
        held[rank][number][8 * index + data.draw(st.integers(0, 7))] = rank + 1
        if sum(number in ranks for ranks in members) > 1:
            expected.add(key(number, index))
    shards = [
        encode([Group(number, PLAN, bytes(body)) for number, body in ranks.items()])
        for ranks in held
    ]
    assert drifted(shards) == tuple(sorted(expected))


def test_many_ranks_with_many_leaves_are_compared_quickly() -> None:
    """512 shards in 64 groups, no two of them equal."""
    random_bytes = random.Random(1).randbytes
    bodies = [random_bytes(8 * 4999) for _ in range(64)]
    shards = [
        said(Group(1 + rank % 64, PLAN, bodies[rank % 64] + rank.to_bytes(8, "big")))
        for rank in range(512)
    ]
    begin = time.process_time()
    found = drifted(shards)
    assert time.process_time() - begin < 1.0
    assert found == tuple(key(1 + number, 4999) for number in range(64))
