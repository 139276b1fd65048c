"""Which snapshots may go."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from everstep.proto.errors import InvalidConfiguration
from everstep.proto.ids import SnapshotId
from everstep.storage.retention import Rule, expired


def ids(*pairs: tuple[int, int]) -> list[SnapshotId]:
    return [SnapshotId(*pair) for pair in pairs]


def test_keeps_the_newest_and_every_nth() -> None:
    have = ids(*((1, step) for step in range(10, 101, 10)))
    gone = [snapshot.step for snapshot, _ in expired(have, Rule(2, 30), set())]
    assert gone == [10, 20, 40, 50, 70, 80]


def test_a_repeated_step_is_superseded_and_does_not_count() -> None:
    have = ids((1, 10), (1, 20), (1, 30), (2, 20))
    assert expired(have, Rule(3, None), set()) == [
        (SnapshotId(1, 20), "superseded by step 20 (incarnation 2)")
    ]


def test_reasons_are_for_the_user() -> None:
    have = ids((1, 10), (1, 15), (1, 20))
    assert expired(have, Rule(1, 10), set()) == [
        (SnapshotId(1, 15), "older than the newest 1 and no multiple of 10 steps")
    ]
    assert expired(have[:2], Rule(1, None), set())[0][1] == "older than the newest 1"


@given(
    st.sets(st.builds(SnapshotId, st.integers(1, 4), st.integers(1, 40)), max_size=30),
    st.integers(1, 5),
    st.none() | st.integers(1, 12),
    st.data(),
)
def test_never_the_newest_never_pinned_and_stable(
    have: set[SnapshotId], keep: int, every: int | None, data: st.DataObject
) -> None:
    pinned = data.draw(st.sets(st.sampled_from(sorted(have)))) if have else set()
    rule = Rule(keep, every)
    gone = {snapshot for snapshot, _ in expired(have, rule, pinned)}
    assert gone <= have
    assert not gone & pinned
    if have:
        assert max(have) not in gone
    assert len(have - gone) >= min(keep, len({snapshot.step for snapshot in have}))
    # What went does not change what stays.
    assert expired(have - gone, rule, pinned) == []


@pytest.mark.parametrize(("keep", "every"), [(0, None), (-1, 5), (1, 0)])
def test_a_rule_that_keeps_nothing_is_refused(keep: int, every: int | None) -> None:
    with pytest.raises(InvalidConfiguration):
        Rule(keep, every)
