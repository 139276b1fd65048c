"""Parity of real nodes in one process, compared with the plain sum of what the nodes hold."""

import asyncio
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from everstep.agent import contributions
from everstep.agent.job import RoundStage
from everstep.agent.sending import BufferPiece, Source
from everstep.kernels.digest import digest_units
from everstep.proto import peer_pb2
from everstep.proto.errors import PeerUnavailable, Refused
from everstep.proto.ids import SnapshotId
from everstep.snapshot.record import open_record, seal_record

from .encoding_group import (
    DEADLINE_S,
    FOUR,
    UNIT,
    Group,
    nothing_is_published,
    one_each,
    parity_of,
    run,
)
from .small_nodes import JOB, LAYOUT, LAYOUT_ID, SNAPSHOT, STALL_TIMEOUT_S, Shards, record_of

SEVERAL_RANKS = {
    "n1": {0: UNIT + 5, 4: 2 * UNIT, 5: 9},
    "n2": {1: 3 * UNIT + 1, 6: 0},
    "n3": {2: 12, 3: 2 * UNIT - 1},
}


@pytest.mark.parametrize(
    ("sizes", "parities"),
    [
        (one_each(2 * UNIT, 2 * UNIT, 2 * UNIT), 1),
        (FOUR, 1),
        (FOUR, 2),
        (FOUR, 3),
        (SEVERAL_RANKS, 1),
        (SEVERAL_RANKS, 2),
        (one_each(UNIT, UNIT + 1, UNIT - 1, 1), 1),
        ({"n1": {0: 3 * UNIT + 9}, "n2": {}, "n3": {1: UNIT}, "n4": {}}, 2),
        ({"n1": {}, "n2": {0: 100}}, 1),
        ({"n1": {}, "n2": {}, "n3": {}}, 1),
        (one_each(0, 0, 5), 1),
    ],
)
def test_parity_is_the_sum_that_the_design_says(
    tmp_path: Path, sizes: Mapping[str, Mapping[int, int]], parities: int
) -> None:
    async def body(group: Group) -> None:
        group.encode()
        rows = group.plan.rows()
        for member, node_id in enumerate(group.nodes):
            assert await group.answer(node_id) == ""
            published = group.published(node_id)
            assert published is not None
            data, manifest = published
            assert data == parity_of(group.plan, member, group.shards)
            assert manifest.plan == group.plan.encoded()
            assert manifest.member == member
            assert manifest.unit_digests == (digest_units(data, UNIT) if data else b"")
            assert {s.rank: s.record for s in manifest.records} == group.shards.records
            assert abs(manifest.encoded_unix_s - time.time()) < DEADLINE_S
            node = group.nodes[node_id]
            assert node.parity.verify(JOB, group.plan.plan_id) == []
            if group.shards.records:
                assert node.memory.layout(JOB, LAYOUT_ID) == LAYOUT
            assert node.state.jobs[JOB].rounds[group.plan.plan_id].stage is RoundStage.PREPARED
            counters = group.encodings[node_id].counters
            assert counters["bytes_received"] <= rows.received_units(member) * UNIT
            assert counters["published"] == 1
        sent = sum(node.bulk.counters["bytes_sent"] for node in group.nodes.values())
        total = sum(len(image) for image in group.shards.images.values())
        received = sum(made.counters["bytes_received"] for made in group.encodings.values())
        assert received == sent == parities * total

    run(tmp_path, sizes, parities, body)


def test_a_round_after_a_round_with_what_the_file_held_before(tmp_path: Path) -> None:
    async def body(group: Group) -> None:
        room = group.nodes["n1"].parity.reserve(JOB, "older", 8 * UNIT)
        room.view[:] = os.urandom(8 * UNIT)
        room.close()
        group.encode("n1")
        assert await group.answer("n1") == ""
        published = group.published("n1")
        assert published is not None
        assert published[0] == parity_of(group.plan, 0, group.shards)
        assert len(list((tmp_path / "n1" / "memory").rglob("*.parity"))) == 1

    run(tmp_path, one_each(UNIT, 3, 2 * UNIT + 9), 1, body)


def overwritten(group: Group) -> None:
    group.nodes["n3"].overwrite(2, 2 * UNIT + 17, b"rotten")  # n1 encodes units 2 and 3 of it


def gone(group: Group) -> None:
    state = group.nodes["n3"].state
    state.drop(state.jobs[JOB], state.jobs[JOB].snapshots[SNAPSHOT], "on purpose")


def stopped(group: Group) -> None:
    group.nodes["n3"].bulk.close()


def unreachable(group: Group) -> None:
    async def describe(node_id: str, request: Any) -> Any:
        if node_id == "n3":
            raise PeerUnavailable("n3", "it is gone")
        return await group.nodes[node_id].serving.describe(request)

    group.calls["n1"].handlers["Describe"] = describe


def silent(group: Group) -> None:
    async def describe(node_id: str, request: Any) -> Any:
        if node_id == "n3":
            await asyncio.sleep(DEADLINE_S)
        return await group.nodes[node_id].serving.describe(request)

    group.calls["n1"].handlers["Describe"] = describe


def another_record(group: Group) -> None:
    shards = group.shards
    image = os.urandom(len(shards.images[2]))
    _describing(group, 2, record_of(2, image, shards.world), LAYOUT)


def another_capture(group: Group) -> None:
    record = open_record(group.shards.records[2], "")
    record.captured_unix_s += 1
    _describing(group, 2, seal_record(record), LAYOUT)


def another_layout(group: Group) -> None:
    _describing(group, 2, group.shards.records[2], LAYOUT[:-1] + b"x")


def no_layout(group: Group) -> None:
    _describing(group, 2, group.shards.records[2], b"")


def rubbish(group: Group) -> None:
    _describing(group, 2, b"rubbish", LAYOUT)


def _describing(group: Group, rank: int, record: bytes, layout: bytes) -> None:
    async def describe(node_id: str, request: Any) -> Any:
        reply = await group.nodes[node_id].serving.describe(request)
        for shard in reply.shards:
            if shard.rank == rank:
                shard.record, shard.layout = record, layout
        return reply

    group.calls["n1"].handlers["Describe"] = describe


@pytest.mark.parametrize(
    "damage",
    [
        overwritten,
        gone,
        stopped,
        unreachable,
        silent,
        another_record,
        another_capture,
        another_layout,
        no_layout,
        rubbish,
    ],
)
def test_a_member_that_does_not_do_its_part_is_named(
    tmp_path: Path, damage: Callable[[Group], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contributions, "RETRIES", 2)

    async def body(group: Group) -> None:
        damage(group)
        group.encode("n1")
        problem = await group.answer("n1")
        assert "n3" in problem
        assert "unexpectedly" not in problem
        await nothing_is_published(group, "n1")
        assert group.encodings["n1"].counters["failed"] == 1
        assert group.nodes["n1"].state.jobs[JOB].rounds["plan-1"].stage is RoundStage.FAILED

    run(tmp_path, FOUR, 1, body)


def feed(units: Sequence[tuple[int, bytes, bytes]]) -> Source:
    return Source([BufferPiece(i, memoryview(d), digest) for i, d, digest in units], lambda: None)


def test_a_member_that_lies_about_a_digest_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contributions, "RETRIES", 2)

    async def body(group: Group) -> None:
        async def lie(node_id: str, request: peer_pb2.OpenRequest) -> peer_pb2.Ticket:
            if node_id != "n3":
                return await group.nodes[node_id].serving.open(request)
            units = []
            for asked in request.shard.units:
                for unit in range(asked.first, asked.first + asked.count):
                    length = min(UNIT, len(group.shards.images[2]) - unit * UNIT)
                    data = bytes(length)
                    units.append((unit, data, digest_units(data, UNIT)))
            ticket = group.nodes["n3"].bulk.issue(feed(units))
            return peer_pb2.Ticket(
                token=ticket.token,
                address=ticket.address,
                units=ticket.units,
                bytes=ticket.bytes,
            )

        group.calls["n1"].handlers["Open"] = lie
        group.encode("n1")
        assert "n3" in await group.answer("n1")
        await nothing_is_published(group, "n1")

    run(tmp_path, FOUR, 1, body)


def test_when_a_stream_fails_the_others_stop(tmp_path: Path) -> None:
    async def body(group: Group) -> None:
        async def open_late(node_id: str, request: peer_pb2.OpenRequest) -> peer_pb2.Ticket:
            if node_id == "n3":
                raise Refused("on purpose")
            (running,) = group.encodings["n1"]._running.values()
            await asyncio.to_thread(running.halt.wait, STALL_TIMEOUT_S / 2)
            return await group.nodes[node_id].serving.open(request)

        group.calls["n1"].handlers["Open"] = open_late
        group.encode("n1")
        assert (await group.answer("n1")).startswith("n3: on purpose")
        assert group.encodings["n1"].counters["bytes_received"] == 0

    run(tmp_path, FOUR, 1, body)


def test_a_stream_that_breaks_is_resumed_from_the_first_missing_unit(tmp_path: Path) -> None:
    async def body(group: Group) -> None:
        asked: list[tuple[int, int]] = []

        async def break_once(node_id: str, request: peer_pb2.OpenRequest) -> peer_pb2.Ticket:
            serving = group.nodes[node_id].serving
            if node_id != "n3":
                return await serving.open(request)
            units = request.shard.units[0]
            asked.append((units.first, units.count))
            if len(asked) > 1:
                return await serving.open(request)
            record = open_record(group.shards.records[2], "")
            image = group.shards.images[2]
            good = image[units.first * UNIT :][:UNIT]
            digest = record.unit_digests[units.first * 16 :][:16]
            following = units.first + 1
            broken = (following, bytes(UNIT), record.unit_digests[following * 16 :][:16])
            source = feed([(units.first, good, digest), broken])
            ticket = group.nodes["n3"].bulk.issue(source)
            count_bytes = min(units.count * UNIT, len(image) - units.first * UNIT)
            return peer_pb2.Ticket(
                token=ticket.token, address=ticket.address, units=units.count, bytes=count_bytes
            )

        group.calls["n1"].handlers["Open"] = break_once
        group.encode("n1")
        assert await group.answer("n1") == ""
        assert asked[0][1] >= 2
        assert asked[1] == (asked[0][0] + 1, asked[0][1] - 1)
        published = group.published("n1")
        assert published is not None
        assert published[0] == parity_of(group.plan, 0, group.shards)

    run(tmp_path, one_each(UNIT, 2 * UNIT, 5 * UNIT + 9), 1, body)


def test_the_rate_is_kept(tmp_path: Path) -> None:
    async def body(group: Group) -> None:
        begun_s = time.monotonic()
        group.encode("n1")
        assert await group.answer("n1") == ""
        received = group.encodings["n1"].counters["bytes_received"]
        assert received == 8 * UNIT
        # All but the burst.
        assert time.monotonic() - begun_s >= (received - 4 * UNIT) / (8 << 20)

    sizes = one_each(UNIT, 8 * UNIT, 8 * UNIT)
    run(tmp_path, sizes, 1, body, parity__rate_bytes_s=8 << 20)


def test_more_contributions_than_streams(tmp_path: Path) -> None:
    async def body(group: Group) -> None:
        group.encode("n1")
        assert await group.answer("n1") == ""
        published = group.published("n1")
        assert published is not None
        assert published[0] == parity_of(group.plan, 0, group.shards)

    run(tmp_path, one_each(*[2 * UNIT + n for n in range(6)]), 2, body, bulk__max_streams=1)


def test_a_plan_without_this_node_is_refused(tmp_path: Path) -> None:
    async def body(group: Group) -> None:
        other = Shards({"n2": {0: 5}, "n3": {1: 5}}, SnapshotId(2, 41)).plan(1)
        assert "does not name this node" in await group.encodings["n1"].make(other)

    run(tmp_path, FOUR, 1, body)
