"""The copies and the parity of all nodes, checked where they lie, and mended if asked.

Owns the answer to `everstep verify` where there are several nodes. Promises that every copy and
every parity which an inventory names is told of once, as intact or with its problem; that a node
which fails to answer is told of, too; and that without `repair` nothing is changed. Each node reads
its own bytes, one snapshot at a time, all nodes side by side.
"""

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass

from everstep.agent.cluster import Cluster
from everstep.agent.gathering import Findings, Wishes
from everstep.agent.inventory import LEVELS, HeldSnapshot, NodeInventory
from everstep.agent.outlook import job_overview
from everstep.agent.overseeing import Overseeing
from everstep.agent.plans import ParityPlan
from everstep.agent.scrubbing import Looked
from everstep.agent.stock import Erasure
from everstep.proto import peer_pb2 as wire
from everstep.proto.errors import EverstepError, NothingRecoverable
from everstep.proto.ids import UNIT_BYTES, SnapshotId, checked_name

_TIMEOUT_FIRST_S = 60.0
_SLOWEST_BYTES_S = 20e6
_ASKED_AT_ONCE = 64
"""Nodes."""


@dataclass(frozen=True, slots=True)
class _Place:
    """What one node holds of one snapshot at one level."""

    job: str
    node_id: str
    level: str
    held: HeldSnapshot

    @property
    def sizes(self) -> dict[int, int]:
        """Image bytes by rank."""
        return {s.rank: s.image_bytes for s in self.held.shards if s.level == self.level}

    @property
    def parity_bytes(self) -> int | None:
        """Of this node's parity; None if it has none."""
        plans = [parity.plan for parity in self.held.parities if parity.level == self.level]
        return sum(_parity_bytes(plan, self.node_id) for plan in plans) if plans else None

    @property
    def bytes(self) -> int:
        """Everything that is to be read."""
        return sum(self.sizes.values()) + (self.parity_bytes or 0)


def _parity_bytes(plan: ParityPlan, node_id: str) -> int:
    return plan.rows().parity_file_units(plan.index_of(node_id)) * UNIT_BYTES


def places_of(
    job: str, node: NodeInventory, step: int | None, levels: frozenset[str]
) -> list[_Place]:
    """What is to be checked at a node, oldest first."""
    places = [
        _Place(job, node.node_id, level, held)
        for held in node.snapshots
        if step in (None, held.snapshot.step)
        for level in LEVELS
        if not levels or level in levels
    ]
    return [place for place in places if place.sizes or place.parity_bytes is not None]


def _learn(known: dict[str, Findings], told: wire.ExamineProgress) -> None:
    """Take note of what is not there after all."""
    if told.HasField("unexamined"):
        for findings in known.values():
            findings.inventories = tuple(
                node for node in findings.inventories if node.node_id != told.unexamined.node_id
            )
    elif told.HasField("examined") and told.examined.problem and not told.examined.repaired:
        one = told.examined
        snapshot = SnapshotId(one.incarnation, one.step)
        rank = None if one.parity else one.rank
        known[one.job].erasures.append(Erasure(one.node_id, snapshot, rank, one.level))


def mended(request: wire.CheckRequest, looked: Iterable[Looked]) -> wire.CheckReply:
    """What came of a repair, as the answer to the check that asked for it."""
    reply = wire.CheckReply()
    snapshot = SnapshotId(request.incarnation, request.step)
    for one in looked:
        if one.item.snapshot != snapshot:
            continue
        if not one.bad_units and not one.problem:
            continue
        reason = one.problem or f"{len(one.bad_units)} unit(s) did not match their digests"
        if one.item.rank < 0:
            reply.parity_problem, reply.parity_repaired = reason, one.repaired
        else:
            reply.damaged.add(rank=one.item.rank, level=request.level, reason=reason)
            reply.repaired_ranks.extend([one.item.rank] if one.repaired else [])
        if not one.repaired:
            reply.repair_problem = "it is being made anew" if one.again else reason
    return reply


class Examining:
    """All checks over all nodes, on behalf of one.

    Args:
        overseeing: Gathers the inventories.
        cluster: Asks the nodes.
    """

    def __init__(self, overseeing: Overseeing, cluster: Cluster) -> None:
        self._overseeing = overseeing
        self._cluster = cluster
        cluster.answering.handlers["Check"] = self.check

    async def check(self, request: wire.CheckRequest) -> wire.CheckReply:
        """The handler of `Check`: as `Serving.check`, and mends what is damaged if asked."""
        if not request.repair:
            return await self._cluster.serving.check(request)
        looked = await self._cluster.scrubbing.verify_and_repair(
            checked_name("job", request.job), step=request.step, levels=(request.level,)
        )
        return mended(request, looked)

    async def examine(self, request: wire.ExamineRequest) -> AsyncIterator[wire.ExamineProgress]:
        """Check everything that is asked for; its size is told first.

        Raises:
            InvalidName: If that is no job's name.
            NothingRecoverable: If a step was named that no node has.
        """
        step = request.step if request.HasField("step") else None
        levels = frozenset(request.levels)
        places: dict[str, list[_Place]] = defaultdict(list)
        jobs = [checked_name("job", request.job)] if request.job else await self._jobs()
        known: dict[str, Findings] = {}
        for job in jobs:
            findings = known[job] = await self._overseeing.gather(job, _TIMEOUT_FIRST_S)
            for node in findings.inventories:
                places[node.node_id] += places_of(job, node, step, levels)
        if step is not None and not any(places.values()):
            raise NothingRecoverable(
                ", ".join(jobs), (f"step {step} is on no node that was reached",)
            )
        total = sum(place.bytes for found in places.values() for place in found)
        yield wire.ExamineProgress(total=wire.ExamineTotal(bytes=total))
        async for told in self._each(places, repair=request.repair):
            _learn(known, told)
            yield told
        for job, findings in known.items():
            plans = await asyncio.to_thread(findings.plans, Wishes(to_step=step))
            left = job_overview(job, findings.inventories, plans, silent=findings.silent)
            yield wire.ExamineProgress(outlook=left)

    async def _jobs(self) -> list[str]:
        request = wire.SurveyRequest()
        known = set(self._cluster.pipeline.state.jobs)
        try:
            reply = await self._cluster.ask_coordinator("Survey", request, _TIMEOUT_FIRST_S)
            known |= {one.job for one in reply.jobs}
        except EverstepError:
            pass  # what this node knows has to do
        return sorted(known)

    async def _each(
        self, places: dict[str, list[_Place]], *, repair: bool
    ) -> AsyncIterator[wire.ExamineProgress]:
        room = asyncio.Semaphore(_ASKED_AT_ONCE)
        queue: asyncio.Queue[list[wire.ExamineProgress]] = asyncio.Queue()

        async def of_node(found: list[_Place]) -> None:
            async with room:
                for place in found:
                    # One message a place: as many as were told of in the inventories.
                    queue.put_nowait(await self._checked(place, repair=repair))

        tasks = [asyncio.get_running_loop().create_task(of_node(f)) for f in places.values()]
        try:
            for _ in range(sum(map(len, places.values()))):
                for told in await queue.get():
                    yield told
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _checked(self, place: _Place, *, repair: bool) -> list[wire.ExamineProgress]:
        sizes, parity_bytes = place.sizes, place.parity_bytes
        snapshot = place.held.snapshot
        request = wire.CheckRequest(
            job=place.job,
            incarnation=snapshot.incarnation,
            step=snapshot.step,
            ranks=sorted(sizes),
            level=place.level,
            parity=parity_bytes is not None,
            repair=repair,
        )
        timeout_s = _TIMEOUT_FIRST_S + place.bytes / _SLOWEST_BYTES_S
        try:
            reply = await self._cluster.peers.call(place.node_id, "Check", request, timeout_s)
        except EverstepError as error:
            unexamined = wire.Unexamined(node_id=place.node_id, problem=str(error)[:2000])
            return [wire.ExamineProgress(unexamined=unexamined)]
        problems = {copy.rank: copy.reason or "damaged" for copy in reply.damaged}
        repaired = set(reply.repaired_ranks)
        told = [
            self._examined(place, reply, size, problems.get(rank, ""), rank=rank)
            for rank, size in sorted(sizes.items())
        ]
        for one in told:
            one.repaired = bool(one.problem) and one.rank in repaired
        if parity_bytes is not None:
            parity = self._examined(place, reply, parity_bytes, reply.parity_problem)
            parity.parity, parity.repaired = True, reply.parity_repaired
            told.append(parity)
        return [wire.ExamineProgress(examined=one) for one in told]

    def _examined(
        self,
        place: _Place,
        reply: wire.CheckReply,
        size_bytes: int,
        problem: str,
        rank: int = 0,
    ) -> wire.Examined:
        return wire.Examined(
            job=place.job,
            incarnation=place.held.snapshot.incarnation,
            step=place.held.snapshot.step,
            node_id=place.node_id,
            level=place.level,
            rank=rank,
            bytes=size_bytes,
            problem=problem,
            repair_problem=reply.repair_problem if problem else "",
        )
