"""What the coordinator makes of the members' reports: commits and drops."""

from collections.abc import Iterable
from dataclasses import replace

import pytest

from everstep.agent import events, tables
from everstep.agent.holdings import FlushedFact, RoundFact, ShardFact, SnapshotFact
from everstep.proto.ids import UNIT_BYTES, SnapshotId
from everstep.snapshot import samples
from everstep.snapshot.samples import Group, encode

from .coordinating import S1, S2, Office, fact, part


def test_a_snapshot_commits_once_all_ranks_are_sealed_somewhere() -> None:
    office = Office(2)
    office.reports("n1", fact([0], [part(S1, "sealed", [0], 2)]))
    assert office.orders("n1") == []
    office.reports("n2", fact([1], [part(S1, "sealed", [1], 2)]))
    (one,), (other,) = office.orders("n1"), office.orders("n2")
    assert isinstance(one, events.CommitOrdered)
    assert one == other
    assert office.coordination.changed() == {"n1", "n2"}


def test_a_step_that_one_node_dropped_is_dropped_everywhere() -> None:
    office = Office(2)
    office.reports("n1", fact([0], [part(S1, "sealed", [0], 2)]))
    office.reports("n2", fact([1], [part(S1, "dropped", [], 2)]))
    (order,) = office.orders("n1")
    assert isinstance(order, events.DropOrdered) and "n2" in order.reason


def test_a_step_that_one_node_never_saw_is_given_up_once_it_took_part_in_a_newer_one() -> None:
    office = Office(2)
    office.reports("n1", fact([0], [part(S1, "sealed", [0], 2)]))
    office.reports("n2", fact([1]))
    office.decide()
    assert office.orders("n1") == []
    office.reports("n2", fact([1], [part(S2, "open", [], 2)]))
    office.decide()
    (order,) = office.orders("n1")
    assert isinstance(order, events.DropOrdered) and order.snapshot == S1


def test_a_slow_node_has_not_passed_a_step_by() -> None:
    office = Office(2)
    office.reports("n1", fact([0], [part(S1, "sealed", [0], 2)]))
    office.reports("n2", fact([1], [part(S1, "open", [], 2), part(S2, "dropped", [], 2)]))
    office.decide()
    assert office.orders("n1") == []


def test_two_steps_under_way_are_committed_in_order() -> None:
    """A node drops what is older and open when it commits: the older one comes first."""
    office = Office(2)
    office.reports("n1", fact([0], [part(S2, "sealed", [0], 2), part(S1, "sealed", [0], 2)]))
    office.reports("n2", fact([1], [part(S1, "open", [], 2), part(S2, "open", [], 2)]))
    office.decide()
    assert office.orders("n1") == [], "nobody has passed by a step that is still open there"
    office.reports("n2", fact([1], [part(S1, "sealed", [1], 2), part(S2, "open", [], 2)]))
    office.decide()
    (order,) = office.orders("n1")
    assert isinstance(order, events.CommitOrdered) and order.snapshot == S1
    office.reports("n2", fact([1], [part(S1, "sealed", [1], 2), part(S2, "sealed", [1], 2)]))
    found = office.orders("n1", events.CommitOrdered)
    assert [getattr(order, "snapshot", None) for order in found] == [S1, S2]


def test_an_older_step_that_a_node_dropped_does_not_cost_the_newer_one() -> None:
    office = Office(2)
    office.reports("n1", fact([0], [part(S1, "sealed", [0], 2), part(S2, "sealed", [0], 2)]))
    office.reports("n2", fact([1], [part(S1, "dropped", [], 2), part(S2, "sealed", [1], 2)]))
    office.decide()
    older, newer = office.orders("n1")
    assert isinstance(older, events.DropOrdered) and older.snapshot == S1
    assert isinstance(newer, events.CommitOrdered) and newer.snapshot == S2


def test_what_is_left_of_earlier_incarnations_waits_for_what_was_restored() -> None:
    office = Office(1)
    office.reports("n1", fact([0], [part(S1, "sealed", [0], 2)], incarnation=2))
    assert office.orders("n1") == [], "others may have the rest of it"
    office.reports(
        "n1",
        fact([0], [part(S1, "sealed", [0], 2)], incarnation=2, restore_decided=True, restored=None),
    )
    (order,) = office.orders("n1")
    assert isinstance(order, events.DropOrdered)


def test_what_the_job_left_behind_never_commits_though_it_turns_out_whole() -> None:
    office = Office(2)
    again = fact([0], [part(S1, "sealed", [0], 2)], incarnation=2, restore_decided=True)
    office.reports("n1", again)
    office.reports("n2", fact([1], [part(S1, "sealed", [1], 2)], incarnation=2))
    assert all(isinstance(office.orders(n)[0], events.DropOrdered) for n in ("n1", "n2"))


def test_what_was_restored_is_committed_for_those_who_missed_it() -> None:
    office = Office(2)
    held = [part(S1, "sealed", [1], 2)]
    office.reports("n1", fact([0], incarnation=2, restore_decided=True, restored=S1))
    office.reports("n2", fact([1], held, incarnation=2))
    (order,) = office.orders("n2")
    assert isinstance(order, events.CommitOrdered)


def test_a_parity_round_proves_a_commit() -> None:
    office = Office(2)
    known = RoundFact("1-1-1-1-0.1", S1, "prepared", ("n1", "n2"))
    office.reports("n1", fact([0], [part(S1, "sealed", [0], 2)]))
    office.reports("n2", fact([1], rounds=[known]))
    (order,) = office.orders("n1", events.CommitOrdered)
    assert order.snapshot == S1
    office.reports("n2", fact([1]))
    assert office.orders("n1") == [], "what a node said before its last report leaves no trace"


def test_durable_means_all_parts_are_on_disk() -> None:
    office = Office(2)
    committed = [part(S1, "committed", [0], 2)]
    office.reports("n1", fact([0], committed, flushed=(FlushedFact(S1, 2, (0,)),)))
    assert office.orders("n1", events.DurableOrdered) == []
    office.reports("n2", fact([1], [part(S1, "committed", [1], 2)]))
    assert [order.snapshot for order in office.orders("n2", events.FlushOrdered)] == [S1]
    office.reports(
        "n2", fact([1], [part(S1, "committed", [1], 2)], flushed=(FlushedFact(S1, 2, (1,)),))
    )
    for node_id in ("n1", "n2"):
        assert [order.snapshot for order in office.orders(node_id, events.DurableOrdered)] == [S1]


@pytest.mark.parametrize(
    ("restored", "is_durable"), [(S1, False), (None, False), (S2, True), (SnapshotId(1, 3), True)]
)
def test_what_the_job_has_gone_back_from_does_not_become_durable(
    restored: SnapshotId | None, is_durable: bool
) -> None:
    """A node that was away has the last part of it, and has not heard of the restore."""
    office = Office(2)
    office.reports("n1", fact([], flushed=(FlushedFact(S2, 2, (0,)),)))
    here = fact([1], incarnation=2, restore_decided=True, restored=restored)
    office.reports("n2", replace(here, flushed=(FlushedFact(S2, 2, (1,)),)))
    for node_id in ("n1", "n2"):
        found = office.orders(node_id, events.DurableOrdered)
        assert [order.snapshot for order in found] == [S2] * is_durable


def test_a_late_report_changes_nothing() -> None:
    office = Office(1)
    office.reports("n1", fact([0], [part(S1, "sealed", [0], 1)], world=1))
    before = office.orders("n1")
    office._sequence = -5
    office.reports("n1")
    assert office.orders("n1") == before != []


def replicas(rank: int, group_id: int, leaves: bytes, plan: bytes = b"planplan") -> SnapshotFact:
    """The part of a node with one rank that is in one group."""
    held = encode([Group(group_id, plan, leaves)])
    shard = ShardFact(rank, "layout", UNIT_BYTES, bytes(8) + rank.to_bytes(8, "big"), held)
    return SnapshotFact(S1, 4, "sealed", (shard,))


def test_replicas_are_compared_within_their_groups() -> None:
    """Ranks 0 and 2 are a group, 1 and 3 another one."""
    office = Office(4)
    for rank in range(4):
        part_of = replicas(rank, 7 + rank % 2, b"12345678" * (1 + rank % 2))
        office.reports(f"n{rank + 1}", fact([rank], [part_of], world=4))
    (order,) = office.orders("n1")
    assert isinstance(order, events.CommitOrdered)

    drifted = replicas(3, 8, b"12345678" + b"abcdefgh")
    office.reports("n4", fact([3], [drifted], world=4))
    (order,) = office.orders("n1")
    assert isinstance(order, events.DropOrdered)
    assert (order.drifted, "drifted apart" in order.reason) == ((8 << 32 | 1,), True)

    office.reports("n4", fact([3], [replicas(3, 8, b"12345678", b"otherpla")], world=4))
    (order,) = office.orders("n1")
    assert isinstance(order, events.DropOrdered)
    assert (order.drifted, "disagree" in order.reason) == ((), True)


def test_replicas_that_drifted_apart_from_the_start_are_dropped() -> None:
    office = Office(4)
    for rank in range(4):
        assert office.orders(f"n{rank + 1}") == []
        part_of = replicas(rank, 7 + rank % 2, b"1234567%d" % (rank == 2))
        office.reports(f"n{rank + 1}", fact([rank], [part_of], world=4))
    for rank in range(4):
        (order,) = office.orders(f"n{rank + 1}")
        assert isinstance(order, events.DropOrdered)
        assert order.drifted == (7 << 32,)


def test_replicas_are_compared_once_and_not_for_every_node(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []

    def drifted(said: Iterable[bytes]) -> tuple[int, ...] | None:
        compared.append(len(list(said)))
        return samples.drifted(said)

    monkeypatch.setattr(tables, "drifted", drifted)
    office = Office(8)
    for rank in range(8):
        known = replicas(rank, 1 + rank, rank.to_bytes(8, "big"))
        whole = SnapshotFact(S1, 8, "sealed", known.shards)
        office.reports(f"n{rank + 1}", fact([rank], [whole], world=8))
    for rank in range(8):
        (order,) = office.orders(f"n{rank + 1}")
        assert isinstance(order, events.CommitOrdered)
    assert compared == [8]
