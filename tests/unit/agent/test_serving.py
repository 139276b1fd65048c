"""What a node lists of its data, and what it sends: nothing that it does not hold as said."""

import asyncio
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from everstep.agent import events, inventory
from everstep.agent.inventory import MEMORY, NVME
from everstep.agent.job import RoundStage, Stage
from everstep.agent.receiving import Expected, Receiver
from everstep.agent.tickets import IssuedTicket
from everstep.kernels.digest import digest_units
from everstep.proto import peer_pb2
from everstep.proto.errors import (
    EverstepError,
    FormatInvalid,
    InvalidName,
    PeerUnavailable,
    Refused,
)
from everstep.proto.ids import UNIT_BYTES, SnapshotId
from everstep.snapshot.record import open_record

from .serving_node import ALONE, GROUP, LEVELS, pins, publish_parity, run
from .small_nodes import JOB, SNAPSHOT, Shards, SmallNode

DEADLINE_S = 20.0


async def eventually(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, what
        await asyncio.sleep(0.005)


def open_shard(
    rank: int, ranges: Sequence[tuple[int, int]], level: str = MEMORY, **changed: Any
) -> peer_pb2.OpenRequest:
    units = [peer_pb2.UnitRange(first=first, count=count) for first, count in ranges]
    named = {"job": JOB, "incarnation": SNAPSHOT.incarnation, "step": SNAPSHOT.step} | changed
    shard = peer_pb2.ShardUnits(rank=rank, units=units)
    return peer_pb2.OpenRequest(level=level, shard=shard, **named)


def open_parity(
    row: int, first: int, count: int, level: str = MEMORY, plan_id: str = "plan-1", **changed: Any
) -> peer_pb2.OpenRequest:
    named = {"job": JOB, "incarnation": SNAPSHOT.incarnation, "step": SNAPSHOT.step} | changed
    units = peer_pb2.UnitRange(first=first, count=count)
    parity = peer_pb2.ParityUnits(plan_id=plan_id, row=row, units=units)
    return peer_pb2.OpenRequest(level=level, parity=parity, **named)


async def fetch(ticket: peer_pb2.Ticket, expected: list[Expected]) -> bytes:
    issued = IssuedTicket(ticket.token, ticket.address, ticket.units, ticket.bytes)

    def receive() -> bytes:
        buffer, whole = memoryview(bytearray(UNIT_BYTES)), b""
        with Receiver(issued, "n1", expected, connect_timeout_s=5, stall_timeout_s=5) as receiver:
            for _ in expected:
                whole += bytes(buffer[: receiver.read_into(buffer)])
        return whole

    return await asyncio.to_thread(receive)


def expected_of(shards: Shards, rank: int, units: Sequence[int]) -> list[Expected]:
    record = open_record(shards.records[rank], "test")
    return [
        Expected(
            unit,
            min(UNIT_BYTES, record.image_bytes - unit * UNIT_BYTES),
            record.unit_digests[unit * 16 : unit * 16 + 16],
        )
        for unit in units
    ]


@pytest.mark.parametrize("level", LEVELS)
def test_units_of_a_shard_arrive(tmp_path: Path, level: str) -> None:
    async def body(node: SmallNode) -> None:
        node.hold(ALONE, slot=1)
        node.hold_on_disk(ALONE)
        for rank, ranges in ((0, [(0, 4)]), (0, [(1, 1), (3, 1)]), (0, [(3, 1)]), (1, [(0, 1)])):
            units = [unit for first, count in ranges for unit in range(first, first + count)]
            ticket = await node.serving.open(open_shard(rank, ranges, level))
            got = await fetch(ticket, expected_of(ALONE, rank, units))
            image = ALONE.images[rank]
            assert got == b"".join(image[u * UNIT_BYTES : (u + 1) * UNIT_BYTES] for u in units)
        await eventually(lambda: node.bulk.counters["completed"] == 4, "the streams did not end")

    run(tmp_path, body)


@pytest.mark.parametrize("level", LEVELS)
def test_units_of_a_rows_parity_arrive(tmp_path: Path, level: str) -> None:
    async def body(node: SmallNode) -> None:
        rows = GROUP.plan(2).rows()
        data = os.urandom(rows.parity_file_units(0) * UNIT_BYTES)
        envelope = publish_parity(node, GROUP, 0, data, parities=2)
        if level == NVME:
            node.nvme.parity.store(JOB, SNAPSHOT, memoryview(data), envelope)
            node.parity.delete(JOB, "plan-1")
        digests = digest_units(data, UNIT_BYTES)
        assert [row for row, _ in rows.rows_of(0)] == [0, 2]
        for row, _ in rows.rows_of(0):
            extent = rows.parity_extent(0, row)
            ticket = await node.serving.open(open_parity(row, 1, len(extent) - 1, level))
            expected = [
                Expected(unit, UNIT_BYTES, digests[held * 16 : held * 16 + 16])
                for unit, held in enumerate(extent)
            ]
            got = await fetch(ticket, expected[1:])
            assert got == data[(extent.start + 1) * UNIT_BYTES : extent.stop * UNIT_BYTES]

    run(tmp_path, body)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(
    ("changed", "kind"),
    [
        ({"job": "other"}, FormatInvalid),
        ({"job": "../gpt"}, InvalidName),
        ({"step": 41}, FormatInvalid),
        ({"incarnation": 1}, FormatInvalid),
        ({"level": "tape"}, Refused),
        ({"rank": 2}, FormatInvalid),
        ({"ranges": [(4, 1)]}, Refused),
        ({"ranges": [(0, 5)]}, Refused),
        ({"ranges": [(0, 1 << 63)]}, Refused),
        ({"ranges": [(1, 1), (1, 1)]}, Refused),
        ({"ranges": [(2, 1), (0, 1)]}, Refused),
        ({"ranges": [(0, 0)]}, Refused),
        ({"ranges": [(0, 0), (1, 1)]}, Refused),
        ({"ranges": []}, Refused),
    ],
)
def test_what_is_not_there_is_refused(
    tmp_path: Path, level: str, changed: dict[str, Any], kind: type[EverstepError]
) -> None:
    async def body(node: SmallNode) -> None:
        node.hold(ALONE)
        node.hold_on_disk(ALONE)
        given = {"rank": 0, "ranges": [(0, 1)], "level": level} | changed
        before = len(os.listdir("/proc/self/fd"))
        with pytest.raises(kind):
            await node.serving.open(open_shard(**given))
        await asyncio.sleep(0)
        await eventually(lambda: pins(node) == 0, "it stays pinned")
        assert len(os.listdir("/proc/self/fd")) == before

    run(tmp_path, body)


@pytest.mark.parametrize(
    ("changed", "kind"),
    [
        ({"plan_id": "plan-2"}, FormatInvalid),
        ({"plan_id": "../x"}, InvalidName),
        ({"step": 41}, FormatInvalid),
        ({"row": 1}, Refused),
        ({"row": 3}, Refused),
        ({"count": 9}, Refused),
        ({"count": 0}, Refused),
        ({"level": NVME}, FormatInvalid),
        ({"job": "other"}, FormatInvalid),
    ],
)
def test_parity_that_is_not_there_is_refused(
    tmp_path: Path, changed: dict[str, Any], kind: type[EverstepError]
) -> None:
    async def body(node: SmallNode) -> None:
        units = GROUP.plan(1).rows().parity_file_units(0)
        publish_parity(node, GROUP, 0, bytes(units * UNIT_BYTES))
        before = len(os.listdir("/proc/self/fd"))
        with pytest.raises(kind):
            await node.serving.open(open_parity(**({"row": 0, "first": 0, "count": 1} | changed)))
        assert len(os.listdir("/proc/self/fd")) == before

    run(tmp_path, body)


def test_parity_of_another_length_than_its_plan_is_refused(tmp_path: Path) -> None:
    async def body(node: SmallNode) -> None:
        publish_parity(node, GROUP, 0, bytes(UNIT_BYTES))
        with pytest.raises(FormatInvalid, match="does not follow from its plan"):
            await node.serving.open(open_parity(0, 0, 1))

    run(tmp_path, body)


def test_a_slot_stays_until_its_stream_ended(tmp_path: Path) -> None:
    async def body(node: SmallNode) -> None:
        node.hold(ALONE)
        node.hold(Shards(ALONE.sizes, SnapshotId(2, 41)), slot=1)
        job = node.state.jobs[JOB]
        ticket = await node.serving.open(open_shard(0, [(0, 4)]))
        older = job.snapshots[SNAPSHOT]
        assert older not in job.evictable()
        node.state.drop(job, older, "on purpose")
        assert older not in job.evictable()
        got = await fetch(ticket, expected_of(ALONE, 0, range(4)))
        assert got == ALONE.images[0]
        await eventually(lambda: older in job.evictable(), "it stays pinned")

    run(tmp_path, body)


def test_a_ticket_that_nobody_uses_gives_the_slot_back(tmp_path: Path) -> None:
    async def body(node: SmallNode) -> None:
        node.hold(ALONE)
        before = len(os.listdir("/proc/self/fd"))
        await node.serving.open(open_shard(0, [(0, 4)]))
        assert pins(node) == 1
        node.bulk.close()
        await eventually(lambda: pins(node) == 0, "it stays pinned")
        assert len(os.listdir("/proc/self/fd")) <= before

    run(tmp_path, body)


def test_without_room_for_another_ticket_nothing_stays_open(tmp_path: Path) -> None:
    async def body(node: SmallNode) -> None:
        node.hold(ALONE)
        for _ in range(64):
            await node.serving.open(open_shard(0, [(0, 1)]))
        before = len(os.listdir("/proc/self/fd"))
        with pytest.raises(PeerUnavailable):
            await node.serving.open(open_shard(0, [(0, 1)]))
        await eventually(lambda: pins(node) == 64, "it stays pinned")
        assert len(os.listdir("/proc/self/fd")) == before

    run(tmp_path, body)


def test_a_caller_that_leaves_leaves_nothing_open(tmp_path: Path) -> None:
    async def body(node: SmallNode) -> None:
        node.hold(ALONE)
        before = len(os.listdir("/proc/self/fd"))
        asked = asyncio.create_task(node.serving.open(open_shard(0, [(0, 4)])))
        await asyncio.sleep(0)
        assert pins(node) == 1
        asked.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asked
        await eventually(lambda: pins(node) == 0, "it stays pinned")
        assert len(os.listdir("/proc/self/fd")) == before

    run(tmp_path, body)


def test_the_inventory_is_what_is_held(tmp_path: Path) -> None:
    async def body(node: SmallNode) -> None:
        newer = Shards(ALONE.sizes, SnapshotId(2, 41))
        node.hold(newer, slot=1)
        node.hold_on_disk(ALONE)
        reply = await node.serving.inventory(peer_pb2.InventoryRequest(job=JOB))
        found = inventory.parsed(reply)
        assert found.node_id == "n1"
        assert not found.problems
        held = {
            s.snapshot: (s.world, [(x.rank, x.level) for x in s.shards]) for s in found.snapshots
        }
        assert held == {
            SNAPSHOT: (2, [(0, NVME), (1, NVME)]),
            newer.snapshot: (2, [(0, MEMORY), (1, MEMORY)]),
        }
        planned = {shard.rank: shard for shard in newer.plan(1).members[0].shards}
        for shard in found.snapshots[1].shards:
            plan = planned[shard.rank]
            assert (shard.image_bytes, shard.layout_id) == (plan.image_bytes, plan.layout_id)
            assert shard.record_digest == plan.record_digest

    run(tmp_path, body)


def test_only_facts_are_in_the_inventory(tmp_path: Path) -> None:
    async def body(node: SmallNode) -> None:
        node.hold(ALONE)
        job = node.state.jobs[JOB]
        snapshot = job.snapshots[SNAPSHOT]

        async def held() -> bool:
            request = peer_pb2.InventoryRequest(job=JOB)
            listed = bool((await node.serving.inventory(request)).snapshots)
            assert node.pipeline.submit(events.Pin(JOB, SNAPSHOT)) == listed
            if listed:
                node.pipeline.submit(events.Unpin(JOB, SNAPSHOT))
            return listed

        assert await held()
        snapshot.stage = Stage.OPEN
        assert await held()
        snapshot.verified = False
        assert not await held()
        snapshot.verified = True
        snapshot.sealing[5] = snapshot.sealed[0]
        assert not await held()
        snapshot.sealing.clear()
        node.state.drop(job, snapshot, "on purpose")
        assert not await held()

    run(tmp_path, body)


def test_parity_in_the_inventory(tmp_path: Path) -> None:
    async def body(node: SmallNode) -> None:
        async def listed() -> list[tuple[str, str]]:
            reply = await node.serving.inventory(peer_pb2.InventoryRequest(job=JOB))
            found = inventory.parsed(reply)
            assert not found.problems
            return [(p.plan.plan_id, p.level) for s in found.snapshots for p in s.parities]

        rows = GROUP.plan(1).rows()
        data = bytes(rows.parity_file_units(0) * UNIT_BYTES)
        envelope = publish_parity(node, GROUP, 0, data)
        assert await listed() == [("plan-1", MEMORY)]  # of a job that only the directory knows
        node.hold(GROUP)
        assert await listed() == []
        job = node.state.jobs[JOB]
        node.state.handle(events.PrepareOrdered(GROUP.plan(1)), 0.0)
        assert job.rounds["plan-1"].stage is RoundStage.ENCODING
        assert await listed() == []
        node.pipeline.submit(events.Encoded(JOB, "plan-1"))
        assert await listed() == [("plan-1", MEMORY)]
        node.nvme.parity.store(JOB, SNAPSHOT, memoryview(data), envelope)
        assert await listed() == [("plan-1", NVME), ("plan-1", MEMORY)]

    run(tmp_path, body)


def test_damaged_files_are_named_and_cost_no_other(tmp_path: Path) -> None:
    async def body(node: SmallNode) -> None:
        node.hold(ALONE)
        node.hold_on_disk(ALONE)
        record = next((tmp_path / "n1" / "nvme").rglob("rank-00000.record"))
        record.write_bytes(b"rubbish")
        reply = await node.serving.inventory(peer_pb2.InventoryRequest(job=JOB))
        held = [(s.rank, s.level) for snapshot in reply.snapshots for s in snapshot.shards]
        assert held == [(0, MEMORY), (1, MEMORY), (1, NVME)]
        assert any("rank-00000" in problem for problem in reply.problems)

    run(tmp_path, body)


def test_a_job_that_only_disks_know(tmp_path: Path) -> None:
    async def body(node: SmallNode) -> None:
        node.hold(ALONE)
        node.hold_on_disk(ALONE)
        del node.state.jobs[JOB]
        reply = await node.serving.inventory(peer_pb2.InventoryRequest(job=JOB))
        held = [(s.rank, s.level) for snapshot in reply.snapshots for s in snapshot.shards]
        assert held == [(0, NVME), (1, NVME), (0, MEMORY), (1, MEMORY)]
        reply = await node.serving.inventory(peer_pb2.InventoryRequest(job="unheard-of"))
        assert not reply.snapshots
        assert not reply.problems

    run(tmp_path, body)


def test_a_slot_that_was_overwritten_is_noticed_by_the_receiver(tmp_path: Path) -> None:
    async def body(node: SmallNode) -> None:
        node.hold(ALONE)
        node.overwrite(0, UNIT_BYTES, b"rotten")
        ticket = await node.serving.open(open_shard(0, [(0, 2)]))
        with pytest.raises(EverstepError, match="n1"):
            await fetch(ticket, expected_of(ALONE, 0, range(2)))

    run(tmp_path, body)
