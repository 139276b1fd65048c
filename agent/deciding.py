"""Which snapshot all ranks of an incarnation restore, as the coordinator decides it.

Owns the decision over all nodes; `agent.recovery` is its counterpart where an agent stands alone.
Promises one snapshot for all ranks of an incarnation, whoever asks and however often; that one
which some node already acted on is given again by the next coordinator; that it is whole or an
error which says what is missing (P0); and that whoever could not carry out the plan for it is
given another plan, for the same snapshot, if there is one. Moves no bytes: see `agent.restoring`.
"""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from everstep.agent.answering import Answering
from everstep.agent.gathering import Findings, Gathering, Wishes
from everstep.agent.holdings import JobFact
from everstep.agent.job import Job
from everstep.agent.node import Node
from everstep.agent.sources import SnapshotPlan
from everstep.agent.tables import JobTable
from everstep.proto import peer_pb2
from everstep.proto.errors import (
    DeadlineExceeded,
    NothingRecoverable,
    Refused,
    StaleIncarnation,
)
from everstep.proto.ids import SnapshotId

Asked = tuple[int | None, frozenset[str]]


@dataclass(slots=True)
class _Decision:
    asked: Asked
    task: "asyncio.Task[peer_pb2.DecideReply]"
    number: int
    """Of its plan: plans of one incarnation are numbered from 1."""
    bound_to: bytes
    """The commit id of the plans before it; empty if that is not known."""

    @property
    def failed(self) -> bool:
        """Whether nothing was decided."""
        return self.task.done() and (self.task.cancelled() or self.task.exception() is not None)

    @property
    def commit_id(self) -> bytes:
        """Of what plans after it must be for; empty if that is not known."""
        decided = self.task.done() and not self.failed
        return (decided and self.task.result().plan.commit_id) or self.bound_to


class Deciding:
    """All jobs' restores, while this agent coordinates."""

    def __init__(
        self,
        answering: Answering,
        node: Node,
        gathering: Gathering,
        timeout_s: float,
    ) -> None:
        self._answering = answering
        self._node = node
        self._coordination = node.coordination
        self._gathering = gathering
        self._timeout_s = timeout_s
        self._decisions: dict[tuple[str, int], _Decision] = {}
        answering.handlers["Decide"] = self.decide

    async def decide(self, request: peer_pb2.DecideRequest) -> peer_pb2.DecideReply:
        """The one snapshot for the incarnation of those who ask, and where its shards are.

        Raises:
            CoordinatorUnknown: If this agent does not coordinate.
            NothingRecoverable: If there are snapshots, but no whole one.
            Refused: If this incarnation was asked to restore something else before.
            DeadlineExceeded: If the search takes longer than `restore_timeout_s`.
        """
        self._answering.coordinates()
        to_step = request.to_step if request.HasField("to_step") else None
        asked = (to_step, frozenset(request.levels))
        table = self._coordination.jobs.get(request.job)
        present = table.incarnation if table is not None else 0
        if request.incarnation != present:
            raise StaleIncarnation(request.job, request.incarnation, present)
        if request.live:
            return await self._search_live(request.job, request.incarnation, asked)
        key = (request.job, request.incarnation)
        for ended in [k for k in self._decisions if k[0] == request.job and k != key]:
            del self._decisions[ended]
        known = self._decisions.get(key)
        if known is not None and not known.failed and known.asked != asked:
            raise _asked_otherwise(request.job)
        # Who could not carry out this very plan, and not one that was replaced already.
        stale = known is not None and known.task.done() and known.number <= request.failed_plan
        if known is None or known.failed or stale:
            number = max(request.failed_plan, known.number if known is not None else 0) + 1
            commit_id = known.commit_id if known is not None else b""
            search = self._search(request.job, request.incarnation, asked, number, commit_id)
            task = asyncio.get_running_loop().create_task(search)
            known = self._decisions[key] = _Decision(asked, task, number, commit_id)
        try:
            async with asyncio.timeout(self._timeout_s):
                return await asyncio.shield(known.task)
        except TimeoutError:
            what = f"checking the snapshots of {request.job}"
            raise DeadlineExceeded(what, self._timeout_s) from None

    async def _search_live(self, job: str, incarnation: int, asked: Asked) -> peer_pb2.DecideReply:
        """The newest that the running incarnation has; binds nobody."""
        findings = await self._gathering.gather(job)
        wishes = self._wishes(job, incarnation, asked)
        plan = await self._planned(
            job, findings, wishes, lambda p: p.snapshot.incarnation == incarnation
        )
        if plan is not None:
            return peer_pb2.DecideReply(found=True, plan=plan.encoded(), rejected=findings.rejected)
        committed = any(
            found.snapshot.incarnation == incarnation
            and self._coordination.is_committed(job, found.snapshot)
            for found in findings.plans(self._wishes(job, incarnation, (None, frozenset())))
        )
        if committed:
            raise NothingRecoverable(job, tuple(_reasons(findings, wishes)))
        return peer_pb2.DecideReply(found=False)

    def _wishes(self, job: str, incarnation: int, asked: Asked) -> Wishes:
        facts = self._facts(job, incarnation)
        return Wishes(
            levels=asked[1],
            to_step=asked[0],
            prefer_node={m.rank: node_id for node_id, f in facts.items() for m in f.members},
            preference=_preference(self._coordination.jobs.get(job), facts, incarnation),
            excluded=self._drifted(job),
            revocable=self._coordination.revocable(job, self._node.cluster(time.monotonic())),
        )

    async def _planned(
        self,
        job: str,
        findings: Findings,
        wishes: Wishes,
        usable: Callable[[SnapshotPlan], bool],
    ) -> SnapshotPlan | None:
        """A plan that lasts; only if there is none, one that may come to nothing."""
        plan = await self._gathering.checked(job, findings, wishes, usable)
        if plan is None and wishes.revocable:
            wishes = replace(wishes, revocable=frozenset())
            plan = await self._gathering.checked(job, findings, wishes, usable)
        return plan

    async def _search(
        self, job: str, incarnation: int, asked: Asked, number: int, commit_id: bytes
    ) -> peer_pb2.DecideReply:
        findings = await self._gathering.gather(job)
        wishes = self._wishes(job, incarnation, asked)
        table = self._coordination.jobs.get(job)
        bound = table is not None and table.decided_incarnation == incarnation
        decided = table.restored if table is not None and bound else None
        if bound and decided is None:
            return peer_pb2.DecideReply(found=False)

        def usable(plan: SnapshotPlan) -> bool:
            # What other ranks have loaded already is of this attempt at the step.
            same = not commit_id or plan.commit_id == commit_id
            return decided is None or (plan.snapshot == decided and same)

        plan = await self._planned(job, findings, wishes, usable)
        if plan is None:
            if not bound and not findings.anything and asked[0] is None:
                self._coordination.restored(job, incarnation, None)
                return peer_pb2.DecideReply(found=False)
            everything = replace(wishes, revocable=frozenset())
            raise NothingRecoverable(job, tuple(_reasons(findings, everything)))
        self._coordination.restored(job, incarnation, plan.snapshot)
        return peer_pb2.DecideReply(
            found=True, plan=plan.encoded(), rejected=findings.rejected, plan_number=number
        )

    def _facts(self, job: str, incarnation: int) -> dict[str, JobFact]:
        table = self._coordination.jobs.get(job)
        facts = table.facts if table is not None else {}
        return {n: fact for n, fact in facts.items() if fact.incarnation == incarnation}

    def _drifted(self, job: str) -> frozenset[SnapshotId]:
        table = self._coordination.jobs.get(job)
        return frozenset(
            snapshot
            for snapshot, known in (table.snapshots if table is not None else {}).items()
            if known.whole and known.drifted_replicas() != () and not known.committed_at
        )


def _preference(
    table: JobTable | None, facts: dict[str, JobFact], incarnation: int
) -> Callable[[SnapshotId], tuple[bool, SnapshotId]]:
    restored = max((f.restored for f in facts.values() if f.restored is not None), default=None)
    if table is not None and restored is not None:
        # A node that was started between a commit and the order for it still remembers what the
        # incarnation before went on from, as if that had committed nothing.
        known = table.restored == restored and table.decided_incarnation < incarnation
        since = table.decided_incarnation if known else incarnation - 1
        named = [(s.snapshot, s.stage == "committed") for f in facts.values() for s in f.snapshots]
        named += [(snapshot, True) for fact in facts.values() for snapshot in fact.durable]
        # A node without ranks may know of it by its parity alone.
        named += [(known.snapshot, True) for fact in facts.values() for known in fact.rounds]
        if any(committed and s.incarnation >= since for s, committed in named):
            restored = None
    job = Job("", 1, incarnation, restored=restored)
    return job.preference


def _reasons(findings: Findings, wishes: Wishes) -> list[str]:
    reasons = [
        f"step {copy.step}, rank {copy.rank}, {copy.level}: {copy.reason}"
        for copy in findings.rejected
    ]
    plans = findings.plans(wishes)
    reasons += [f"{plan.snapshot}: {what}" for plan in plans for what in plan.missing]
    reasons += [
        f"{node.node_id}: {what}" for node in findings.inventories for what in node.problems
    ]
    if findings.silent:
        reasons.append(f"not reached, and counted as lost: {', '.join(findings.silent)}")
    if not plans and wishes.to_step is not None:
        reasons.append(f"step {wishes.to_step} is on no node that was reached")
    return reasons[:40]


def _asked_otherwise(job: str) -> Refused:
    return Refused(
        f"this launch of job {job!r} restores something else already, for all its ranks alike. "
        "Nothing was loaded. Ask for the same step and levels on every rank, and once; to go to "
        "another step later, use `rewind` on every rank."
    )
