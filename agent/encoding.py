"""This node's part of a parity round: fetch, encode, publish; and what becomes of parity later.

Owns the actions `Encode`, `StopEncoding`, `DeleteParity` and `FlushParity`. Promises that parity is
published only if every byte it was computed from matched the records that the plan names; that each
`Encode` is answered by one `Encoded` with the problem in words, unless it was stopped; that a round
ends within its deadline and one stall timeout; and that what was not published is given back. Does
not decide which parity is kept: see `everstep.agent.rounds`.
"""

import asyncio
import logging
import ssl
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from everstep.agent import actions, events
from everstep.agent.calling import Calls
from everstep.agent.contributions import Contribution, Link, RowParity, Stopped
from everstep.agent.pipeline import Pipeline
from everstep.agent.plans import ParityPlan
from everstep.agent.rates import Rate
from everstep.agent.vouching import Undelivered, named, vouched
from everstep.erasure.codec import Codec
from everstep.proto import state_pb2
from everstep.proto.envelope import seal
from everstep.proto.errors import EverstepError, Refused
from everstep.proto.failpoint import failpoint
from everstep.proto.ids import UNIT_BYTES
from everstep.snapshot.record import open_record
from everstep.storage.parity_memory import ParityMemory, ParityRoom

log = logging.getLogger("everstep.agent")
_Answer = TypeVar("_Answer")
_CLOSE_TIMEOUT_S = 5.0


@dataclass(slots=True)
class _Running:
    """One plan's parity in the making."""

    stopped: bool = False
    halt: threading.Event = field(default_factory=threading.Event)
    """Set when it is stopped, and when any stream has failed: the others are in vain then."""
    asking: "asyncio.Future[dict[int, bytes]] | None" = None
    ended: asyncio.Event = field(default_factory=asyncio.Event)


class Encoding:
    """The parity of one node. Lives on the agent's loop.

    Args:
        pipeline: Of this agent.
        parity: Where parity is kept in memory.
        calls: To the members, this node among them.
        tls: A client's context for the bulk plane; None for none.
    """

    def __init__(
        self,
        *,
        pipeline: Pipeline,
        parity: ParityMemory,
        calls: Calls,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.pipeline = pipeline
        self.parity = parity
        self.calls = calls
        self._tls = tls
        config = pipeline.config
        self._options = config.parity
        self._max_streams = config.bulk.max_streams
        self._stall_timeout_s = config.bulk.stall_timeout_s
        rate_bytes_s = config.parity.rate_bytes_s
        self._rate = Rate(rate_bytes_s) if rate_bytes_s else None
        # As many streams as it has threads, whichever plan they are for.
        self._threads = ThreadPoolExecutor(self._max_streams, "everstep-encode")
        self._running: dict[tuple[str, str], _Running] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._lock = threading.Lock()
        self._counters: Counter[str] = Counter()

    @property
    def counters(self) -> Mapping[str, int]:
        """How often what happened since the start; a copy.

        published, failed, stopped, bytes_received; stored and store_failed, on NVMe.
        """
        with self._lock:
            return Counter(self._counters)

    def performers(self) -> dict[type, Callable[[Any], None]]:
        """What acts on this room's actions; see `Pipeline.join_cluster`."""
        return {
            actions.Encode: self._encode,
            actions.StopEncoding: self._stop,
            actions.DeleteParity: lambda action: self.pipeline.spawn(self._delete(action)),
            actions.FlushParity: lambda action: self.pipeline.spawn(self._store(action.plan)),
        }

    async def make(self, plan: ParityPlan) -> str:
        """Encode and publish this node's parity of a plan.

        Returns:
            Why it could not be done; empty if it is published.
        """
        if (plan.job, plan.plan_id) in self._running:
            return f"plan {plan.plan_id} is being encoded already"
        return await self._outcome(plan, self._begin(plan))

    async def close(self) -> None:
        """Stop everything under way; bounded to a few seconds."""
        for running in self._running.values():
            _halt(running)
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=_CLOSE_TIMEOUT_S)
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _begin(self, plan: ParityPlan) -> _Running:
        running = self._running[plan.job, plan.plan_id] = _Running()
        return running

    def _encode(self, action: actions.Encode) -> None:
        plan = action.plan
        assert (plan.job, plan.plan_id) not in self._running, plan.plan_id
        # Before the task first runs, so that whatever comes next can stop it.
        running = self._begin(plan)
        task = asyncio.get_running_loop().create_task(self._answer(plan, running))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _answer(self, plan: ParityPlan, running: _Running) -> None:
        problem = await self._outcome(plan, running)
        if not running.stopped:
            self.pipeline.submit(events.Encoded(plan.job, plan.plan_id, problem))
            await self.pipeline.announce_progress()

    def _stop(self, action: actions.StopEncoding) -> None:
        running = self._running.get((action.job, action.plan_id))
        if running is not None:
            _halt(running)

    async def _outcome(self, plan: ParityPlan, running: _Running) -> str:
        what = f"job {plan.job}: parity of {plan.snapshot}"
        try:
            await self._run(plan, running)
        except Stopped:
            self._count("stopped")
            return "it was stopped"
        except (EverstepError, OSError, Undelivered) as error:
            problem = str(error)
            log.warning("%s was not encoded: %s", what, problem)
        except Exception as error:
            # A round that nobody answers for would last until its deadline.
            problem = f"it failed unexpectedly: {error!r}"
            log.exception("%s was not encoded", what)
        else:
            self._count("published")
            return ""
        finally:
            del self._running[plan.job, plan.plan_id]
            running.ended.set()
        self._count("failed")
        return problem

    async def _run(self, plan: ParityPlan, running: _Running) -> None:
        try:
            member = plan.index_of(self.calls.node_id)
        except KeyError:
            raise Refused(f"plan {plan.plan_id} does not name this node.") from None
        deadline_s = time.monotonic() + self._options.timeout_s
        envelopes = await self._vouched(plan, running)
        length_bytes = plan.rows().parity_file_units(member) * UNIT_BYTES
        room = await self._in_thread(
            lambda: self.parity.reserve(plan.job, plan.plan_id, length_bytes)
        )
        try:
            digests = await self._summed(plan, member, envelopes, room, running, deadline_s)
            manifest = _manifest(plan, member, digests, envelopes)
            await self._in_thread(lambda: self._publish(plan.job, manifest))
        finally:
            await self._in_thread(room.close)

    async def _vouched(self, plan: ParityPlan, running: _Running) -> dict[int, bytes]:
        """The records of all shards of the group, by rank."""
        if running.stopped:
            raise Stopped
        running.asking = asyncio.ensure_future(
            vouched(
                self.calls,
                plan,
                self.pipeline.memory,
                at_once=self._max_streams,
                timeout_s=self._stall_timeout_s,
            )
        )
        timeout_s = self._options.timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                return await running.asking
        except TimeoutError:
            raise Undelivered(f"not all records came within {timeout_s:g} s") from None
        except asyncio.CancelledError:
            if running.stopped:
                raise Stopped from None
            raise
        finally:
            running.asking = None

    async def _summed(
        self,
        plan: ParityPlan,
        member: int,
        envelopes: Mapping[int, bytes],
        room: ParityRoom,
        running: _Running,
        deadline_s: float,
    ) -> bytes:
        """Encode into a room; returns the digests of its units."""
        link = Link(
            self.calls,
            self._rate,
            self._stall_timeout_s,
            deadline_s,
            running.halt,
            lambda count_bytes: self._count("bytes_received", count_bytes),
            self._tls,
        )
        records = {rank: open_record(data, f"rank {rank}") for rank, data in envelopes.items()}
        rows = plan.rows()
        codec = Codec(rows.data_symbols, rows.parities)
        parities: list[RowParity] = []
        streams: list[tuple[Contribution, RowParity]] = []
        try:
            for row, parity in rows.rows_of(member):
                extent = rows.parity_extent(member, row)
                target = room.view[extent.start * UNIT_BYTES : extent.stop * UNIT_BYTES]
                # Those behind it first: else all members would begin at the same one.
                order = sorted(rows.contributors(row), key=lambda m: (m - member) % rows.members)
                lengths = {rows.symbol_of(m, row): len(rows.contribution(m, row)) for m in order}
                parities.append(RowParity(codec, parity, lengths, target))
                streams += [
                    (Contribution(plan, row, m, records), parities[-1])
                    for m in order
                    if lengths[rows.symbol_of(m, row)]
                ]
            loop = asyncio.get_running_loop()
            problems = await asyncio.gather(
                *(
                    loop.run_in_executor(self._threads, _fetched, contribution, into, link)
                    for contribution, into in streams
                )
            )
            for problem in filter(None, problems):
                raise Undelivered(problem)
            if running.stopped:
                raise Stopped
            return b"".join(parity.digests() for parity in parities)
        finally:
            for made in parities:
                made.close()

    def _publish(self, job: str, manifest: bytes) -> None:
        failpoint("agent.encode.before_publish")
        self.parity.publish(job, manifest)
        failpoint("agent.encode.after_publish")

    async def _delete(self, action: actions.DeleteParity) -> None:
        running = self._running.get((action.job, action.plan_id))
        if running is not None:
            await running.ended.wait()
        try:
            await self._in_thread(lambda: self.parity.delete(action.job, action.plan_id))
        except (EverstepError, OSError) as error:
            # It costs memory until the agent's next start, never safety.
            log.warning("job %s: parity %s stays: %s", action.job, action.plan_id, error)

    async def _store(self, plan: ParityPlan) -> None:
        if self.pipeline.nvme is None:
            return
        try:
            await self._in_thread(lambda: self._write(plan))
            self._count("stored")
        except (EverstepError, OSError) as error:
            # Not tried again: the next flushed snapshot brings its own.
            self._count("store_failed")
            log.warning("job %s: parity of %s is not on NVMe: %s", plan.job, plan.snapshot, error)

    def _write(self, plan: ParityPlan) -> None:
        nvme = self.pipeline.nvme
        assert nvme is not None
        for layout_id in sorted({s.layout_id for m in plan.members for s in m.shards}):
            # Without them what is decoded after a power loss could not be read.
            layout = self.pipeline.memory.layout(plan.job, layout_id)
            nvme.put_layout(plan.job, layout_id, layout)
        with self.parity.open(plan.job, plan.plan_id) as image:
            nvme.parity.store(plan.job, plan.snapshot, image.image, image.record)

    def _in_thread(self, work: Callable[[], _Answer]) -> Awaitable[_Answer]:
        return asyncio.get_running_loop().run_in_executor(self.pipeline.workers, work)

    def _count(self, name: str, by: int = 1) -> None:
        with self._lock:
            self._counters[name] += by


def _halt(running: _Running) -> None:
    running.stopped = True
    running.halt.set()
    if running.asking is not None:
        running.asking.cancel()


def _fetched(contribution: Contribution, into: RowParity, link: Link) -> str:
    """Fetch a contribution, or say why not; a stream's thread."""
    node_id = contribution.node_id
    try:
        if not link.stop.is_set():
            contribution.fetch(into, link)
    except Stopped:
        return ""
    except (EverstepError, OSError, TimeoutError) as error:
        link.stop.set()
        return named(node_id, error)
    except Exception as error:
        link.stop.set()
        log.exception("fetching from %s failed", node_id)
        return f"{node_id}: it failed unexpectedly: {error!r}"
    return ""


def _manifest(
    plan: ParityPlan, member: int, digests: bytes, envelopes: Mapping[int, bytes]
) -> bytes:
    manifest = state_pb2.ParityManifest(
        plan=plan.encoded(),
        member=member,
        unit_digests=digests,
        records=[
            state_pb2.ShardRecord(rank=rank, record=envelope)
            for rank, envelope in sorted(envelopes.items())
        ],
        encoded_unix_s=time.time(),
    )
    return seal("parity_manifest", manifest.SerializeToString(deterministic=True))
