"""A node's part in parity rounds."""

import pytest

from everstep.agent import actions, events
from everstep.agent.actions import Place
from everstep.agent.job import RoundStage
from everstep.agent.plans import ParityPlan, PlannedMember, PlannedShard
from everstep.agent.state import Rules, State
from everstep.proto.ids import UNIT_BYTES, SnapshotId

JOB = "gpt"


class OneNode:
    """A node with one rank of two."""

    def __init__(self, slots: int = 4) -> None:
        self.state = State(Rules(clustered=True, node_id="n1", nvme=False), lambda known: [])
        self.caller = events.Caller(JOB, 0, 2, "p0", 1)
        self.feed(events.Attach(self.caller, "launch", 1, 0.0, False, decided=1))
        self.feed(events.ArenaReserved(JOB, 0, 1, UNIT_BYTES, slots))

    def feed(self, event: events.Event) -> list[actions.Action]:
        return self.state.handle(event, 0.0).actions

    def commit(self, step: int) -> None:
        place = self.state.handle(events.Offer(self.caller, step), 0.0).reply
        assert isinstance(place, Place), place
        digest = step.to_bytes(16, "big")
        self.feed(events.Seal(self.caller, step, place, "layout", 1, b"", 0.0, digest, digest))
        self.feed(events.Recorded(JOB, SnapshotId(1, step), 0))
        self.feed(events.CommitOrdered(JOB, SnapshotId(1, step), b"id"))

    def plan(self, step: int, plan_id: str = "") -> ParityPlan:
        shard = PlannedShard(0, 1, "layout", step.to_bytes(16, "big"))
        members = (PlannedMember("n1", (shard,)), PlannedMember("n2", ()))
        return ParityPlan(plan_id or f"plan-{step}", JOB, SnapshotId(1, step), 2, 1, members)

    def prepare(self, step: int, plan_id: str = "") -> list[actions.Action]:
        return self.feed(events.PrepareOrdered(self.plan(step, plan_id)))

    def protect(self, step: int) -> list[actions.Action]:
        self.prepare(step)
        self.feed(events.Encoded(JOB, f"plan-{step}"))
        return self.feed(events.RoundEnded(JOB, f"plan-{step}", commit=True))

    @property
    def stages(self) -> dict[str, RoundStage]:
        return {name: known.stage for name, known in self.state.jobs[JOB].rounds.items()}


def test_parity_is_freed_only_once_a_newer_one_is_committed() -> None:
    node = OneNode()
    node.commit(1)
    node.protect(1)
    node.commit(2)
    assert node.prepare(2) == [actions.Encode(node.plan(2))]
    assert node.feed(events.Encoded(JOB, "plan-2")) == []
    assert node.feed(events.RoundEnded(JOB, "plan-2", commit=True)) == [
        actions.DeleteParity(JOB, "plan-1"),
        actions.NotifyCommitted(JOB, SnapshotId(1, 2), "parity"),
    ]


def test_a_round_that_is_given_up_leaves_the_older_parity() -> None:
    node = OneNode()
    node.commit(1)
    node.protect(1)
    node.commit(2)
    node.prepare(2)
    assert node.feed(events.RoundEnded(JOB, "plan-2", commit=False, reason="late")) == [
        actions.StopEncoding(JOB, "plan-2"),
        actions.DeleteParity(JOB, "plan-2"),
    ]
    assert node.stages == {"plan-1": RoundStage.COMMITTED}


def test_what_parity_depends_on_stays_in_its_slots() -> None:
    node = OneNode(slots=3)
    node.commit(1)
    node.protect(1)
    node.commit(2)
    node.prepare(2)
    node.commit(3)
    refusal = node.state.handle(events.Offer(node.caller, 4), 0.0).reply
    assert isinstance(refusal, str) and refusal.startswith("busy")
    node.feed(events.Encoded(JOB, "plan-2"))
    node.feed(events.RoundEnded(JOB, "plan-2", commit=True))
    assert isinstance(node.state.handle(events.Offer(node.caller, 5), 0.0).reply, Place)


def test_a_commit_that_was_ordered_before_the_parity_is_there_does_nothing() -> None:
    node = OneNode()
    node.commit(1)
    node.prepare(1)
    assert node.feed(events.RoundEnded(JOB, "plan-1", commit=True)) == []
    assert node.stages == {"plan-1": RoundStage.ENCODING}


def test_a_round_over_a_shard_that_is_gone_fails_at_once() -> None:
    node = OneNode()
    node.commit(1)
    assert node.prepare(7) == []
    assert node.stages == {"plan-7": RoundStage.FAILED}


def test_parity_that_was_finished_after_the_end_is_deleted() -> None:
    node = OneNode()
    node.commit(1)
    node.prepare(1)
    node.feed(events.RoundEnded(JOB, "plan-1", commit=False))
    assert node.feed(events.Encoded(JOB, "plan-1")) == [actions.DeleteParity(JOB, "plan-1")]


def test_one_that_encodes_does_not_begin_another_and_one_that_waits_for_the_end_does() -> None:
    node = OneNode()
    node.commit(1)
    node.prepare(1)
    assert node.prepare(1, "other") == []
    node.feed(events.Encoded(JOB, "plan-1"))
    assert node.prepare(1, "other") == [actions.Encode(node.plan(1, "other"))]


def test_prepared_parity_of_something_newer_outlives_the_commit_of_something_older() -> None:
    node = OneNode()
    node.commit(1)
    node.commit(2)
    node.prepare(2)
    node.feed(events.Encoded(JOB, "plan-2"))
    node.protect(1)
    assert node.stages == {"plan-2": RoundStage.PREPARED, "plan-1": RoundStage.COMMITTED}


def test_after_a_restart_what_has_parity_is_committed_and_not_dropped_for_what_is_newer() -> None:
    node = OneNode()
    shards = [
        events.AdoptedShard(
            SnapshotId(1, step), 0, 2, Place(1, step), "layout", 1, b"", 0.0, b"", bytes([step])
        )
        for step in (1, 2)
    ]
    node.feed(
        events.Adopt(
            JOB, 1, 2, "launch",
            members=[events.AdoptedMember(0, "p0", 1, 0.0)],
            arenas=[events.ArenaReserved(JOB, 0, 1, UNIT_BYTES, 4)],
            shards=shards,
            durable=[],
            parities=[node.plan(1)],
        )
    )  # fmt: skip
    node.feed(events.AdoptedVerified(JOB, SnapshotId(1, 2)))
    found = node.feed(events.CommitOrdered(JOB, SnapshotId(1, 2), b"id"))
    assert not any(isinstance(action, actions.DropRecord) for action in found)
    assert SnapshotId(1, 1) in node.state.jobs[JOB].snapshots


def test_who_dies_now_decides_nothing_about_an_earlier_incarnation() -> None:
    node = OneNode()
    place = node.state.handle(events.Offer(node.caller, 1), 0.0).reply
    seal = events.Seal(node.caller, 1, place, "layout", 1, b"", 0.0, b"e", b"d")
    node.feed(seal)
    node.feed(events.Recorded(JOB, SnapshotId(1, 1), 0))
    node.feed(events.BeginOrdered(JOB, 2, 2, "launch-2"))
    other = events.Caller(JOB, 1, 2, "q1", 0)
    node.feed(events.Attach(other, "launch-2", 2, 0.0, False, decided=2))
    found = node.feed(events.SessionLost(JOB, 1, "q1"))
    assert found == [], "its shard may be part of a commit that others know of"


def test_a_step_that_is_taken_again_does_not_overwrite_the_newest_that_all_have_on_disk() -> None:
    state = State(Rules(clustered=True, node_id="n1", nvme_interval_steps=1), lambda known: [])
    node = OneNode()
    node.state = state
    node.feed(events.Attach(node.caller, "launch", 1, 0.0, False, decided=1))
    node.feed(events.ArenaReserved(JOB, 0, 1, UNIT_BYTES, 4))
    node.commit(4)
    node.feed(events.FlushEnded(JOB, SnapshotId(1, 4)))
    node.feed(events.DurableOrdered(JOB, SnapshotId(1, 4)))
    node.caller = events.Caller(JOB, 0, 2, "q0", 2)
    node.feed(events.Attach(node.caller, "launch-2", 2, 0.0, False, decided=2))
    place = node.state.handle(events.Offer(node.caller, 4), 0.0).reply
    node.feed(events.Seal(node.caller, 4, place, "layout", 1, b"", 0.0, b"e", b"d"))
    node.feed(events.Recorded(JOB, SnapshotId(2, 4), 0))
    found = node.feed(events.CommitOrdered(JOB, SnapshotId(2, 4), b"id"))
    assert actions.NotifyCommitted(JOB, SnapshotId(2, 4), "memory") in found
    assert not any(isinstance(action, actions.Flush) for action in found)


def damaged(*, is_committed: bool) -> OneNode:
    """A node whose part of a round was whole."""
    node = OneNode()
    node.commit(1)
    node.prepare(1)
    node.feed(events.Encoded(JOB, "plan-1"))
    if is_committed:
        node.feed(events.RoundEnded(JOB, "plan-1", commit=True))
    assert node.feed(events.ParityDamaged(JOB, "plan-1", "rot")) == [actions.Encode(node.plan(1))]
    assert node.stages == {"plan-1": RoundStage.MENDING}
    return node


@pytest.mark.parametrize("is_committed", [False, True])
def test_parity_that_is_mended_may_be_committed_again(is_committed: bool) -> None:
    node = damaged(is_committed=is_committed)
    node.commit(2)
    assert node.prepare(2) == [], "one at a time"
    assert node.feed(events.Encoded(JOB, "plan-1")) == []
    assert node.stages == {"plan-1": RoundStage.PREPARED}
    node.feed(events.RoundEnded(JOB, "plan-1", commit=True))
    assert node.stages == {"plan-1": RoundStage.COMMITTED}


@pytest.mark.parametrize("is_committed", [False, True])
def test_parity_that_cannot_be_mended_is_lost_and_has_not_failed(is_committed: bool) -> None:
    node = damaged(is_committed=is_committed)
    lost = node.feed(events.Encoded(JOB, "plan-1", problem="n2 does not have it any more"))
    assert lost == [actions.DeleteParity(JOB, "plan-1")]
    assert node.stages == {"plan-1": RoundStage.LOST}
    assert node.state.jobs[JOB].in_round(SnapshotId(1, 1)), "others' parity is made of it"
    node.commit(2)
    node.protect(2)
    assert node.stages == {"plan-2": RoundStage.COMMITTED}


def test_parity_that_never_was_whole_is_encoded_again_as_if_for_the_first_time() -> None:
    node = OneNode()
    node.commit(1)
    node.prepare(1)
    node.feed(events.Encoded(JOB, "plan-1", problem="late"))
    node.feed(events.ParityDamaged(JOB, "plan-1", "it is to be made anew"))
    assert node.stages == {"plan-1": RoundStage.ENCODING}
    node.feed(events.Encoded(JOB, "plan-1", problem="late"))
    assert node.stages == {"plan-1": RoundStage.FAILED}
