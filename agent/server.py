"""The agent's gRPC service: message in, event or query, message out.

Owns the translation between the wire and the state machine, and the life of each trainer's
session. Promises that every call ends within its limit, that an error raised on purpose arrives
as itself (see `proto/wire_errors.py`), and that nothing received is used before it was checked.
Decides nothing and touches no level itself.
"""

import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from functools import wraps
from typing import Any

from everstep.agent import events, reports
from everstep.agent.actions import Place
from everstep.agent.agreeing import Agreeing, participants_of
from everstep.agent.answering import among, caller_of, digests_of
from everstep.agent.cluster import Cluster
from everstep.agent.config import MAX_SLOTS, Config
from everstep.agent.needs import check_restoring, needs_of
from everstep.agent.pipeline import Pipeline
from everstep.agent.recovery import Recovery, Wanted
from everstep.agent.reservation import MAX_CAPTURES, reserve_arena
from everstep.agent.surveying import cluster_status
from everstep.proto import agent_pb2 as wire
from everstep.proto import processes
from everstep.proto.agent_pb2_grpc import AgentServicer
from everstep.proto.errors import (
    EverstepError,
    FormatInvalid,
    Refused,
    StaleIncarnation,
)
from everstep.proto.failpoint import failpoint
from everstep.proto.ids import SnapshotId, checked_name
from everstep.proto.wire_errors import METADATA_KEY, encode, status_of
from everstep.snapshot.record import open_record, record_digest

log = logging.getLogger("everstep.agent")
Handler = Callable[[Any, Any, Any], Awaitable[Any]]


def _answered(handler: Handler) -> Handler:
    """Turn errors raised on purpose into their gRPC form."""

    @wraps(handler)
    async def answered(self: Any, request: Any, context: Any) -> Any:
        try:
            return await handler(self, request, context)
        except EverstepError as error:
            await _abort(context, error)

    return answered


async def _abort(context: Any, error: EverstepError) -> None:
    metadata = ((METADATA_KEY, encode(error)),)
    # Status messages travel as headers, which have a limit.
    await context.abort(status_of(error), str(error)[:2000], trailing_metadata=metadata)


def process_alive(pid: int, started_s: float) -> bool:
    """Whether this very process (not a later one with its pid) runs."""
    return processes.started_s(pid) == started_s


def _captures(said: int) -> int:
    return min(max(1, said), MAX_CAPTURES)


def _in_flight(said: Sequence[wire.InFlight]) -> tuple[events.InFlight, ...]:
    """The captures under way that a trainer names: no more than it can have slots."""
    return tuple(
        events.InFlight(one.step, Place(one.generation, one.slot)) for one in said[:MAX_SLOTS]
    )


class Service(AgentServicer):
    """What trainers and the CLI call."""

    def __init__(
        self, config: Config, pipeline: Pipeline, version: str, cluster: Cluster | None = None
    ) -> None:
        self._config = config
        self._pipeline = pipeline
        self._cluster = cluster
        self._state = pipeline.state
        self._recovery = Recovery(pipeline, config.limits.restore_timeout_s)
        self._agreeing = Agreeing()
        self._version = version
        self._started_s = time.monotonic()

    async def Attach(self, request: wire.AttachRequest, context: Any) -> AsyncIterator[wire.Notice]:
        """Hold a trainer's session open; see agent.proto."""
        try:
            incarnation = await self._attach(request)
        except EverstepError as error:
            await _abort(context, error)
            return
        caller = caller_of(request.session)
        queue = self._pipeline.notices.subscribe(caller.job, caller.rank)
        try:
            yield self._attached(incarnation, caller)
            for notice in reports.newest_commits(self._state.jobs[caller.job]):
                yield notice
            while True:
                yield await queue.get()
        finally:
            # A process that attached again has a newer stream: the end of this one means nothing.
            if self._pipeline.notices.unsubscribe(caller.job, caller.rank, queue):
                lost = events.SessionLost(caller.job, caller.rank, caller.process_id)
                self._pipeline.submit(lost)

    async def _attach(self, request: wire.AttachRequest) -> int:
        caller = caller_of(request.session)
        decided, launch_id, live = None, request.launch_id[:256], request.live
        if self._cluster is not None:
            reply = await self._cluster.join(request)
            decided, launch_id, live = reply.incarnation, reply.launch_id, reply.joined
        job = self._state.jobs.get(caller.job)
        holder = job.members.get(caller.rank) if job is not None else None
        alive = (
            holder is not None
            and not holder.detached
            and holder.process_id != caller.process_id
            and holder.pid != request.pid
            and process_alive(holder.pid, holder.pid_started_s)
        )
        others = job.members.items() if job is not None else ()
        others_alive = live and any(
            process_alive(member.pid, member.pid_started_s)
            for rank, member in others
            if rank != caller.rank and member.adopted
        )
        has_interval = request.HasField("nvme_interval_steps")
        incarnation: int = self._pipeline.submit(
            events.Attach(
                caller=caller,
                launch_id=launch_id,
                pid=request.pid,
                pid_started_s=request.pid_started_s,
                holder_alive=alive,
                nvme_interval_steps=request.nvme_interval_steps if has_interval else None,
                in_flight=_in_flight(request.in_flight),
                decided=decided,
                live=live,
                others_alive=others_alive,
            )
        )
        log.info("job %s: rank %d attached, pid %d", caller.job, caller.rank, request.pid)
        return incarnation

    def _attached(self, incarnation: int, caller: events.Caller) -> wire.Notice:
        levels = ["memory"]
        if self._cluster is not None and self._cluster.protects:
            levels.append("parity")
        if self._pipeline.nvme is not None:
            levels.append("nvme")
        return wire.Notice(
            attached=wire.Attached(
                incarnation=incarnation,
                node_id=self._config.agent.node_id,
                agent_version=self._version,
                levels=levels,
                joined=caller.rank in self._state.jobs[caller.job].joining,
            )
        )

    @_answered
    async def Declare(self, request: wire.DeclareRequest, context: Any) -> wire.DeclareReply:
        """Agree on replicated leaves, reserve the arena; see agent.proto."""
        caller = caller_of(request.session)
        if not request.layout:
            return await self._agree(caller, request)
        arena = await reserve_arena(
            self._pipeline,
            self._config,
            caller,
            request.layout,
            request.layout_id,
            _captures(request.captures_in_flight),
        )
        failpoint("agent.declare.reserved")
        return wire.DeclareReply(
            arena_path=str(arena.path),
            slot_bytes=arena.slot_bytes,
            slot_count=arena.slot_count,
            generation=arena.generation,
        )

    async def _agree(
        self, caller: events.Caller, request: wire.DeclareRequest
    ) -> wire.DeclareReply:
        self._state.check(caller)
        if self._cluster is not None:
            reply = await self._cluster.agree(request)
            return wire.DeclareReply(agreed=reply.agreed, unknown=reply.unknown)
        job = self._state.jobs[caller.job]
        candidates = tuple(request.candidates)
        group = participants_of(request.participants, caller)
        if request.joining:
            names = job.agreements.names(group)
            return wire.DeclareReply(agreed=among(candidates, names), unknown=names is None)
        digests = digests_of(candidates, request.candidate_digests)
        event = events.Declare(caller, request.round, candidates, digests, group)
        agreed = await self._agreeing.agree(
            event,
            lambda: self._pipeline.submit(event),
            self._config.limits.declare_timeout_s,
            lambda: job.agreements.undeclared(group, event.round, job.world),
        )
        return wire.DeclareReply(agreed=agreed)

    @_answered
    async def Offer(self, request: wire.OfferRequest, context: Any) -> wire.OfferReply:
        """Grant a slot for a step, or say why not."""
        return self.offer(request)

    def offer(self, request: wire.OfferRequest) -> wire.OfferReply:
        """As `Offer`, however it was asked for.

        Raises:
            EverstepError: If whoever asks may not, or the arena is gone.
        """
        caller = caller_of(request.session)
        if self._cluster is not None:
            self._cluster.check_place()
        self._pipeline.check_arena(caller.job, caller.rank)
        reply = self._pipeline.submit(
            events.Offer(
                caller,
                request.step,
                request.patient,
                _captures(request.captures_in_flight),
                _in_flight(request.in_flight),
            )
        )
        failpoint("agent.offer.decided")
        if self._cluster is not None:
            self._cluster.offered(self._state.jobs[caller.job])
        if isinstance(reply, Place):
            return wire.OfferReply(granted=True, slot=reply.slot, generation=reply.generation)
        return wire.OfferReply(granted=False, reason=reply)

    @_answered
    async def Seal(self, request: wire.SealRequest, context: Any) -> wire.SealReply:
        """Take note of a complete shard."""
        caller = caller_of(request.session)
        record = open_record(request.record, f"record of rank {caller.rank}")
        fits = (record.job, record.rank, record.step, record.world, record.incarnation) == (
            caller.job,
            caller.rank,
            request.step,
            caller.world,
            caller.incarnation,
        )
        if not fits:
            raise FormatInvalid("Seal", "the record is of another shard")
        refusal = self._pipeline.submit(
            events.Seal(
                caller=caller,
                step=request.step,
                place=Place(request.generation, request.slot),
                layout_id=record.layout_id,
                image_bytes=record.image_bytes,
                replica_samples=record.replica_samples,
                captured_unix_s=record.captured_unix_s,
                envelope=request.record,
                record_digest=record_digest(request.record),
            )
        )
        failpoint("agent.seal.before_reply")
        return wire.SealReply(accepted=refusal is None, reason=refusal or "")

    @_answered
    async def Abandon(self, request: wire.AbandonRequest, context: Any) -> wire.AbandonReply:
        """Drop a step that a rank will not seal."""
        reason = request.reason[:500]
        self._pipeline.submit(events.Abandon(caller_of(request.session), request.step, reason))
        return wire.AbandonReply()

    @_answered
    async def Restore(self, request: wire.RestoreRequest, context: Any) -> wire.RestoreReply:
        """Say which snapshot to load, and where its checked copies lie."""
        caller = caller_of(request.session)
        job = self._state.jobs.get(caller.job)
        if job is None or job.incarnation != caller.incarnation:
            raise StaleIncarnation(caller.job, caller.incarnation, job.incarnation if job else 0)
        unknown = sorted(set(request.levels) - {"memory", "nvme"})
        if unknown:
            raise Refused(f"there is no level {unknown[0]!r}; levels are memory and nvme.")
        to_step = request.to_step if request.HasField("to_step") else None
        wanted = Wanted(to_step, frozenset(request.levels), tuple(request.rejected))
        if request.live:
            self._state.check(caller)
        if self._cluster is not None:
            return await self._cluster.restore(job, caller.rank, wanted, live=request.live)
        if request.live:
            return await self._recovery.join(job, caller.rank, wanted)
        return await self._recovery.decide(job, wanted)

    @_answered
    async def Gather(self, request: wire.GatherRequest, context: Any) -> wire.GatherReply:
        """Have units of shards on this node, for a rank that was told what to restore."""
        caller = caller_of(request.session)
        self._state.check(caller)
        job = self._state.jobs[caller.job]
        snapshot = SnapshotId(request.incarnation, request.step)
        check_restoring(job, caller.rank, snapshot)
        needs = needs_of(request)
        gathering = self._recovery if self._cluster is None else self._cluster
        found = await gathering.gather(job, caller.rank, snapshot, needs)
        self._state.check(caller)
        return wire.GatherReply(shards=found)

    @_answered
    async def Persist(self, request: wire.PersistRequest, context: Any) -> wire.PersistReply:
        """Wait, bounded, until the newest committed snapshot is on NVMe."""
        if self._pipeline.nvme is None:
            return wire.PersistReply(durable=False, reason="this agent has no nvme_dir")
        wanted = self._pipeline.submit(events.PersistWanted(checked_name("job", request.job)))
        if wanted is None:
            return wire.PersistReply(durable=False, reason="nothing is committed in memory yet")
        job = self._state.jobs[request.job]
        alone = self._cluster is None

        def settled() -> bool:
            over = job.flushing is None and not job.flush_wanted
            # Other nodes' parts take their time: only a failure here is final.
            return wanted in job.durable or (over and (alone or wanted in job.flush_failed))

        await self._pipeline.settled(
            settled,
            min(request.timeout_s, self._config.limits.restore_timeout_s),
        )
        durable = wanted in job.durable
        reason = "" if durable else (job.last_error or "the flush did not end in time")
        return wire.PersistReply(durable=durable, step=wanted.step, reason=reason)

    @_answered
    async def Detach(self, request: wire.DetachRequest, context: Any) -> wire.DetachReply:
        """End a session in good order."""
        self._pipeline.submit(events.Detach(caller_of(request.session)))
        return wire.DetachReply()

    @_answered
    async def Status(self, request: wire.StatusRequest, context: Any) -> wire.StatusReply:
        """What the agent holds and does."""
        return reports.status(
            self._config,
            self._state,
            version=self._version,
            uptime_s=time.monotonic() - self._started_s,
            only_job=request.job,
            cluster=self._cluster_status(),
        )

    def _cluster_status(self) -> wire.ClusterStatus | None:
        if self._cluster is None:
            return None
        members, refused = self._cluster.node.members, self._cluster.answering.refused
        return cluster_status(members, refused, self._cluster.bulk.counters, time.monotonic())

    @_answered
    async def Verify(self, request: wire.VerifyRequest, context: Any) -> wire.VerifyReply:
        """Check the digests of what is held."""
        return await reports.verify(self._pipeline, request)

    @_answered
    async def Collect(self, request: wire.CollectRequest, context: Any) -> wire.CollectReply:
        """Free what the retention rule does not keep, or a whole job."""
        return await reports.collect(self._pipeline, self._config, request)
