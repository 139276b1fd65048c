"""A launch of another size restores: every shard is described, units come on demand, each once."""

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from everstep.agent import events
from everstep.agent.bringing import Bringing
from everstep.agent.job import Job, Stage
from everstep.agent.mending import Mending
from everstep.agent.needs import check_restoring, needs_of
from everstep.agent.recovery import Wanted
from everstep.agent.restoring import Restoring
from everstep.agent.sources import SnapshotPlan
from everstep.proto import agent_pb2 as wire
from everstep.proto.errors import EverstepError, FormatInvalid, OutOfSpace, PeerUnavailable
from everstep.proto.ids import UNIT_BYTES, SnapshotId
from everstep.proto.peer_pb2 import DecideReply
from everstep.snapshot.layout import decode
from everstep.snapshot.record import open_record
from everstep.storage.staging import Staging

from .several_nodes import JOB, SNAPSHOT, Group, group_of


class Restores:
    """A node on which a launch of two ranks restores what seven have saved."""

    def __init__(self, group: Group, at: str, plan: SnapshotPlan, world: int = 2) -> None:
        self.node = group.nodes[at]
        self.pipeline = self.node.pipeline
        self.pipeline.staging = Staging(self.node.memory.root, keep_free_bytes=0)
        self.mending = Mending(self.pipeline, group.fetching[at])
        self.bringing = Bringing(self.pipeline)
        self.plan, self.other_plan = plan, plan
        self.failed_plans: list[int] = []
        """As the coordinator was told, question by question."""
        self.callers = [events.Caller(JOB, rank, world, f"p{rank}", 0) for rank in range(2)]
        for caller in self.callers:
            attach = events.Attach(caller, "", 7, 1.0, holder_alive=False, decided=3)
            self.pipeline.submit(attach)
        fetching: Any = group.fetching[at]
        self.restoring = Restoring(
            self.pipeline, at, self._decide, fetching, self.mending, self.bringing
        )
        self.fetched: list[tuple[int, int]] = []
        self._count(fetching)

    async def _decide(self, method: str, request: Any, timeout_s: float) -> DecideReply:
        self.failed_plans.append(request.failed_plan)
        plan = self.other_plan if any(self.failed_plans) else self.plan
        number = 1 + max(self.failed_plans)
        return DecideReply(found=True, plan=plan.encoded(), plan_number=number)

    def _count(self, fetching: Any) -> None:
        fetch = fetching.fetch

        def counted(
            plan: SnapshotPlan, rank: int, units: Sequence[range] | None, *rest: Any, **how: Any
        ) -> None:
            fetch(plan, rank, units, *rest, **how)
            self.fetched += [(rank, unit) for one in units or () for unit in one]

        fetching.fetch = counted

    @property
    def job(self) -> Job:
        return self.node.state.jobs[JOB]

    async def restore(self, rank: int = 0) -> dict[int, wire.ShardLocation]:
        reply = await self.restoring.restore(self.job, rank, Wanted())
        assert reply.found
        return {found.rank: found for found in reply.shards}

    async def gather(self, needs: dict[int, list[range]]) -> dict[int, wire.ShardLocation]:
        found = await self.restoring.gather(self.job, SNAPSHOT, needs)
        assert [one.rank for one in found] == sorted(needs)
        return {one.rank: one for one in found}

    def step(self, *ranks: int) -> None:
        """Ranks go on to a step."""
        for rank in ranks:
            self.node.pipeline.submit(events.ArenaReserved(JOB, rank, 7, 10, 2))
            caller = replace(self.callers[rank], incarnation=3)
            self.pipeline.submit(events.Offer(caller, 41))
        self.bringing.offered(self.job)


Body = Callable[[Group, Restores], Coroutine[Any, Any, None]]


def run(
    root: Path, body: Body, *, at: str = "spare", lost: tuple[str, ...] = (), world: int = 2
) -> None:
    async def whole() -> None:
        async with group_of(root, 2, spare=["spare"]) as group:
            restores = Restores(group, at, await group.plan_of(lost), world)
            try:
                await body(group, restores)
            finally:
                await restores.pipeline.idle(10)
                restores.mending.close()

    asyncio.run(whole())


def staged(found: wire.ShardLocation) -> bytes:
    return Path(found.path).read_bytes()


def opened(found: wire.ShardLocation) -> BinaryIO:
    return Path(found.path).open("rb")


def is_there(found: wire.ShardLocation) -> bool:
    return Path(found.path).exists()


def remove(found: wire.ShardLocation) -> None:
    Path(found.path).unlink()


def content(group: Group, rank: int, units: list[range]) -> bytes:
    """A sparse file with these units."""
    image = group.shards[rank].image
    right = bytearray(len(image))
    for one in units:
        part = slice(one.start * UNIT_BYTES, one.stop * UNIT_BYTES)
        right[part] = image[part]
    return bytes(right)


def test_every_shard_is_described_and_none_is_held_here_again(tmp_path: Path) -> None:
    async def body(group: Group, restores: Restores) -> None:
        for rank in (0, 1):
            found = await restores.restore(rank)
            assert list(found) == list(range(7))
            for saved, one in found.items():
                shard = group.shards[saved]
                assert (one.path, one.image_bytes) == ("", len(shard.image))
                assert open_record(one.record, "").rank == saved
                assert decode(one.layout, "").layout_id == shard.layout.layout_id
        assert not restores.node.memory.arenas(JOB)
        assert not restores.fetched

    run(tmp_path, body, lost=("n3",))


def test_as_many_ranks_as_saved_have_their_own_held_here_again(tmp_path: Path) -> None:
    """And all others described, of which they gather what they need."""

    async def body(group: Group, restores: Restores) -> None:
        found = await restores.restore(1)
        assert [rank for rank, one in found.items() if one.path] == [1]
        held = restores.job.snapshots[SNAPSHOT]
        assert list(held.sealed) == [1] and held.stage is Stage.COMMITTED
        assert list(found) == list(range(7))
        gathered = await restores.gather({1: [range(1)], 5: [range(1)]})
        assert gathered[1] == found[1]
        assert staged(gathered[5]) == content(group, 5, [range(1)])

    run(tmp_path, body, world=7, lost=("n2",))


def test_what_is_here_is_given_by_its_path(tmp_path: Path) -> None:
    async def body(group: Group, restores: Restores) -> None:
        found = await restores.restore()
        assert [rank for rank, one in found.items() if one.path] == [0, 3]
        gathered = await restores.gather({0: [range(1)], 3: [], 5: [range(1, 3)]})
        assert gathered[0] == found[0] and gathered[3] == found[3]
        assert restores.fetched == [(5, 1), (5, 2)]

    run(tmp_path, body, at="n1")


def test_units_come_from_others_memory_and_from_parity(tmp_path: Path) -> None:
    async def body(group: Group, restores: Restores) -> None:
        await restores.restore()
        needs = {0: [range(1, 3)], 2: [range(1), range(2, 4)], 4: [range(1)]}
        for rank, one in (await restores.gather(needs)).items():
            assert staged(one) == content(group, rank, needs[rank])
            assert (one.offset, one.level) == (0, "memory")
            assert one.image_bytes == len(group.shards[rank].image)

    run(tmp_path, body, lost=("n3",))


def test_each_unit_comes_once_whoever_asks(tmp_path: Path) -> None:
    """Ranks of a node ask at the same time, for units that overlap; and for more later on."""

    async def body(group: Group, restores: Restores) -> None:
        await asyncio.gather(restores.restore(0), restores.restore(1))
        first, second = await asyncio.gather(
            restores.gather({2: [range(2)], 0: [range(1)]}),
            restores.gather({2: [range(1, 3)], 5: [range(3)]}),
        )
        assert first[2].path == second[2].path
        assert staged(first[2]) == content(group, 2, [range(3)])
        reader = opened(first[2])
        third = await restores.gather({2: [range(4)], 5: [range(1, 2)]})
        assert third[2].path == first[2].path
        with reader:  # of the same file: what it has mapped stays
            assert reader.read() == content(group, 2, [range(4)])
        assert sorted(restores.fetched) == sorted(set(restores.fetched))
        assert len(restores.fetched) == 4 + 1 + 3

    run(tmp_path, body)


def test_what_failed_is_fetched_when_it_is_asked_for_again(tmp_path: Path) -> None:
    async def body(group: Group, restores: Restores) -> None:
        await restores.restore()
        await restores.gather({2: [range(1)]})
        group.down.add("n3")
        with pytest.raises(PeerUnavailable):
            await restores.gather({2: [range(2)]})
        group.down.clear()
        found = await restores.gather({2: [range(2)]})
        assert staged(found[2]) == content(group, 2, [range(2)])
        assert restores.fetched == [(2, 0), (2, 1)]

    run(tmp_path, body)


def test_what_is_lost_with_its_node_meanwhile_comes_by_another_plan(tmp_path: Path) -> None:
    async def body(group: Group, restores: Restores) -> None:
        await restores.restore()
        restores.other_plan = await group.plan_of(("n3",))
        needs = {2: [range(2)]}
        with pytest.raises(PeerUnavailable, match="not there any more as it was planned"):
            await restores.gather(needs)
        await restores.restore()
        assert restores.failed_plans == [0, 1]
        assert staged((await restores.gather(needs))[2]) == content(group, 2, needs[2])
        await restores.restore(1)
        assert restores.failed_plans == [0, 1, 0]

    run(tmp_path, body)


def test_ranks_whose_own_shards_are_lost_meanwhile_restore_by_another_plan(tmp_path: Path) -> None:
    async def body(group: Group, restores: Restores) -> None:
        restores.other_plan = await group.plan_of(("n2",))
        found, other = await asyncio.gather(restores.restore(1), restores.restore(0))
        assert found[1].path and other[0].path
        held = restores.job.snapshots[SNAPSHOT]
        assert sorted(held.sealed) == [0, 1] and held.stage is Stage.COMMITTED
        assert set(restores.failed_plans) == {0, 1}

    run(tmp_path, body, world=7)


def test_the_same_plan_again_is_no_other_plan(tmp_path: Path) -> None:
    async def body(group: Group, restores: Restores) -> None:
        group.down.add("n2")
        with pytest.raises(PeerUnavailable, match="n2"):
            await restores.restore(1)
        assert restores.failed_plans == [0, 1]
        group.down.clear()
        found = await restores.restore(1)
        assert found[1].path
        assert restores.failed_plans == [0, 1, 2]

    run(tmp_path, body, world=7)


def test_without_memory_nothing_is_promised(tmp_path: Path) -> None:
    async def body(group: Group, restores: Restores) -> None:
        await restores.restore()
        staging = restores.pipeline.staging
        restores.pipeline.staging = Staging(restores.node.memory.root, keep_free_bytes=1 << 60)
        with pytest.raises(OutOfSpace):
            await restores.gather({2: [range(1)]})
        restores.pipeline.staging = staging
        await restores.gather({2: [range(1)]})
        restores.pipeline.staging = Staging(restores.node.memory.root, keep_free_bytes=1 << 60)
        with pytest.raises(OutOfSpace):
            await restores.gather({2: [range(2)]})
        found = await restores.gather({2: [range(1)]})  # that is here
        assert staged(found[2]) == content(group, 2, [range(1)])

    run(tmp_path, body)


def test_what_was_staged_goes_with_the_first_step_of_all_ranks(tmp_path: Path) -> None:
    async def body(group: Group, restores: Restores) -> None:
        await restores.restore()
        found = await restores.gather({2: [range(2)]})
        restores.step(0)
        await restores.pipeline.idle(10)
        assert is_there(found[2])
        restores.step(1)
        await restores.pipeline.idle(10)
        assert not is_there(found[2])
        # A launch after it fetches anew.
        await restores.restore()
        await restores.gather({2: [range(1)]})
        assert restores.fetched == [(2, 0), (2, 1), (2, 0)]

    run(tmp_path, body)


def test_a_file_that_somebody_removed_is_made_anew(tmp_path: Path) -> None:
    async def body(group: Group, restores: Restores) -> None:
        await restores.restore()
        found = await restores.gather({2: [range(2)]})
        remove(found[2])
        await restores.gather({2: [range(1, 3)]})
        assert staged(found[2]) == content(group, 2, [range(1, 3)])

    run(tmp_path, body)


@pytest.mark.parametrize(
    ("needs", "words"),
    [({7: [range(1)]}, "no rank 7"), ({2: [range(3, 5)]}, "unit 4 of rank 2, which has 4")],
)
def test_units_that_are_not_there(tmp_path: Path, needs: Any, words: str) -> None:
    async def body(group: Group, restores: Restores) -> None:
        await restores.restore()
        with pytest.raises(FormatInvalid, match=words):
            await restores.gather(needs)

    run(tmp_path, body)


def test_an_agent_that_was_started_anew_has_to_be_asked_again(tmp_path: Path) -> None:
    async def body(group: Group, restores: Restores) -> None:
        with pytest.raises(PeerUnavailable, match="ask it again"):
            await restores.gather({2: [range(1)]})

    run(tmp_path, body)


def request(*needs: tuple[int, list[tuple[int, int]]]) -> wire.GatherRequest:
    return wire.GatherRequest(
        needs=[
            wire.Need(rank=rank, units=[wire.UnitSpan(first=a, count=b) for a, b in spans])
            for rank, spans in needs
        ]
    )


def test_needs_are_merged() -> None:
    asked = request((3, [(5, 2), (1, 1), (2, 2), (6, 4)]), (1, []))
    assert needs_of(asked) == {3: [range(1, 4), range(5, 10)], 1: []}


@pytest.mark.parametrize(
    "bad",
    [
        request((1, [(0, 0)])),
        request((1, [(0, 1 << 60)])),
        request((1, [(1 << 60, 1)])),
        request((1, [(0, 1)]), (1, [(1, 1)])),
    ],
)
def test_needs_that_cannot_be(bad: wire.GatherRequest) -> None:
    with pytest.raises(FormatInvalid):
        needs_of(bad)


def test_only_what_a_rank_restores_is_brought() -> None:
    wanted, other = SnapshotId(2, 40), SnapshotId(2, 41)

    def problem(rank: int, snapshot: SnapshotId, **facts: Any) -> str:
        job = Job("job", 2, 3, **facts)
        try:
            check_restoring(job, rank, snapshot)
        except EverstepError as error:
            return str(error)
        return ""

    decided = {"restored": wanted, "restore_decided": True, "restoring": {0}}
    assert not problem(0, wanted, **decided)
    assert f"restores {wanted}, not {other}" in problem(0, other, **decided)
    assert "gone on" in problem(1, wanted, **decided)
    assert "nothing that is known yet" in problem(0, wanted, restored=wanted, restoring={0})
    assert not problem(1, other, joining={1: other}, **decided)
    assert problem(1, wanted, joining={1: other}, **decided)
    # A rank that joined before anything was committed begins as all did.
    assert not problem(1, wanted, joining={1: None}, **decided)
