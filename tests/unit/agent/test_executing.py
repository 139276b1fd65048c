"""What a node decodes for others: within its limits, and only what makes sense."""

from pathlib import Path
from typing import Any

import pytest

from everstep.agent.framing import ANSWER, MAGIC, Status
from everstep.agent.rebuilding import Segment, rebuild_work
from everstep.agent.sources import SnapshotPlan
from everstep.proto import peer_pb2 as wire
from everstep.proto.errors import EverstepError, FormatInvalid, PeerBusy, PeerUnavailable

from .several_nodes import Group, run


def test_sources_that_serve_as_many_streams_as_they_may_are_waited_for(tmp_path: Path) -> None:
    async def body(group: Group) -> None:
        plan = await group.plan_of(("n1",))
        (segment,) = rebuild_work(plan, 0, 8)
        (node,) = {place.partition("/")[0] for place in segment.usable} - {segment.executor}
        refused: list[str] = []

        def busy(connection: Any, peer: str) -> bytes | None:
            if len(refused) < 6:
                refused.append(peer)
                return ANSWER.pack(MAGIC, Status.BUSY)
            return begin(connection, peer)

        with pytest.MonkeyPatch.context() as patch:
            listener = group.nodes[node].bulk._listener
            begin = listener._begin
            patch.setattr(listener, "_begin", busy)
            request = request_of(segment)
            ticket = await group.executing[segment.executor].rebuild(request)
        assert ticket.units == segment.units
        assert len(refused) == 6

    run(tmp_path, 1, body)


def request_of(segment: Segment) -> Any:
    return wire.RebuildRequest(
        plan=segment.plan.encoded(),
        row=segment.row,
        member=segment.member,
        units=wire.UnitRange(first=segment.first_unit, count=segment.units),
        usable=segment.usable,
    )


def rebuild_request(plan: SnapshotPlan, rank: int, units: int = 1) -> tuple[str, Any]:
    segment = rebuild_work(plan, rank, units)[0]
    return segment.executor, request_of(segment)


def test_an_executor_takes_no_more_than_it_may(tmp_path: Path) -> None:
    async def body(group: Group) -> None:
        plan = await group.plan_of(("n3",))
        node, request = rebuild_request(plan, 2)
        executing = group.executing[node]
        tickets = [await executing.rebuild(request) for _ in range(2)]
        assert all(ticket.units == 1 for ticket in tickets)
        with pytest.raises(PeerBusy, match=node):
            await executing.rebuild(request)
        # What is handed out, or expires, makes room again.
        group.nodes[node].bulk.close()
        with pytest.raises(PeerUnavailable, match="shutting down"):
            await executing.rebuild(request)
        with pytest.raises(PeerUnavailable, match="shutting down"):
            await executing.rebuild(request)
        with pytest.raises(PeerUnavailable, match="shutting down"):
            await executing.rebuild(request)

    run(tmp_path, 1, body, bulk__max_streams=2)


def test_requests_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    async def body(group: Group) -> None:
        plan = await group.plan_of(("n3",))
        node, right = rebuild_request(plan, 2)
        executing = group.executing[node]

        async def refused(**changed: Any) -> None:
            request = wire.RebuildRequest.FromString(right.SerializeToString())
            for name, value in changed.items():
                if name in ("row", "member"):
                    setattr(request, name, value)
                elif name == "usable":
                    request.usable.append(value)
                elif name == "parities":
                    request.plan.parities = value
                else:
                    setattr(request.units, name, value)
            with pytest.raises(EverstepError):
                await executing.rebuild(request)

        await refused(row=4)
        await refused(member=4)
        await refused(member=right.row)
        await refused(count=0)
        await refused(count=1 << 40)
        await refused(first=1 << 63)
        await refused(usable="n1/tape")
        await refused(usable="../n1/memory")
        await refused(parities=2)
        await executing.rebuild(right)

    run(tmp_path, 1, body)


def test_a_plan_that_the_executor_knows_otherwise_is_refused(tmp_path: Path) -> None:
    async def body(group: Group) -> None:
        plan = await group.plan_of(("n3",))
        node, request = rebuild_request(plan, 2)
        request.plan.members[0].shards[0].image_bytes -= 1
        with pytest.raises(FormatInvalid, match=r"plan-1 is another one"):
            await group.executing[node].rebuild(request)

    run(tmp_path, 1, body)
