"""A restore for a rank that joins live: tried again as the others go on, and bounded."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from everstep.agent import events, live_restoring
from everstep.agent.job import Job
from everstep.agent.live_restoring import LiveRestoring
from everstep.agent.recovery import Wanted
from everstep.agent.sources import SnapshotPlan
from everstep.proto.agent_pb2 import RestoreReply
from everstep.proto.errors import (
    EverstepError,
    FormatInvalid,
    NothingRecoverable,
    PeerUnavailable,
    ShardCorrupt,
    StaleIncarnation,
)
from everstep.proto.ids import SnapshotId
from everstep.proto.peer_pb2 import DecideReply

from .several_nodes import JOB
from .small_nodes import SmallNode

LOST = PeerUnavailable("n2", "it is gone")
ROTTEN = ShardCorrupt("memory", (3,))
OVERWRITTEN = FormatInvalid("rank 0", "it is not in memory any more")


class Story(LiveRestoring):
    """The loop, with what the coordinator decides and what fetching that comes to."""

    def __init__(self, node: SmallNode, *decisions: int | None) -> None:
        unused: Any = None
        super().__init__(node.pipeline, "n1", unused, unused, unused, unused)
        self.decisions = list(decisions)
        self.problems: dict[int, EverstepError] = {}
        self.job: Job | None = None
        self.asked: list[bool] = []
        self.pinned: list[SnapshotId | None] = []

    async def _decided(
        self, job: Job, wanted: Wanted, *, live: bool, failed_plan: int = 0
    ) -> tuple[DecideReply, SnapshotPlan | None]:
        self.asked.append(live)
        step = self.decisions.pop(0)
        if step is None:
            return DecideReply(), None
        return DecideReply(found=True), SnapshotPlan(SnapshotId(1, step), 2, ())

    async def _found(
        self, job: Job, rank: int, decided: DecideReply, plan: SnapshotPlan
    ) -> RestoreReply:
        self.pinned.append(job.joining.get(rank))
        if plan.snapshot.step in self.problems:
            raise self.problems[plan.snapshot.step]
        return RestoreReply(found=True, step=plan.snapshot.step)


@pytest.fixture
def tell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[Story, RestoreReply | EverstepError]]:
    """Rank 1 of a small node restores live."""
    monkeypatch.setattr(live_restoring, "_AGAIN_S", 0.0)

    def told(
        *decisions: int | None, problems: dict[int, EverstepError] | None = None
    ) -> tuple[Story, RestoreReply | EverstepError]:
        async def whole() -> tuple[Story, RestoreReply | EverstepError]:
            node = SmallNode("n1", tmp_path)
            try:
                for rank in (0, 1):
                    caller = events.Caller(JOB, rank, 2, f"p{rank}", 0)
                    attach = events.Attach(caller, "", 7, 1.0, holder_alive=False)
                    node.pipeline.submit(attach)
                story = Story(node, *decisions)
                story.problems = problems or {}
                job = node.state.jobs[JOB]
                try:
                    return story, await story.restore(job, 1, Wanted())
                except EverstepError as error:
                    return story, error
                finally:
                    story.job = job
            finally:
                await node.close()

        return asyncio.run(whole())

    return told


Tell = Callable[..., tuple[Any, Any]]


def test_what_is_decided_stays_while_it_is_brought_here(tell: Tell) -> None:
    story, reply = tell(9)
    assert (reply.step, story.asked) == (9, [True])
    assert story.pinned == [SnapshotId(1, 9)]
    assert not story.job.restore_decided, "nothing is decided for anybody else"


@pytest.mark.parametrize("problem", [LOST, ROTTEN, OVERWRITTEN], ids=["lost", "rotten", "gone"])
def test_if_it_is_lost_meanwhile_the_next_newest_is_taken(
    tell: Tell, problem: EverstepError
) -> None:
    story, reply = tell(9, 8, problems={9: problem})
    assert (reply.step, story.asked) == (8, [True, True])
    assert story.pinned == [SnapshotId(1, 9), SnapshotId(1, 8)]


def test_if_none_is_committed_it_begins_as_all_ranks_do(tell: Tell) -> None:
    story, reply = tell(None, 4)
    assert (reply.step, story.asked) == (4, [True, False])
    assert story.job.restored == SnapshotId(1, 4)
    story, reply = tell(None, None)
    assert not reply.found


def test_it_ends_when_everything_it_tries_is_lost(tell: Tell) -> None:
    story, error = tell(9, 8, 7, 6, 5, problems=dict.fromkeys((9, 8, 7, 6, 5), LOST))
    assert error is LOST
    assert story.decisions == [5]


@pytest.mark.parametrize(
    "final", [NothingRecoverable(JOB, ("n2 is gone",)), StaleIncarnation(JOB, 1, 2)]
)
def test_what_time_does_not_mend_is_said_at_once(tell: Tell, final: EverstepError) -> None:
    story, error = tell(9, 8, problems={9: final})
    assert error is final
    assert story.decisions == [8]
