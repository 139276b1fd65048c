"""What an incarnation restores: one snapshot, and another plan for it if the first one fails."""

import asyncio
from collections.abc import Iterable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from everstep.agent import events, sources
from everstep.agent.deciding import Deciding
from everstep.agent.gathering import Gathering
from everstep.agent.holdings import RoundFact
from everstep.agent.inventory import HeldParity, HeldSnapshot, NodeInventory
from everstep.agent.plans import ParityPlan
from everstep.agent.protection import ProtectionRules
from everstep.agent.sources import Held, SnapshotPlan
from everstep.proto import peer_pb2
from everstep.proto.errors import NothingRecoverable
from everstep.proto.ids import UNIT_BYTES, SnapshotId

from .coordinating import JOB, Office, fact, part
from .protected import all_nodes, plan_of

OLD, NEW = SnapshotId(1, 1), SnapshotId(1, 2)
NODES = 4


class Job:
    """Four nodes with a rank each, started anew; the first coordinates."""

    def __init__(self) -> None:
        self.office = Office(NODES, ProtectionRules(parities=1))
        self.inventories: dict[str, NodeInventory] = {}
        members = SimpleNamespace(
            rules=SimpleNamespace(suspect_after_s=0.0, heartbeat_s=0.0),
            view=SimpleNamespace(
                members=lambda: [SimpleNamespace(node_id=n) for n in self.office.members]
            ),
        )
        node = SimpleNamespace(
            coordination=self.office.coordination,
            cluster=lambda now_s: self.office.cluster,
            members=members,
        )
        answering = SimpleNamespace(handlers={}, coordinates=lambda: None)
        peers = SimpleNamespace(node=node, live=lambda: tuple(self.inventories), call=self._call)
        gathering = Gathering(peers, 1.0)  # type: ignore[arg-type]
        self.deciding = Deciding(answering, node, gathering, 1.0)  # type: ignore[arg-type]

    async def _call(self, node_id: str, method: str, request: Any, timeout_s: float) -> Any:
        if method == "Check":
            return peer_pb2.CheckReply()
        return self.inventories[node_id].encoded()

    def has(self, *snapshots: ParityPlan, parity: Iterable[ParityPlan] = ()) -> "Job":
        """All nodes have these, and parity of some."""
        for node_id in sorted(self.office.members):
            self.inventories[node_id] = NodeInventory(node_id)
        for plan in snapshots:
            for node in all_nodes(plan):
                (held,) = node.snapshots
                if plan not in parity:
                    held = replace(held, parities=())
                self._add(node.node_id, held)
        return self

    def _add(self, node_id: str, held: HeldSnapshot) -> None:
        before = self.inventories[node_id]
        self.inventories[node_id] = replace(before, snapshots=(*before.snapshots, held))

    def begins(self, incarnation: int = 2) -> "Job":
        for rank, node_id in enumerate(sorted(self.office.members)):
            self.office.reports(node_id, fact([rank], world=NODES, incarnation=incarnation))
        return self

    def loses(self, node_id: str) -> None:
        del self.inventories[node_id]
        self.office.live -= {node_id}

    async def decides(self, failed_plan: int = 0) -> tuple[int, SnapshotPlan]:
        request = peer_pb2.DecideRequest(job=JOB, incarnation=2, failed_plan=failed_plan)
        reply = await self.deciding.decide(request)
        assert reply.found
        return reply.plan_number, sources.parsed(reply.plan, "the decision")


def saved(snapshot: SnapshotId, plan_id: str = "", version: int = 0) -> ParityPlan:
    name = plan_id or f"9-{snapshot.incarnation}-{snapshot.step}-1-0.1"
    sizes = [[3 * UNIT_BYTES]] * NODES
    return plan_of(sizes, 1, snapshot=snapshot, plan_id=name, version=version)


def where(plan: SnapshotPlan) -> list[str]:
    return [s.node_id if isinstance(s, Held) else "decoded" for s in plan.sources]


def test_whoever_could_not_carry_a_plan_out_is_given_another_for_the_same_snapshot() -> None:
    old, new = saved(OLD), saved(NEW)
    job = Job().has(old, parity=[old]).begins()

    async def story() -> None:
        number, plan = await job.decides()
        assert (number, where(plan)) == (1, ["n1", "n2", "n3", "n4"])
        job.has(old, new, parity=[old, new])
        job.loses("n2")
        number, plan = await job.decides(failed_plan=1)
        assert (number, plan.snapshot) == (2, OLD), "others may have loaded it"
        assert where(plan) == ["n1", "decoded", "n3", "n4"]
        for failed_plan in (0, 1):
            assert await job.decides(failed_plan) == (2, plan), "it was replaced already"

    asyncio.run(story())


def test_when_no_other_plan_is_left_it_says_what_is_missing_until_it_is_there() -> None:
    old = saved(OLD)
    job = Job().has(old).begins()

    async def story() -> None:
        await job.decides()
        before = dict(job.inventories)
        job.loses("n2")
        for failed_plan in (1, 1, 0):
            with pytest.raises(NothingRecoverable, match="rank 1"):
                await job.decides(failed_plan)
        job.inventories = before
        number, plan = await job.decides(failed_plan=1)
        assert number > 1 and plan.snapshot == OLD

    asyncio.run(story())


def test_another_attempt_at_the_step_does_not_stand_in_for_the_one_that_was_decided() -> None:
    def committed(version: int) -> Job:
        commit_id = bytes([version]) * 16
        job.has(saved(OLD, version=version))
        for node_id, node in job.inventories.items():
            (held,) = node.snapshots
            shards = tuple(replace(shard, commit_id=commit_id) for shard in held.shards)
            job.inventories[node_id] = replace(node, snapshots=(replace(held, shards=shards),))
        return job

    job = Job()
    committed(1).begins()

    async def story() -> None:
        _, plan = await job.decides()
        assert plan.commit_id == b"\1" * 16
        committed(2)
        for failed_plan in (1, 1, 0):
            with pytest.raises(NothingRecoverable):
                await job.decides(failed_plan)
        committed(1)
        assert (await job.decides())[1] == plan

    asyncio.run(story())


@pytest.mark.parametrize("older", [True, False])
@pytest.mark.parametrize("over", ["under way", "given up", "left by another coordinator"])
def test_parity_of_a_round_that_may_be_given_up_is_the_last_resort(older: bool, over: str) -> None:
    job = Job()
    office, known = job.office, [OLD] * older + [NEW]
    members = tuple(sorted(office.members))

    def report(stages: dict[str, str], plan_id: str) -> None:
        for rank, node_id in enumerate(members):
            rounds = [RoundFact(saved(OLD).plan_id, OLD, "committed", members)] * older
            if node_id in stages:
                rounds.append(RoundFact(plan_id, NEW, stages[node_id], members))
            held = [part(snapshot, "committed", [rank], NODES) for snapshot in known]
            office.reports(node_id, fact([rank], held, world=NODES, rounds=rounds, incarnation=2))

    plan_id = "8-1-2-1-0.1"
    if over == "left by another coordinator":
        report({"n1": "prepared", "n2": "failed", "n3": "prepared", "n4": "prepared"}, plan_id)
    else:
        report({}, "")
        office.decide()
        (order,) = office.orders("n1", events.PrepareOrdered)
        assert isinstance(order, events.PrepareOrdered)
        plan_id = order.plan.plan_id
        failed = {"n2": "failed"} if over == "given up" else {}
        report({"n1": "prepared", "n3": "prepared", "n4": "prepared", **failed}, plan_id)
    if over == "given up":
        office.decide(1.0)
    parity = [saved(NEW, plan_id), *([saved(OLD)] * older)]
    job.has(*parity, parity=parity)
    job.loses("n2")
    _, plan = asyncio.run(job.decides())
    assert plan.snapshot == (OLD if older else NEW)
    assert where(plan) == ["n1", "decoded", "n3", "n4"]


def test_what_a_node_knows_by_revocable_parity_alone_it_does_not_have() -> None:
    plan = saved(NEW)
    held = HeldSnapshot(NEW, NODES, (), (HeldParity(plan, "memory"),))
    assert NodeInventory("n1", (held,)).without({plan.plan_id}).snapshots == ()
    assert NodeInventory("n1", (held,)).without({"another"}).snapshots == (held,)
