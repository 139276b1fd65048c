"""Shards brought back: held as before, byte for byte, or not at all."""

import asyncio
import os
import subprocess
import sys
from collections.abc import Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from everstep.agent.actions import Encode
from everstep.agent.adoption import adoptions
from everstep.agent.job import Member, RoundStage, Stage
from everstep.agent.mending import Mending
from everstep.agent.sources import SnapshotPlan
from everstep.proto import peer_pb2 as wire
from everstep.proto.errors import OutOfSpace, ShardCorrupt
from everstep.proto.ids import UNIT_BYTES
from everstep.snapshot.reading import Shard, ShardReader, units_of
from everstep.snapshot.record import record_digest
from everstep.storage.staging import Staging

from .several_nodes import JOB, PLAN, SNAPSHOT, Group, group_of
from .small_nodes import SmallNode

Body = Callable[[Group, Mending], Coroutine[Any, Any, None]]


def mending_of(group: Group, name: str) -> Mending:
    node = group.nodes[name]
    node.pipeline.staging = Staging(node.memory.root, keep_free_bytes=0)
    return Mending(node.pipeline, group.fetching[name])


def run(root: Path, parities: int, body: Body, *, at: str = "spare", **how: Any) -> None:
    async def whole() -> None:
        async with group_of(root, parities, spare=["spare"], **how) as group:
            mending = mending_of(group, at)
            try:
                await body(group, mending)
            finally:
                mending.close()

    asyncio.run(whole())


def in_memory(node: SmallNode, rank: int) -> bytes:
    with node.memory.open_shard(JOB, SNAPSHOT, rank) as shard:
        return bytes(shard.image)


async def mended(
    mending: Mending, plan: SnapshotPlan, ranks: list[int], *, parity: bool = False
) -> list[wire.MendProgress]:
    request = wire.MendRequest(job=JOB, plan=plan.encoded(), ranks=ranks, parity=parity)
    return [progress async for progress in mending.mend(request)]


def test_lost_shards_are_held_again_and_can_be_lost_again(tmp_path: Path) -> None:
    async def body(group: Group, mending: Mending) -> None:
        plan = replace(await group.plan_of(("n3",)), commit_id=b"c" * 16)
        told = await mended(mending, plan, [2, 4, 6])
        assert told[-1].ended
        assert not any(progress.problem for progress in told)
        done = {progress.what: progress.done_bytes for progress in told if progress.what}
        assert done == {f"rank {r}": len(group.shards[r].image) for r in (2, 4, 6)}
        node = group.nodes["spare"]
        held = node.state.jobs[JOB].snapshots[SNAPSHOT]
        assert held.stage is Stage.COMMITTED and held.commit_id == plan.commit_id
        for rank in (2, 4, 6):
            assert in_memory(node, rank) == group.shards[rank].image
            assert node.memory.verify(JOB, SNAPSHOT, rank) == []
            shard = group.shards[rank]
            assert held.sealed[rank].record_digest == record_digest(shard.envelope)
            assert node.memory.layout(JOB, shard.layout.layout_id) == shard.layout_envelope
        # Now the planner finds them here, and another node may go.
        again = await group.plan_of(("n1",))
        assert again.recoverable
        assert {again.source_of(rank).node_id for rank in (2, 4, 6)} == {"spare"}  # type: ignore[union-attr]

    run(tmp_path, 2, body)


def test_what_is_here_is_left_alone(tmp_path: Path) -> None:
    async def body(group: Group, mending: Mending) -> None:
        plan = await group.plan_of(("n3",))
        await mended(mending, plan, [2])
        group.asked.clear()
        told = await mended(mending, plan, [2])
        assert told[-1].ended and not group.asked
        assert len(group.nodes["spare"].memory.arenas(JOB)) == 1

    run(tmp_path, 1, body)


def test_what_an_agent_found_at_its_start_is_left_alone(tmp_path: Path) -> None:
    """Sealed here and verified, but not judged yet by all nodes."""

    async def body(group: Group, mending: Mending) -> None:
        plan = await group.plan_of()
        node = group.nodes["n3"]
        del node.state.jobs[JOB]
        for adopted in adoptions(node.memory, None):
            node.pipeline.submit(adopted)
        await node.pipeline.idle(20)
        assert node.state.jobs[JOB].snapshots[SNAPSHOT].stage is Stage.OPEN
        await mending.install(JOB, plan, (2,))
        assert len(node.memory.arenas(JOB)) == 3

    run(tmp_path, 1, body, at="n3")


def test_what_is_damaged_here_is_replaced(tmp_path: Path) -> None:
    async def body(group: Group, mending: Mending) -> None:
        node = group.nodes["n3"]
        node.overwrite(2, 77, b"rot")
        plan = await group.plan_of(erasures=[group.erase("n3", 2)])
        await mending.install(JOB, plan, (2,), anew=True)
        assert in_memory(node, 2) == group.shards[2].image
        assert [held.generation for held in node.memory.records(JOB) if held.rank == 2] == [2]
        assert node.state.jobs[JOB].snapshots[SNAPSHOT].sealed[2].place.generation == 2

    run(tmp_path, 1, body, at="n3")


def test_two_at_once_do_it_once(tmp_path: Path) -> None:
    async def body(group: Group, mending: Mending) -> None:
        plan = await group.plan_of(("n3",))
        await asyncio.gather(*[mending.install(JOB, plan, (2,)) for _ in range(3)])
        assert len(group.nodes["spare"].memory.arenas(JOB)) == 1
        assert in_memory(group.nodes["spare"], 2) == group.shards[2].image

    run(tmp_path, 1, body)


def test_the_slots_are_as_a_trainer_would_reserve_them(tmp_path: Path) -> None:
    async def body(group: Group, mending: Mending) -> None:
        plan = await group.plan_of(("n3",))
        await mended(mending, plan, [4])
        node = group.nodes["spare"]
        (arena,) = node.memory.arenas(JOB)
        assert arena.slot_count == node.config.memory.slots
        assert arena.slot_bytes == 65536  # 14 096 bytes, rounded
        assert [a.generation for a in node.state.jobs[JOB].arenas[4]] == [arena.generation]

    run(tmp_path, 1, body)


def test_a_failure_claims_nothing_and_the_next_attempt_goes_on(tmp_path: Path) -> None:
    async def body(group: Group, mending: Mending) -> None:
        plan = await group.plan_of(("n3",))
        group.down.add("n1")
        told = await mended(mending, plan, [2, 6])
        problems = [progress.problem for progress in told if progress.problem]
        assert len(problems) == 2 and "n1" in problems[0]
        assert told[-1].ended
        node = group.nodes["spare"]
        assert node.memory.records(JOB) == []
        assert JOB not in node.state.jobs
        group.down.discard("n1")
        told = await mended(mending, plan, [2, 6])
        assert not any(progress.problem for progress in told)
        assert in_memory(node, 6) == group.shards[6].image
        assert len(node.memory.arenas(JOB)) == 2

    run(tmp_path, 1, body)


def test_a_slot_that_was_left_half_filled_is_used_again(tmp_path: Path) -> None:
    async def body(group: Group, mending: Mending) -> None:
        plan = await group.plan_of(("n3",))
        node = group.nodes["spare"]
        await mended(mending, plan, [4])
        before = node.memory.arenas(JOB)
        # As an agent finds it that died before the record.
        node.memory.drop(JOB, 4, 1, 0)
        del node.state.jobs[JOB]
        for adopted in adoptions(node.memory, None):
            node.pipeline.submit(adopted)
        assert SNAPSHOT not in node.state.jobs[JOB].snapshots
        await mended(mending, plan, [4])
        assert node.memory.arenas(JOB) == before
        assert in_memory(node, 4) == group.shards[4].image

    run(tmp_path, 1, body)


def test_the_arena_of_a_trainer_is_not_touched(tmp_path: Path) -> None:
    async def body(group: Group, mending: Mending) -> None:
        plan = await group.plan_of(("n3",))
        node = group.nodes["spare"]
        slots = node.config.memory.slots
        theirs = node.memory.reserve(JOB, 4, 1, slots, 65536)
        with node.memory.writable(theirs, 0, 65536) as view:
            view[:] = b"t" * 65536
        for adopted in adoptions(node.memory, None):
            node.pipeline.submit(adopted)
        node.state.jobs[JOB].members[4] = Member("process", 1, 1.0, attached=False)
        await mended(mending, plan, [4])
        assert [arena.generation for arena in node.memory.arenas(JOB)] == [1, 2]
        assert in_memory(node, 4) == group.shards[4].image
        with node.memory.image(theirs, 0, 65536) as image:
            assert bytes(image.image) == b"t" * 65536

    run(tmp_path, 1, body)


def test_a_damaged_source_installs_nothing(tmp_path: Path) -> None:
    async def body(group: Group, mending: Mending) -> None:
        plan = await group.plan_of()
        group.nodes["n3"].overwrite(2, 77, b"rot")
        with pytest.raises(ShardCorrupt, match="n3"):
            await mending.install(JOB, plan, (2,))
        assert group.nodes["spare"].memory.records(JOB) == []

    run(tmp_path, 1, body)


def test_the_quota_holds(tmp_path: Path) -> None:
    async def body(group: Group, mending: Mending) -> None:
        plan = await group.plan_of(("n3",))
        with pytest.raises(OutOfSpace, match="quota"):
            await mending.install(JOB, plan, (2,))
        assert group.nodes["spare"].memory.arenas(JOB) == []

    run(tmp_path, 1, body, memory__quota_bytes="1 MiB")


def test_a_caller_that_leaves_does_not_give_the_slot_free(tmp_path: Path) -> None:
    async def body(group: Group, mending: Mending) -> None:
        plan = await group.plan_of(("n3",))
        under_way, go_on = asyncio.Event(), asyncio.Event()
        handle = group.calls["spare"].handlers["Rebuild"]

        async def held(node: str, request: Any) -> Any:
            under_way.set()
            await go_on.wait()
            return await handle(node, request)

        group.calls["spare"].handlers["Rebuild"] = held
        first = asyncio.create_task(mending.install(JOB, plan, (2,)))
        await asyncio.wait_for(under_way.wait(), 20)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        described = group.asked.count(("n1", "Describe"))
        second = asyncio.create_task(mending.install(JOB, plan, (2,)))
        go_on.set()
        await asyncio.wait_for(second, 20)
        # It waited for the first, and found the work done.
        assert group.asked.count(("n1", "Describe")) == described == 1
        assert len(group.nodes["spare"].memory.arenas(JOB)) == 1
        assert in_memory(group.nodes["spare"], 2) == group.shards[2].image

    run(tmp_path, 1, body)


def test_staged_units_are_what_a_restoring_rank_reads(tmp_path: Path) -> None:
    async def body(group: Group, mending: Mending) -> None:
        plan = await group.plan_of(("n3",))
        for rank in (2, 5):
            shard = group.shards[rank]
            ranges = [
                (leaf.offset, leaf.offset + leaf.held_bytes)
                for leaf in shard.layout.leaves
                if leaf.replicated
            ]
            units = units_of(ranges, len(shard.image))
            path = await mending.stage(JOB, plan, rank, units, shard.record)
            staged = Shard(rank, str(path), 0, shard.layout, shard.record, "memory")
            with ShardReader(staged) as reader:
                reader.verify(ranges)
            assert path.stat().st_size == len(shard.image)

    run(tmp_path, 1, body)


def test_a_staged_file_has_no_memory_behind_what_is_not_wanted(tmp_path: Path) -> None:
    sizes = {"n1": {0: 18 * UNIT_BYTES}, "n2": {1: 1000}}

    async def body(group: Group, mending: Mending) -> None:
        plan = await group.plan_of()
        shard = group.shards[0]
        path = await mending.stage(JOB, plan, 0, [range(2, 4)], shard.record)
        data = path.read_bytes()
        right = bytearray(len(shard.image))
        right[2 * UNIT_BYTES : 4 * UNIT_BYTES] = shard.image[2 * UNIT_BYTES : 4 * UNIT_BYTES]
        assert data == right
        assert path.stat().st_blocks * 512 < 4 * UNIT_BYTES

    run(tmp_path, 1, body, sizes=sizes)


def test_parity_is_made_anew_where_this_node_has_part_in_it(tmp_path: Path) -> None:
    async def body(group: Group, mending: Mending) -> None:
        node = group.nodes["n1"]
        encodes: list[Any] = []
        node.pipeline._performers[Encode] = encodes.append
        plan = await group.plan_of()
        await mended(mending, plan, [0, 3], parity=True)
        assert [action.plan.plan_id for action in encodes] == [PLAN]
        assert node.state.jobs[JOB].rounds[PLAN].stage is RoundStage.MENDING

    run(tmp_path, 1, body, at="n1")


def test_a_node_without_part_in_the_round_skips_it(tmp_path: Path) -> None:
    async def body(group: Group, mending: Mending) -> None:
        plan = await group.plan_of(("n3",))
        told = await mended(mending, plan, [2], parity=True)
        assert told[-1].ended and not any(progress.problem for progress in told)

    run(tmp_path, 1, body)


def test_a_rank_that_the_plan_does_not_have_is_a_problem_of_its_own(tmp_path: Path) -> None:
    async def body(group: Group, mending: Mending) -> None:
        plan = await group.plan_of(("n3",))
        told = await mended(mending, plan, [4, 99])
        assert [progress.what for progress in told if progress.problem] == ["rank 99"]
        assert in_memory(group.nodes["spare"], 4) == group.shards[4].image

    run(tmp_path, 1, body)


_KILLED = """
import asyncio, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from unit.agent.several_nodes import group_of, JOB
from unit.agent.test_mending import mended, mending_of

async def whole():
    async with group_of(Path(sys.argv[1]), 1, spare=["spare"]) as group:
        plan = await group.plan_of(("n3",))
        await mended(mending_of(group, "spare"), plan, [4])

asyncio.run(whole())
"""


@pytest.mark.parametrize(
    ("point", "recorded"), [("agent.mend.before_record", 0), ("agent.mend.after_record", 1)]
)
def test_killed_at_the_record_it_is_held_whole_or_not_at_all(
    tmp_path: Path, point: str, recorded: int
) -> None:
    tests = Path(__file__).resolve().parents[2]
    environ = {**os.environ, "EVERSTEP_FAILPOINTS": f"{point}=kill"}
    command = [sys.executable, "-c", _KILLED, str(tmp_path), str(tests)]
    ended = subprocess.run(command, env=environ, timeout=60, capture_output=True, check=False)
    assert ended.returncode == -9, ended.stderr.decode()

    async def body() -> None:
        node = SmallNode("spare", tmp_path)
        try:
            for adopted in adoptions(node.memory, None):
                node.pipeline.submit(adopted)
            held = node.memory.records(JOB)
            assert len(held) == recorded
            assert len(node.state.jobs[JOB].snapshots) == recorded
            if recorded:
                assert node.memory.verify(JOB, SNAPSHOT, 4) == []
        finally:
            await node.close()

    asyncio.run(body())
