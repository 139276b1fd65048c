"""What is told of a recovery and of a check over all nodes, however they end."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from everstep.agent.asking import Agent
from everstep.agent.display import silent
from everstep.agent.examining import mended, places_of
from everstep.agent.inventory import NodeInventory
from everstep.agent.outlook import held_overviews
from everstep.agent.overseeing import _merged
from everstep.agent.planning import plan_snapshots
from everstep.agent.recovering import bare_report, carried_out, choose, planned_report
from everstep.agent.scrubbing import Item, Looked
from everstep.proto import peer_pb2 as wire
from everstep.proto.errors import NothingRecoverable
from everstep.proto.ids import UNIT_BYTES, SnapshotId

from .protected import SNAPSHOT, even, holding, plan_of

PLAN = even(4, 2)


def reply(*inventories: NodeInventory, alone: bool = False, **homes: str) -> wire.PlanReply:
    return wire.PlanReply(
        plans=[plan.encoded() for plan in plan_snapshots(inventories)],
        destinations=[
            wire.Destination(rank=int(rank[1:]), node_id=node, reason="it is so")
            for rank, node in homes.items()
        ],
        alone=alone,
        silent=["n9"],
        problems=["n1: a file is torn"],
    )


HOMES = {"r0": "n1", "r1": "n2", "r2": "n3", "r3": "n7"}
THREE = [holding(PLAN, index) for index in range(3)]


def test_the_report_of_a_plan_has_what_travels_and_what_is_wrong() -> None:
    report, plans = planned_report("gpt", reply(*THREE, **HOMES), bytes_s=1e6)
    assert plans[0].recoverable
    assert report["chosen"]["step"] == SNAPSHOT.step
    assert {one["to"] for one in report["movements"] if "decoded" in one["what"]} == {"n7"}
    assert report["expected_s"] == pytest.approx(PLAN.members[3].shards[0].image_bytes / 1e6, rel=1)
    assert report["destinations"][3] == {"rank": 3, "node_id": "n7", "reason": "it is so"}
    assert report["problems"] == ["n1: a file is torn", "not reached, and counted as lost: n9"]


def test_an_agent_that_stands_alone_moves_nothing() -> None:
    plan = plan_of([[5_000_000], []], 1)
    report, _ = planned_report("gpt", reply(holding(plan, 0, ["nvme"]), alone=True), bytes_s=1e6)
    assert (report["movements"], report["destinations"]) == ([], [])
    assert report["chosen"]["sources"][0]["level"] == "nvme"


def test_bare_disks_are_planned_onto_their_own_nodes() -> None:
    nodes = [holding(PLAN, index, ["nvme"]) for index in (0, 1)]
    report = bare_report("gpt", plan_snapshots(nodes), nodes, bytes_s=1e6)
    homes = {one["rank"]: one["node_id"] for one in report["destinations"]}
    assert homes == {0: "n1", 1: "n2", 2: "n1", 3: "n2"}
    assert report["snapshots"][0]["decoded_ranks"] == [2, 3]


def test_a_step_that_cannot_be_recovered_is_refused_with_what_is_missing() -> None:
    _, plans = planned_report("gpt", reply(holding(PLAN, 0)), bytes_s=1.0)
    with pytest.raises(NothingRecoverable, match="rank"):
        choose("gpt", plans)


class Told(Agent):
    """An agent that tells these things of a recovery."""

    def __init__(self, *told: wire.RecoverProgress) -> None:
        self.told = told

    def recover(self, request: wire.RecoverRequest) -> "AsyncIterator[wire.RecoverProgress]":
        return iter(self.told)  # type: ignore[return-value]


def begun() -> wire.RecoverProgress:
    return wire.RecoverProgress(node_id="n1", plan=reply(*THREE, **HOMES))


def from_n7(**progress: object) -> wire.RecoverProgress:
    return wire.RecoverProgress(node_id="n7", progress=wire.MendProgress(**progress))  # type: ignore[arg-type]


def test_only_nodes_that_get_something_have_to_end() -> None:
    size = PLAN.members[3].shards[0].image_bytes
    told = Told(
        begun(),
        from_n7(what="rank 3", done_bytes=size, total_bytes=size),
        from_n7(ended=True),
    )
    (outcome,) = carried_out(told, "gpt", SNAPSHOT, (), silent)
    assert (outcome.node_id, outcome.bytes, outcome.problem) == ("n7", size, "")


def test_a_node_that_falls_silent_has_failed() -> None:
    (outcome,) = carried_out(Told(begun()), "gpt", SNAPSHOT, (), silent)
    assert outcome.problem == "it stopped before it said that it was done"
    failed = Told(begun(), from_n7(problem="no room", ended=True))
    (outcome,) = carried_out(failed, "gpt", SNAPSHOT, (), silent)
    assert outcome.problem == "no room"


async def numbers(*steps: int, of: str) -> AsyncIterator[wire.RecoverProgress]:
    for step in steps:
        await asyncio.sleep(0)
        yield wire.RecoverProgress(node_id=of, progress=wire.MendProgress(done_bytes=step))


def test_all_streams_are_passed_on_in_their_own_order_to_the_end() -> None:
    async def all_of() -> dict[str, list[int]]:
        found: dict[str, list[int]] = {"a": [], "b": []}
        many = range(300)  # more than wait at one time
        async for one in _merged([numbers(*many, of="a"), numbers(*many, of="b")]):
            found[one.node_id].append(one.progress.done_bytes)
        return found

    found = asyncio.run(all_of())
    assert found == {"a": list(range(300)), "b": list(range(300))}


def test_who_stops_listening_ends_the_streams() -> None:
    ended = []

    async def endless() -> AsyncIterator[wire.RecoverProgress]:
        try:
            while True:
                await asyncio.sleep(0)
                yield wire.RecoverProgress()
        finally:
            ended.append(True)

    async def look_once() -> None:
        streams = _merged([endless(), endless()])
        await anext(streams)
        for _ in range(1000):  # as much as waits to be passed on
            await asyncio.sleep(0)
        await asyncio.wait_for(streams.aclose(), 10)  # type: ignore[attr-defined]

    asyncio.run(look_once())
    assert len(ended) == 2


def test_what_is_checked_at_a_node_is_what_it_holds() -> None:
    node = holding(PLAN, 1, ["memory", "nvme"])
    memory, nvme = places_of("gpt", node, None, frozenset())
    size = PLAN.members[1].shards[0].image_bytes
    assert (memory.level, memory.sizes, nvme.level) == ("memory", {1: size}, "nvme")
    units = PLAN.rows().parity_file_units(1)
    assert memory.parity_bytes == units * UNIT_BYTES
    assert places_of("gpt", node, None, frozenset({"nvme"})) == [nvme]
    assert places_of("gpt", node, SNAPSHOT.step + 1, frozenset()) == []
    bare = holding(PLAN, 1, parity=False)
    assert places_of("gpt", bare, None, frozenset())[0].parity_bytes is None


def looked(rank: int, snapshot: SnapshotId = SNAPSHOT, **how: object) -> Looked:
    return Looked(Item("gpt", "memory", snapshot, rank), 10, **how)  # type: ignore[arg-type]


def test_a_repair_tells_what_was_damaged_and_what_is_whole_again() -> None:
    request = wire.CheckRequest(
        job="gpt", incarnation=SNAPSHOT.incarnation, step=SNAPSHOT.step, level="memory"
    )
    told = mended(
        request,
        [
            looked(0),
            looked(1, bad_units=(4,), repaired=True),
            looked(2, bad_units=(1,), problem="no source", repaired=False),
            looked(-1, bad_units=(7,), problem="parity rots", again=True),
            looked(3, SnapshotId(9, SNAPSHOT.step), problem="of another incarnation"),
        ],
    )
    assert [copy.rank for copy in told.damaged] == [1, 2]
    assert list(told.repaired_ranks) == [1]
    assert (told.parity_problem, told.parity_repaired) == ("parity rots", False)
    assert told.repair_problem == "it is being made anew"


def test_copies_of_all_nodes_are_added_up() -> None:
    nodes = [holding(PLAN, index, ["memory", "nvme"] if index else ["nvme"]) for index in (0, 1)]
    (held,) = held_overviews(nodes, {SNAPSHOT: 5.0})
    memory, nvme = held.copies
    assert (list(memory.ranks), list(memory.parity_nodes)) == ([1], ["n2"])
    assert (list(nvme.ranks), list(nvme.parity_nodes)) == ([0, 1], ["n1", "n2"])
    assert nvme.bytes == 2 * PLAN.members[0].shards[0].image_bytes
    assert held.captured_unix_s == 5.0
