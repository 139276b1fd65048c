"""Shards fetched and decoded over real bulk planes: the bytes of the record, or a named error."""

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from everstep.agent.rates import Rate
from everstep.agent.rebuilding import rebuild_work
from everstep.agent.sending import BufferPiece, Piece, Source
from everstep.agent.sources import Decoded, Held, SnapshotPlan
from everstep.proto.errors import (
    DeadlineExceeded,
    FormatInvalid,
    PeerBusy,
    PeerUnavailable,
    ShardCorrupt,
)
from everstep.proto.ids import UNIT_BYTES
from everstep.proto.state_pb2 import Record
from everstep.snapshot.digest import unit_digest
from everstep.snapshot.record import seal_record

from .several_nodes import JOB, UNEQUAL, Group, run

DEADLINE_S = 30.0


async def fetched(
    group: Group,
    plan: SnapshotPlan,
    rank: int,
    units: Sequence[range] | None = None,
    *,
    deadline_s: float = DEADLINE_S,
    rate: Rate | None = None,
    at: str = "spare",
    came: list[int] | None = None,
) -> bytearray:
    """What the spare node gets."""
    image = bytearray(len(group.shards[rank].image))
    view = memoryview(image)
    fetching = group.fetching[at]

    def work() -> None:
        until_s = time.monotonic() + deadline_s
        known = fetching.records(JOB, plan, [rank], until_s)[rank]
        assert known.record_envelope == group.shards[rank].envelope
        assert known.layout_envelope == group.shards[rank].layout_envelope
        fetching.fetch(
            plan,
            rank,
            units,
            lambda unit: view[unit * UNIT_BYTES : (unit + 1) * UNIT_BYTES],
            known.record,
            deadline_s=until_s,
            rate=rate,
            progress=(came if came is not None else []).append,
        )

    await asyncio.to_thread(work)
    return image


@pytest.mark.parametrize("parities", [1, 2])
def test_every_loss_that_the_parities_cover_comes_back_bit_for_bit(
    tmp_path: Path, parities: int
) -> None:
    async def body(group: Group) -> None:
        for count in range(parities + 1):
            for lost in combinations(UNEQUAL, count):
                group.down.clear()
                plan = await group.plan_of(lost)
                assert plan.recoverable, plan.missing
                ranks = [rank for name in lost for rank in UNEQUAL[name]] or [0]
                for rank in ranks:
                    assert isinstance(plan.source_of(rank), Decoded if lost else Held)
                    came: list[int] = []
                    image = await fetched(group, plan, rank, came=came)
                    assert image == group.shards[rank].image, (lost, rank)
                    assert sum(came) == len(image)

    run(tmp_path, parities, body)


@pytest.mark.parametrize("lost", [(), ("n3",)])
def test_only_the_units_that_are_asked_for_come(tmp_path: Path, lost: tuple[str, ...]) -> None:
    async def body(group: Group) -> None:
        plan = await group.plan_of(lost)
        image = await fetched(group, plan, 2, [range(2, 3), range(0, 1)])
        right = group.shards[2].image
        assert image[:UNIT_BYTES] == right[:UNIT_BYTES]
        assert image[UNIT_BYTES : 2 * UNIT_BYTES] == bytes(UNIT_BYTES)
        assert image[2 * UNIT_BYTES : 3 * UNIT_BYTES] == right[2 * UNIT_BYTES : 3 * UNIT_BYTES]
        assert image[3 * UNIT_BYTES :] == bytes(len(image) - 3 * UNIT_BYTES)

    run(tmp_path, 1, body)


def test_small_segments_and_one_stream_give_the_same(tmp_path: Path) -> None:
    async def body(group: Group) -> None:
        plan = await group.plan_of(("n3", "n1"))
        for rank in (0, 3, 2, 4, 6):
            assert await fetched(group, plan, rank) == group.shards[rank].image

    run(tmp_path, 2, body, bulk__buffer_bytes="2 MiB", bulk__max_streams=1)


def test_symbols_are_taken_from_disk_and_from_nodes_outside_the_group(tmp_path: Path) -> None:
    async def body(group: Group) -> None:
        for name in ("n1", "n4"):
            group.protect(name)
        group.hold_on_disk("n1")
        group.hold("n4")
        group.hold("spare", [1])
        plan = await group.plan_of(("n2", "n3"))
        assert {(s.rank, s.node_id, s.level) for s in plan.sources if isinstance(s, Held)} == {
            (0, "n1", "nvme"),
            (3, "n1", "nvme"),
            (1, "spare", "memory"),
            (5, "n4", "memory"),
        }
        for rank in UNEQUAL["n3"]:
            assert await fetched(group, plan, rank) == group.shards[rank].image

    run(tmp_path, 2, body, hold=False)


def test_a_shard_that_moved_still_gives_its_symbols(tmp_path: Path) -> None:
    """All three are needed, and one lies with a node that the plan does not know."""

    async def body(group: Group) -> None:
        for name in UNEQUAL:
            group.protect(name)
        group.hold("n3")
        group.hold("n4")
        group.hold("spare", [1])
        plan = await group.plan_of(("n1",))
        for rank in UNEQUAL["n1"]:
            assert await fetched(group, plan, rank) == group.shards[rank].image

    run(tmp_path, 1, body, hold=False)


def test_an_executor_that_is_down_is_replaced(tmp_path: Path) -> None:
    async def body(group: Group) -> None:
        plan = await group.plan_of(("n3",))
        executors = {segment.executor for segment in rebuild_work(plan, 2, 8)}
        group.down.add(min(executors))
        assert await fetched(group, plan, 2) == group.shards[2].image

    run(tmp_path, 2, body)


def answering(group: Group, method: str, change: Callable[[str, Any], Any]) -> None:
    """Have `change(node, ticket)` look at every answer to a method."""
    for calls in group.calls.values():
        handle = calls.handlers[method]

        async def changed(node: str, request: Any, handle: Any = handle) -> Any:
            return change(node, await handle(node, request))

        calls.handlers[method] = changed


def test_an_executor_that_failed_is_asked_last(tmp_path: Path) -> None:
    sizes = {f"n{index + 1}": {index: 8 * UNIT_BYTES} for index in range(4)}

    async def body(group: Group) -> None:
        plan = await group.plan_of(("n3",))
        segments = [segment.executor for segment in rebuild_work(plan, 2, 2)]
        down = max(set(segments), key=segments.count)
        assert segments.count(down) > 1
        group.down.add(down)
        group.asked.clear()
        assert await fetched(group, plan, 2) == group.shards[2].image
        assert group.asked.count((down, "Rebuild")) == 2

    run(tmp_path, 2, body, sizes=sizes, bulk__buffer_bytes="2 MiB", bulk__max_streams=1)


def lies(group: Group, name: str) -> None:
    """Have a node hand out wrong bytes as decoded, with digests that fit them."""
    server = group.nodes[name].bulk
    issue = server.issue

    def lie(source: Source, **more: Any) -> Any:
        pieces: list[Piece] = []
        for piece in source.pieces:
            if isinstance(piece, BufferPiece):
                wrong = memoryview(bytes(piece.data[:7]) + b"lie" + bytes(piece.data[10:]))
                piece = BufferPiece(piece.index, wrong, unit_digest(wrong))
            pieces.append(piece)
        return issue(Source(pieces, source.close), **more)

    server.issue = lie  # type: ignore[method-assign]


def test_an_executor_that_lies_is_replaced(tmp_path: Path) -> None:
    async def body(group: Group) -> None:
        plan = await group.plan_of(("n3",))
        liar = rebuild_work(plan, 2, 8)[0].executor
        lies(group, liar)
        assert await fetched(group, plan, 2) == group.shards[2].image

    run(tmp_path, 1, body)


def test_if_all_lie_nothing_is_believed(tmp_path: Path) -> None:
    async def body(group: Group) -> None:
        plan = await group.plan_of(("n3",))
        for node in group.nodes.values():
            lies(group, node.node_id)
        with pytest.raises(ShardCorrupt, match=r"n[124]"):
            await fetched(group, plan, 2)

    run(tmp_path, 1, body)


def test_parity_that_is_not_that_of_its_row_is_done_without(tmp_path: Path) -> None:
    """Its digests fit, as those of a lying node would; only the result shows it."""

    async def body(group: Group) -> None:
        for name in UNEQUAL:
            group.hold(name)
            group.protect(name, (lambda p: bytes(len(p))) if name == "n4" else None)
        plan = await group.plan_of(("n3",))
        for rank in UNEQUAL["n3"]:
            assert await fetched(group, plan, rank) == group.shards[rank].image

    run(tmp_path, 2, body, hold=False)


def test_rotten_parity_without_another_is_an_error(tmp_path: Path) -> None:
    async def body(group: Group) -> None:
        for name in UNEQUAL:
            group.hold(name)
            group.protect(name, lambda parity: bytes(len(parity)))
        plan = await group.plan_of(("n3",))
        with pytest.raises(ShardCorrupt, match=r"n[124]"):
            await fetched(group, plan, 2)

    run(tmp_path, 1, body, hold=False)


def test_a_source_whose_bytes_rot_is_done_without(tmp_path: Path) -> None:
    async def body(group: Group) -> None:
        plan = await group.plan_of(("n3",))
        for rank in UNEQUAL["n1"]:
            group.nodes["n1"].overwrite(rank, 100, b"rot")
        for rank in UNEQUAL["n3"]:
            assert await fetched(group, plan, rank) == group.shards[rank].image

    run(tmp_path, 2, body)


def test_a_source_that_vanishes_is_done_without(tmp_path: Path) -> None:
    async def body(group: Group) -> None:
        plan = await group.plan_of(("n3",))
        opened: list[str] = []

        def vanish(node: str, ticket: Any) -> Any:
            if not opened:
                opened.append(node)
                group.nodes[node].bulk.close()
                group.down.add(node)
            return ticket

        answering(group, "Open", vanish)
        for rank in UNEQUAL["n3"]:
            assert await fetched(group, plan, rank) == group.shards[rank].image
        assert opened

    run(tmp_path, 2, body)


def test_too_few_sources_name_who_failed(tmp_path: Path) -> None:
    async def body(group: Group) -> None:
        plan = await group.plan_of(("n3",))
        group.down.add("n1")
        with pytest.raises(PeerUnavailable, match="n1"):
            await fetched(group, plan, 2)

    run(tmp_path, 1, body)


def test_a_holder_that_is_gone_is_named(tmp_path: Path) -> None:
    async def body(group: Group) -> None:
        plan = await group.plan_of()
        known = group.shards[2].record
        group.down.add("n3")
        with pytest.raises(PeerUnavailable, match="n3"):
            await fetched(group, plan, 2)
        with pytest.raises(PeerUnavailable, match="n3"):
            await asyncio.to_thread(
                group.fetching["spare"].fetch,
                plan,
                2,
                None,
                lambda unit: memoryview(bytearray(UNIT_BYTES)),
                known,
                deadline_s=time.monotonic() + DEADLINE_S,
            )

    run(tmp_path, 1, body)


def test_a_damaged_copy_is_an_error_and_decoded_when_planned_again(tmp_path: Path) -> None:
    async def body(group: Group) -> None:
        plan = await group.plan_of()
        group.nodes["n3"].overwrite(2, UNIT_BYTES + 5, b"rot")
        with pytest.raises(ShardCorrupt, match="n3"):
            await fetched(group, plan, 2)
        again = await group.plan_of(erasures=[group.erase("n3", 2)])
        assert isinstance(again.source_of(2), Decoded)
        assert await fetched(group, again, 2, [range(1, 2)], at="n3")

    run(tmp_path, 1, body)


def test_a_broken_stream_goes_on_where_it_broke(tmp_path: Path) -> None:
    async def body(group: Group) -> None:
        plan = await group.plan_of()
        asked: list[int] = []
        calls = group.calls["spare"]
        handle = calls.handlers["Open"]

        async def cut(node: str, request: Any) -> Any:
            asked.append(request.shard.units[0].first)
            if len(asked) == 1:
                # Of two units it was promised to send, the server will find one.
                group.nodes["n3"].overwrite(2, UNIT_BYTES, bytes(10))
            else:
                right = group.shards[2].image[UNIT_BYTES : UNIT_BYTES + 10]
                group.nodes["n3"].overwrite(2, UNIT_BYTES, right)
            return await handle(node, request)

        calls.handlers["Open"] = cut
        came: list[int] = []
        assert await fetched(group, plan, 2, came=came) == group.shards[2].image
        assert asked == [0, 1]
        assert sum(came) == len(group.shards[2].image)

    run(tmp_path, 1, body)


def test_a_busy_executor_is_waited_for(tmp_path: Path) -> None:
    async def body(group: Group) -> None:
        plan = await group.plan_of(("n3",))
        refusals = []
        calls = group.calls["spare"]
        handle = calls.handlers["Rebuild"]

        async def busy(node: str, request: Any) -> Any:
            if len(refusals) < 3:
                refusals.append(node)
                raise PeerBusy(node, "test")
            return await handle(node, request)

        calls.handlers["Rebuild"] = busy
        assert await fetched(group, plan, 2) == group.shards[2].image
        assert len(refusals) == 3

    run(tmp_path, 1, body)


def test_the_deadline_holds(tmp_path: Path) -> None:
    async def body(group: Group) -> None:
        plan = await group.plan_of()
        begun_s = time.monotonic()
        with pytest.raises(DeadlineExceeded):
            await fetched(group, plan, 2, deadline_s=0.5, rate=Rate(1 << 20, 1 << 17))
        assert time.monotonic() - begun_s < 10

    run(tmp_path, 1, body)


@pytest.mark.parametrize("lie", ["of another rank", "other bytes", "another world"])
def test_a_record_that_the_plan_does_not_fit_is_not_believed(tmp_path: Path, lie: str) -> None:
    async def body(group: Group) -> None:
        plan = await group.plan_of(("n3",))
        right, other = group.shards[2], group.shards[6]
        false = Record.FromString(right.record.SerializeToString())
        if lie == "other bytes":
            false.unit_digests = bytes(len(false.unit_digests))
        else:
            false.world += 1
        envelope = other.envelope if lie == "of another rank" else seal_record(false)
        layout = (other if lie == "of another rank" else right).layout_envelope

        def change(node: str, reply: Any) -> Any:
            for shard in reply.shards:
                if shard.rank == 2:
                    shard.record, shard.layout = envelope, layout
            return reply

        answering(group, "Describe", change)
        with pytest.raises(FormatInvalid, match="rank 2"):
            await fetched(group, plan, 2)

    run(tmp_path, 1, body)


def test_streams_are_bounded_over_all_transfers(tmp_path: Path) -> None:
    async def body(group: Group) -> None:
        plan = await group.plan_of()
        lock = threading.Lock()
        under_way = [0, 0]
        fetching = group.fetching["spare"]
        receive = fetching._held

        def counting(*arguments: Any) -> None:
            with lock:
                under_way[0] += 1
                under_way[1] = max(under_way)
            receive(*arguments)
            with lock:
                under_way[0] -= 1

        fetching._held = counting  # type: ignore[method-assign]
        images = await asyncio.gather(*[fetched(group, plan, rank) for rank in range(7)])
        assert [bytes(i) for i in images] == [group.shards[r].image for r in range(7)]
        assert under_way[1] <= 2

    run(tmp_path, 1, body, bulk__max_streams=2)
