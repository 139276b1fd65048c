"""One agent's look at all agents, for people: how safe each job is, what a recovery takes.

Owns the answers to `everstep status`, `list` and `recover` that concern several nodes; for an
agent that stands alone, the same from what it holds itself. Promises that a node which does not
answer in time counts as lost and is named, and that a recovery ends at every node with success or
a problem in words. Decides nothing that trainers depend on: see `agent.deciding`.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Iterable
from functools import partial

import grpc

from everstep.agent.cluster import Cluster
from everstep.agent.destinations import Home, destinations, to_be_moved
from everstep.agent.gathering import Findings, Gathering, Wishes
from everstep.agent.inventory import NVME
from everstep.agent.job import Job
from everstep.agent.keeping import Keeping, known_of
from everstep.agent.outlook import job_overview, problems_of
from everstep.agent.pipeline import Pipeline
from everstep.agent.sources import SnapshotPlan
from everstep.agent.surveying import captured_times, survey
from everstep.proto import peer_pb2 as wire
from everstep.proto.errors import CoordinatorUnknown, EverstepError, NothingRecoverable
from everstep.proto.ids import SnapshotId, checked_name
from everstep.snapshot.record import open_record

log = logging.getLogger("everstep.agent")
LOOK_TIMEOUT_S = 5.0
"""For answers that only people wait for."""
_TOLD_AT_ONCE = 64
"""Messages of all nodes that wait to be passed on."""


class Overseeing:
    """All questions about more than this node. Lives on the agent's loop.

    Args:
        pipeline: Of this agent.
        cluster: Its part in a cluster; None if it stands alone.
    """

    def __init__(self, pipeline: Pipeline, cluster: Cluster | None) -> None:
        self._pipeline = pipeline
        self._cluster = cluster
        self._node_id = pipeline.config.agent.node_id
        self._timeout_s = pipeline.config.limits.restore_timeout_s
        self.keeping = Keeping(self._node_id, pipeline.memory, pipeline.nvme, pipeline.parity)
        if cluster is not None:
            cluster.answering.handlers["Survey"] = partial(_surveyed, cluster)

    @property
    def alone(self) -> bool:
        """Whether there are no others to ask."""
        return self._cluster is None

    async def overview(self, request: wire.OverviewRequest) -> wire.OverviewReply:
        """What all nodes together hold, and how safe it is."""
        reply = wire.OverviewReply()
        try:
            found = await self._survey(request.job)
            if found is not None:
                reply.survey.CopyFrom(found)
        except EverstepError as error:
            reply.problem = str(error)
        surveyed = {one.job: one for one in reply.survey.jobs}
        known = {name for name in self._pipeline.state.jobs if request.job in ("", name)}
        for name in sorted(known | surveyed.keys()):
            findings = await self.gather(name, LOOK_TIMEOUT_S)
            wishes = self._wishes(name, surveyed.get(name))
            # In a thread: of thousands of ranks it takes a while, and heartbeats do not wait.
            plans = await asyncio.to_thread(findings.plans, wishes)
            reply.jobs.append(await self._job_overview(name, findings, plans))
        return reply

    async def _job_overview(
        self, name: str, findings: Findings, plans: Iterable[SnapshotPlan]
    ) -> wire.JobOverview:
        times = captured_times(self._pipeline.state.jobs.get(name))
        on_disk = await self._times_on_disk(name, findings)
        return job_overview(
            name,
            findings.inventories,
            plans,
            silent=findings.silent,
            captured_unix_s={**on_disk, **times},
        )

    async def _times_on_disk(self, name: str, findings: Findings) -> dict[SnapshotId, float]:
        """When the snapshots were captured of which this node's disk has a shard."""
        here = [
            (held.snapshot, shard.rank)
            for node in findings.inventories
            if node.node_id == self._node_id
            for held in node.snapshots
            for shard in [shard for shard in held.shards if shard.level == NVME][:1]
        ]
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._pipeline.workers, self._times, name, here)

    def _times(self, name: str, shards: list[tuple[SnapshotId, int]]) -> dict[SnapshotId, float]:
        found = {}
        for snapshot, rank in shards:
            assert self._pipeline.nvme is not None
            try:
                with self._pipeline.nvme.open_shard(name, snapshot, rank) as shard:
                    record = open_record(shard.record, str(shard.path))
                    found[snapshot] = record.captured_unix_s
            except (EverstepError, OSError):
                continue
        return found

    async def plan(self, request: wire.PlanRequest) -> wire.PlanReply:
        """What of a job can be recovered, from where, and to where.

        Raises:
            InvalidName: If that is no job's name.
        """
        job = checked_name("job", request.job)
        surveyed = await self._job_survey(job)
        findings = await self.gather(job, self._pipeline.config.limits.declare_timeout_s)
        to_step = request.step if request.HasField("step") else None
        wishes = self._wishes(job, surveyed, frozenset(request.levels), to_step)
        plans = await asyncio.to_thread(findings.plans, wishes)
        chosen = next((plan for plan in plans if plan.recoverable), None)
        return self._plan_reply(plans, chosen, findings, surveyed)

    def _plan_reply(
        self,
        plans: Iterable[SnapshotPlan],
        chosen: SnapshotPlan | None,
        findings: Findings,
        surveyed: wire.JobSurvey | None,
    ) -> wire.PlanReply:
        homes = self.homes(chosen, surveyed) if chosen is not None else ()
        return wire.PlanReply(
            plans=[plan.encoded() for plan in plans],
            destinations=[
                wire.Destination(rank=home.rank, node_id=home.node_id, reason=home.reason)
                for home in homes
            ],
            silent=findings.silent,
            problems=problems_of(findings.inventories),
            alone=self.alone,
        )

    def homes(self, plan: SnapshotPlan, surveyed: wire.JobSurvey | None) -> tuple[Home, ...]:
        """Where each rank's shard belongs. See `agent.destinations`."""
        if self._cluster is None:
            return tuple(
                Home(source.rank, self._node_id, "this agent stands alone")
                for source in plan.sources
            )
        entries = self._cluster.node.members.view
        return destinations(
            plan,
            {one.rank: one.node_id for one in (surveyed.ranks if surveyed is not None else ())},
            self._cluster.peers.live(),
            {entry.node_id: entry.replaced_by for entry in entries if entry.replaced_by},
        )

    async def recover(self, request: wire.RecoverRequest) -> AsyncIterator[wire.RecoverProgress]:
        """Put a snapshot back into memory where its ranks run; the plan is told first.

        Raises:
            InvalidName: If that is no job's name.
            NothingRecoverable: If that snapshot cannot be recovered, with what is missing.
        """
        job = checked_name("job", request.job)
        wanted = SnapshotId(request.snapshot.incarnation, request.snapshot.step)
        surveyed = await self._job_survey(job)
        findings = await self.gather(job, self._pipeline.config.limits.declare_timeout_s)
        wishes = self._wishes(job, surveyed, frozenset(request.levels), wanted.step)
        plan = await self._checked(job, findings, wishes, wanted)
        if plan is None:
            raise NothingRecoverable(job, tuple(_reasons(findings, wishes, wanted)))
        yield wire.RecoverProgress(
            node_id=self._node_id, plan=self._plan_reply((plan,), plan, findings, surveyed)
        )
        if self._cluster is None:
            return
        moves = to_be_moved(plan, self.homes(plan, surveyed))
        async for told in _merged(
            [self._mended(self._cluster, job, plan, node, ranks) for node, ranks in moves.items()]
        ):
            yield told

    async def _checked(
        self, job: str, findings: Findings, wishes: Wishes, wanted: SnapshotId
    ) -> SnapshotPlan | None:
        """The plan of a snapshot, made of copies whose digests match."""
        if self._cluster is not None:
            return await self._cluster.gathering.checked(
                job, findings, wishes, lambda plan: plan.snapshot == wanted
            )
        plans = [plan for plan in findings.plans(wishes) if plan.snapshot == wanted]
        return next((plan for plan in plans if plan.recoverable), None)

    async def _mended(
        self, cluster: Cluster, job: str, plan: SnapshotPlan, node_id: str, ranks: list[int]
    ) -> AsyncIterator[wire.RecoverProgress]:
        """What one node tells of its part; whatever happens, it ends with a word."""
        request = wire.MendRequest(job=job, plan=plan.encoded(), ranks=ranks, parity=False)
        problem = ""
        try:
            if node_id == self._node_id:
                stream = cluster.mending.mend(request)
            else:
                stream = cluster.peers.stream(node_id, "Mend", request, self._timeout_s)
            async for progress in stream:
                yield wire.RecoverProgress(node_id=node_id, progress=progress)
        except EverstepError as error:
            problem = str(error)
        except grpc.aio.AioRpcError as error:
            problem = f"{error.code().name.lower()}: {error.details()}"
        if problem:
            log.warning("job %s: recovery at %s: %s", job, node_id, problem)
            failed = wire.MendProgress(problem=problem[:2000], ended=True)
            yield wire.RecoverProgress(node_id=node_id, progress=failed)

    async def gather(self, job: str, timeout_s: float) -> Findings:
        """What all live nodes hold of a job."""
        if self._cluster is not None:
            return await Gathering(self._cluster.peers, timeout_s).gather(job)
        known = known_of(self._pipeline.state.jobs.get(job))
        look = partial(self.keeping.inventory, job, known)
        loop = asyncio.get_running_loop()
        return Findings((await loop.run_in_executor(self._pipeline.workers, look),), ())

    def _wishes(
        self,
        job: str,
        surveyed: wire.JobSurvey | None,
        levels: frozenset[str] = frozenset(),
        to_step: int | None = None,
    ) -> Wishes:
        own = self._pipeline.state.jobs.get(job)
        excluded: frozenset[SnapshotId] = frozenset()
        prefer_node: dict[int, str] = {}
        if surveyed is not None:
            restored = surveyed.restored if surveyed.HasField("restored") else None
            own = Job("", 1, surveyed.incarnation, restored=_id(restored) if restored else None)
            excluded = frozenset(_id(one) for one in surveyed.excluded)
            prefer_node = {one.rank: one.node_id for one in surveyed.ranks}
        preference = own.preference if own is not None else None
        return Wishes(levels, to_step, prefer_node, preference, excluded)

    async def _job_survey(self, job: str) -> wire.JobSurvey | None:
        try:
            found = await self._survey(job)
        except EverstepError as error:
            log.warning("job %s: planned without the coordinator: %s", job, error)
            return None
        return next((one for one in found.jobs if one.job == job), None) if found else None

    async def _survey(self, job: str) -> wire.SurveyReply | None:
        """What the coordinator knows; None if there is none to ask.

        Raises:
            EverstepError: If it does not answer in time.
        """
        if self._cluster is None:
            return None
        request = wire.SurveyRequest(job=job)
        reply: wire.SurveyReply = await self._cluster.ask_coordinator(
            "Survey", request, LOOK_TIMEOUT_S
        )
        return reply


async def _surveyed(cluster: Cluster, request: wire.SurveyRequest) -> wire.SurveyReply:
    """The handler of `Survey`, also while not all members have reported."""
    now_s = time.monotonic()
    node = cluster.node
    if not node.members.is_coordinator(now_s):
        raise CoordinatorUnknown(())
    return wire.SurveyReply(
        coordinator=node.node_id,
        jobs=survey(node.coordination, node.cluster(now_s), now_s, request.job),
        waiting_for=node.members.waiting_for(now_s),
        warnings=node.coordination.protection.warnings,
        protects=cluster.protects,
    )


def _id(named: wire.SnapshotName) -> SnapshotId:
    return SnapshotId(named.incarnation, named.step)


def _reasons(findings: Findings, wishes: Wishes, wanted: SnapshotId) -> list[str]:
    reasons = [f"rank {c.rank}, {c.level}: {c.reason}" for c in findings.rejected]
    for plan in findings.plans(wishes):
        reasons += plan.missing if plan.snapshot == wanted else ()
    reasons += problems_of(findings.inventories)
    if findings.silent:
        reasons.append(f"not reached, and counted as lost: {', '.join(findings.silent)}")
    return reasons[:40] or [f"{wanted} is on no node that was reached"]


async def _merged(
    streams: list[AsyncIterator[wire.RecoverProgress]],
) -> AsyncIterator[wire.RecoverProgress]:
    """All messages of all streams, in the order in which they come."""
    queue: asyncio.Queue[wire.RecoverProgress | None] = asyncio.Queue(_TOLD_AT_ONCE)

    async def pass_on(stream: AsyncIterator[wire.RecoverProgress]) -> None:
        cancelled = False
        try:
            async for message in stream:
                await queue.put(message)
        except asyncio.CancelledError:
            cancelled = True
            raise
        finally:
            if not cancelled:  # else nobody listens any more
                await queue.put(None)

    tasks = [asyncio.get_running_loop().create_task(pass_on(stream)) for stream in streams]
    try:
        left = len(tasks)
        while left:
            message = await queue.get()
            if message is None:
                left -= 1
            else:
                yield message
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
