"""Which replicas are agreed, by which ranks, and how long what was agreed is known."""

import pytest

from everstep.agent.agreements import GROUPS_A_RANK, Agreements
from everstep.agent.events import Caller, Declare

WORLD = 4
NAMES = ("a", "b", "c")


class Group:
    """The ranks of a group, and what has been agreed by whomever."""

    def __init__(self, known: Agreements, *participants: int) -> None:
        self.known = known
        self.participants = participants

    def says(
        self, rank: int, number: int, digests: str = "xyz", names: tuple[str, ...] = NAMES
    ) -> tuple[int, ...] | None:
        said = tuple(digest.encode() for digest in digests)
        caller = Caller("job", rank, WORLD, f"process-{rank}", 1)
        return self.known.declare(Declare(caller, number, names, said, self.participants), WORLD)

    def late(self, number: int) -> tuple[int, ...]:
        return self.known.undeclared(self.participants, number, WORLD)

    @property
    def names(self) -> tuple[str, ...] | None:
        return self.known.names(self.participants)


@pytest.fixture
def known() -> Agreements:
    return Agreements()


def test_what_is_equal_on_all_ranks_is_agreed(known: Agreements) -> None:
    everybody = Group(known)
    assert [everybody.says(rank, 5) for rank in (0, 3)] == [None, None]
    assert everybody.says(1, 5, "xqz") is None
    assert everybody.late(5) == (2,)
    assert everybody.names is None
    assert everybody.says(2, 5) == (0, 2)
    assert everybody.names == ("a", "c")
    assert everybody.says(1, 5, "xqz") == (0, 2), "its answer was lost, and it asks again"


def test_groups_do_not_wait_for_each_other(known: Agreements) -> None:
    left, right, everybody = Group(known, 0, 2), Group(known, 1, 3), Group(known)
    assert left.says(0, 5, "xyz") is None
    assert right.says(1, 5, "pqr") is None
    assert everybody.says(0, 5) is None
    assert left.says(2, 5, "xyz") == (0, 1, 2)
    assert (left.late(5), right.late(5), everybody.late(5)) == ((), (3,), (1, 2, 3))
    assert right.says(3, 5, "pqx") == (0, 1)
    assert (left.names, right.names, everybody.names) == (NAMES, ("a", "b"), None)


def test_a_rank_may_be_in_several_groups_that_are_at_other_rounds(known: Agreements) -> None:
    row, column = Group(known, 0, 1), Group(known, 0, 2)
    assert row.says(0, 9) is None
    assert column.says(0, 4) is None
    assert column.says(2, 4) == (0, 1, 2)
    assert row.says(1, 9) == (0, 1, 2)


@pytest.mark.parametrize("participants", [(), (0, 1)])
def test_ranks_that_name_other_leaves_agree_on_none(
    known: Agreements, participants: tuple[int, ...]
) -> None:
    group = Group(known, *participants)
    for rank in range(len(participants or range(WORLD)) - 1, 0, -1):
        assert group.says(rank, 5) is None
    assert group.says(0, 5, names=("a", "b", "d")) == ()
    assert group.names == ()


def test_a_late_declaration_does_not_end_the_round_after_it(known: Agreements) -> None:
    group = Group(known, 0, 1)
    assert group.says(0, 6) is None
    assert group.says(1, 5, "999") is None
    assert group.late(6) == (1,)
    assert group.late(5) == (0, 1)
    assert group.says(1, 6) == (0, 1, 2)


def test_another_round_asks_all_ranks_again(known: Agreements) -> None:
    group = Group(known, 0, 1)
    group.says(0, 5)
    assert group.says(1, 6) is None
    assert group.says(0, 6, "xy-") == (0, 1)
    assert group.says(0, 7) is None
    assert group.names == ("a", "b"), "what was agreed last is known until there is something newer"
    known.clear()
    assert group.names is None
    assert len(known) == 0


def test_the_oldest_of_too_many_groups_is_forgotten(known: Agreements) -> None:
    others = Group(known, 8, 9)
    others.says(8, 1)
    others.says(9, 1)
    groups = [Group(known, 0, other) for other in range(10, 10 + GROUPS_A_RANK)]
    for group in groups:
        group.says(0, 1)
        assert group.says(group.participants[1], 1) == (0, 1, 2)
    for group in groups[1::-1]:
        assert group.says(0, 2) is None, "used again: it is not the oldest any more"
    assert [group.names for group in groups] == [NAMES] * GROUPS_A_RANK
    Group(known, 0, 1).says(0, 1)
    assert [group.names for group in groups[:4]] == [NAMES, NAMES, None, NAMES]
    assert others.names == NAMES, "it has nothing to do with that rank"
    for rank in range(10, 100):
        Group(known, 0, rank).says(0, 1)
    assert len(known) == GROUPS_A_RANK + 1
