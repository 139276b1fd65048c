"""What a job's facts say: whose shards differ, which slot is free, what may go."""

import pytest

from everstep.agent.actions import Place
from everstep.agent.events import ArenaReserved
from everstep.agent.job import Job, Member, SealedShard, Snapshot, Stage
from everstep.proto.ids import SnapshotId

from .deciding import samples_of


def snapshot(
    step: int,
    stage: Stage = Stage.COMMITTED,
    *,
    incarnation: int = 1,
    slot: int = 0,
    generation: int = 1,
) -> Snapshot:
    place = Place(generation, slot)
    found = Snapshot(SnapshotId(incarnation, step), 1, stage, {0: place})
    found.sealed[0] = SealedShard(place, "layout", 10, b"plan0000", 1.0, b"record")
    return found


def job(*snapshots: Snapshot, slots: int = 3, incarnation: int = 1) -> Job:
    found = Job("job", 1, incarnation)
    found.members[0] = Member("p", 7, 1.0)
    found.add_arena(ArenaReserved("job", 0, 1, 10, slots))
    found.snapshots = {one.id: one for one in snapshots}
    return found


def samples(*replicas: bytes, plan: bytes = b"planplan") -> SealedShard:
    return SealedShard(Place(1, 0), "layout", 10, samples_of(b"".join(replicas), plan), 1.0, b"")


def test_replicas_are_compared_one_by_one() -> None:
    whole = Snapshot(SnapshotId(1, 1), 3)
    a, b = b"a" * 8, b"b" * 8
    whole.sealed = {0: samples(a, a, b), 1: samples(a, b, b), 2: samples(a, a, a)}
    assert whole.drifted_replicas() == (1, 2)
    whole.sealed = {rank: samples(a, b) for rank in range(3)}
    assert whole.drifted_replicas() == ()
    whole.sealed = {rank: samples() for rank in range(3)}
    assert whole.drifted_replicas() == ()


def test_other_plans_cannot_be_compared() -> None:
    whole = Snapshot(SnapshotId(1, 1), 2)
    whole.sealed = {0: samples(b"a" * 8), 1: samples(b"a" * 8, plan=b"otherpla")}
    assert whole.drifted_replicas() is None
    whole.sealed = {0: samples(b"a" * 8), 1: samples()}
    assert whole.drifted_replicas() is None


def test_the_ranks_that_have_not_sealed_are_named() -> None:
    whole = Snapshot(SnapshotId(1, 1), 4)
    whole.sealed = {2: samples(), 0: samples()}
    assert whole.missing_ranks() == [1, 3]


def test_a_later_incarnation_is_newer_whatever_its_step() -> None:
    found = job(snapshot(90), snapshot(10, incarnation=2, slot=1), incarnation=2)
    newest = found.newest_committed()
    assert newest is not None
    assert newest.id == SnapshotId(2, 10)


def test_open_and_dropped_snapshots_are_never_the_newest_commit() -> None:
    found = job(snapshot(1), snapshot(2, Stage.OPEN, slot=1), snapshot(3, Stage.DROPPED, slot=2))
    newest = found.newest_committed()
    assert newest is not None
    assert newest.id.step == 1
    assert job().newest_committed() is None


def test_what_must_stay() -> None:
    old, newest = snapshot(1), snapshot(2, slot=1)
    copied = snapshot(3, Stage.OPEN, slot=2)
    found = job(old, newest, copied)
    assert [s.id.step for s in (old, newest, copied) if found.must_stay(s)] == [2, 3]
    old.pins = 1
    assert found.must_stay(old)
    old.pins = 0
    found.restored, found.restoring = old.id, {0}
    assert found.must_stay(old)
    found.restoring = set()
    assert not found.must_stay(old)


def test_a_dropped_snapshot_stays_only_while_it_is_read() -> None:
    dropped = snapshot(3, Stage.DROPPED)
    found = job(dropped)
    assert not found.must_stay(dropped)
    dropped.pins = 1
    assert found.must_stay(dropped)


def test_what_goes_first() -> None:
    found = job(
        snapshot(1),
        snapshot(2, slot=1),
        snapshot(3, Stage.DROPPED, slot=2),
        snapshot(4, slot=3),
        slots=4,
    )
    assert [s.id.step for s in found.evictable()] == [3, 1, 2]


def test_what_was_left_behind_goes_before_what_was_gone_back_to() -> None:
    found = job(snapshot(1), snapshot(2, slot=1), snapshot(3, slot=2), incarnation=2)
    found.restored = SnapshotId(1, 2)
    assert [s.id.step for s in found.evictable()] == [3, 1]
    assert found.left_behind(SnapshotId(1, 3))
    assert not found.left_behind(SnapshotId(1, 2))
    assert not found.left_behind(SnapshotId(1, 1))
    assert not found.left_behind(SnapshotId(2, 1))


def test_what_was_left_behind_is_better_than_nothing() -> None:
    found = job(snapshot(3), incarnation=2)
    found.restored = SnapshotId(1, 2)
    newest = found.newest_committed()
    assert newest is not None
    assert newest.id.step == 3


def test_a_slot_is_free_if_nothing_holds_it() -> None:
    found = job(snapshot(1), snapshot(2, Stage.DROPPED, slot=2), slots=3)
    assert found.free_place(0) == Place(1, 1)
    found.snapshots[SnapshotId(1, 3)] = snapshot(3, Stage.OPEN, slot=1)
    assert found.free_place(0) is None


def test_only_the_present_arena_is_written() -> None:
    found = job(snapshot(1), slots=1)
    found.add_arena(ArenaReserved("job", 0, 2, 20, 1))
    assert found.free_place(0) == Place(2, 0)
    assert not found.in_present_arenas(snapshot(1))
    assert found.idle_generations() == []
    found.snapshots.clear()
    assert found.idle_generations() == [(0, 1)]
    found.members.clear()
    assert found.idle_generations() == [(0, 1), (0, 2)], "nobody writes either"


def test_arenas_are_told_of_in_any_order_and_twice() -> None:
    found = job()
    for generation in (3, 2, 3):
        found.add_arena(ArenaReserved("job", 0, generation, 10, 2))
    assert [arena.generation for arena in found.arenas[0]] == [1, 2, 3]
    assert found.free_place(0) == Place(3, 0)


@pytest.mark.parametrize(
    ("pins", "stage", "words"),
    [
        (0, Stage.OPEN, "step 2 is still being copied by rank(s) "),
        (1, Stage.COMMITTED, "step 1 is being read"),
    ],
)
def test_why_busy(pins: int, stage: Stage, words: str) -> None:
    other = snapshot(2, stage, slot=1)
    other.sealed.clear()
    found = job(snapshot(1), other, slots=2)
    found.snapshots[SnapshotId(1, 1)].pins = pins
    assert words in found.why_busy()
    assert found.why_busy().startswith("busy: ")
    found.snapshots.clear()
    assert found.why_busy() == ""


def test_the_rank_with_the_fewest_slots_decides() -> None:
    found = job(snapshot(1), slots=3)
    found.world = 2
    found.members[1] = Member("q", 8, 1.0)
    found.add_arena(ArenaReserved("job", 1, 1, 10, 1))
    assert found.why_busy() == "busy: there is no slot beside the newest commit's"


def test_the_last_refusals_are_remembered() -> None:
    found = job()
    for step in range(100):
        found.refuse(step, "busy")
    assert list(found.refused) == list(range(36, 100))


def test_what_nvme_has_or_gets() -> None:
    found = job(incarnation=2)
    assert found.last_flushed_step() == 0
    found.restored = SnapshotId(1, 7)
    found.durable = {SnapshotId(1, 90): 1}
    assert found.last_flushed_step() == 7
    found.durable[SnapshotId(2, 8)] = 1
    assert found.last_flushed_step() == 8
    found.flushing = SnapshotId(2, 9)
    assert found.last_flushed_step() == 9
