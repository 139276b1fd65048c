"""The captures under way, each from the granted slot to the seal.

Owns the captures' threads, the fence, and what the agent is told of the outcome. Promises that the
training thread waits here only for bytes to be copied, never for the agent; that no more captures
are under way than `captures_in_flight`, and that they are sealed in the order in which they were
begun, as far as `seal_s` allows; that a copy which was torn, or that the agent refused, is dropped,
counted and named once; and that a slot's memory is let go of before its capture has ended.
"""

import logging
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from everstep.client.arrangement import Arrangement, Arranger
from everstep.client.channel import Channel
from everstep.client.handle import Snapshot
from everstep.client.limits import Limits, Stats
from everstep.client.rng import RNG_PATH
from everstep.client.session import Session
from everstep.client.works import Work, Works, await_ends, finish
from everstep.proto import agent_pb2 as wire
from everstep.proto.errors import AgentUnavailable, DeadlineExceeded, EverstepError
from everstep.proto.failpoint import failpoint
from everstep.proto.state_pb2 import Record, Value
from everstep.snapshot import values
from everstep.snapshot.capture import Capture
from everstep.snapshot.record import seal_record
from everstep.snapshot.samples import leaf_of

log = logging.getLogger("everstep")
_REMEMBERED_HANDLES = 16
_RETRY_S = 0.05


class Capturing:
    """Carries captures out, each on a thread of its own.

    Attributes:
        captures_in_flight: How many may be under way; set before the first.
    """

    def __init__(
        self,
        channel: Channel,
        session: Session,
        arranger: Arranger,
        limits: Limits,
        stats: Stats,
    ) -> None:
        self._channel = channel
        self._session = session
        self._arranger = arranger
        self._limits = limits
        self._stats = stats
        self.captures_in_flight = 1
        self._works = Works()
        self._counting = threading.Lock()
        self._handles: dict[int, Snapshot] = {}
        self._replicated: dict[int, dict[int, tuple[str, ...]]] = {}
        """By step, as the handles, and group: the replicated leaves of its layout."""
        self._warned: set[str] = set()
        self._closed = False
        self._workers: ThreadPoolExecutor | None = None

    @property
    def begun(self) -> bool:
        """Whether anything was captured in this incarnation."""
        return bool(self._handles)

    def under_way(self) -> Snapshot | None:
        """The handle of the oldest capture, if as many are under way as may be."""
        works = self._works.under_way()
        if len(works) < self.captures_in_flight:
            return None
        oldest = works[0]
        if oldest.handle.state != "copying":
            # Nothing but the agent's reply is missing, and others may have heard of it already.
            oldest.ended.wait(self._limits.offer_s)
        return None if oldest.ended.is_set() else oldest.handle

    def begin(
        self,
        step: int,
        arrangement: Arrangement,
        slot: int,
        record: Record,
        generators: dict[str, Any],
    ) -> Snapshot:
        """Copy what must be copied at once, and start copying the rest.

        Args:
            step: Of the snapshot.
            arrangement: The layout and the arena.
            slot: As granted by the agent.
            record: Complete but for the digests and the generators.
            generators: What `rng.capture` returned.
        """
        assert self.under_way() is None
        handle = Snapshot(step)
        memory = arrangement.arena.slot(slot, arrangement.layout.image_bytes)
        capture = Capture(arrangement.plan, memory, seed=step, slot_index=slot)
        work = Work(handle, capture, arrangement, record, generators, slot)
        self._remember(handle, arrangement)
        handle.on_wait(lambda: self._help(step), self._persisted, self._session.levels)
        try:
            capture.begin()
        except BaseException:
            capture.release()
            self._abandon(work, "the copy could not be begun")
            raise
        self._works.add(work)
        self._stats.taken += 1
        if self._workers is None:
            self._workers = ThreadPoolExecutor(self.captures_in_flight, "everstep-capture")
        self._workers.submit(self._carry_out, work)
        return handle

    def _remember(self, handle: Snapshot, arrangement: Arrangement) -> None:
        self._handles[handle.step] = handle
        self._replicated[handle.step] = {g.group_id: g.names for g in arrangement.groups}
        while len(self._handles) > _REMEMBERED_HANDLES:
            oldest = next(iter(self._handles))
            del self._handles[oldest]
            self._replicated.pop(oldest, None)

    def _help(self, step: int) -> None:
        """Somebody waits for this step: it is sealed after those before it."""
        works = self._works.under_way()
        finish(tuple(w for w in works if w.handle.step <= step), self._limits.seal_s)

    def fence(self) -> bool:
        """Before an update: let it change what is being copied. Returns whether anything was."""
        works = [work for work in self._works.under_way() if not work.capture.fenced]
        if not works:
            return False
        failpoint("client.fence.begun")
        deadline = time.monotonic() + self._limits.seal_s
        for work in works:
            if not work.capture.fence(max(0.0, deadline - time.monotonic())):
                work.capture.give_up()
        return True

    def make_room(self) -> bool:
        """Bring the oldest captures to their end, bounded, until another one may begin; return
        whether it may."""
        works = self._works.under_way()
        return self._end(works[: max(0, len(works) - self.captures_in_flight + 1)])

    def settle(self) -> bool:
        """Bring all captures to their end, bounded; return whether they have ended."""
        return self._end(self._works.under_way())

    def _end(self, works: tuple[Work, ...]) -> bool:
        finish(works, self._limits.seal_s)
        return await_ends(tuple(work.ended for work in works), self._limits.seal_s)

    def forget(self) -> None:
        """Handles of an ended incarnation hear nothing any more."""
        self._works.clear()
        self._handles.clear()
        self._replicated.clear()

    def close(self) -> None:
        """Settle, and end the threads."""
        self.settle()
        self._closed = True
        if self._workers is not None:
            self._workers.shutdown(wait=True)

    def persist(self, timeout_s: float) -> wire.PersistReply:
        """Ask for the newest committed snapshot to be on NVMe, and wait for it, bounded."""
        job = self._session.identity.job
        request = wire.PersistRequest(job=job, timeout_s=timeout_s)
        reply: wire.PersistReply = self._channel.call("Persist", request, timeout_s + 1.0)
        return reply

    def _persisted(self, timeout_s: float) -> str:
        reply = self.persist(timeout_s)
        return "" if reply.durable else reply.reason

    def in_flight(self) -> list[wire.InFlight]:
        """What an agent must know is being written, oldest first."""
        return [work.in_flight() for work in self._works.under_way()]

    def on_notice(self, notice: wire.Notice) -> None:
        """Take what the agent tells unasked; called on the session's thread."""
        incarnation = self._session.incarnation
        if notice.HasField("committed") and notice.committed.incarnation == incarnation:
            handle = self._handles.get(notice.committed.step)
            if handle is not None:
                self._stats.committed += not handle.done()
                handle.mark(sealed=True, committed=notice.committed.level)
            if notice.committed.level == "parity":
                self._protected(notice.committed.step)
        elif notice.HasField("dropped") and notice.dropped.incarnation == incarnation:
            names = self._drifted(notice.dropped)
            reason = notice.dropped.reason + (f": {', '.join(names[:3])}" if names else "")
            handle = self._handles.get(notice.dropped.step)
            if handle is not None:
                self._drop(handle, reason)

    def _drifted(self, dropped: wire.Dropped) -> list[str]:
        """The leaves that differ between ranks, by the layout that the step had: the present one
        may be another already."""
        groups = self._replicated.get(dropped.step, {})
        found = [(groups.get(group, ()), index) for group, index in map(leaf_of, dropped.drifted)]
        names = [leaves[index] for leaves, index in found if index < len(leaves)]
        self._arranger.replicas_drifted(names)
        return names

    def _protected(self, newest: int) -> None:
        """Whoever waits for parity of an older step has more than that now."""
        for step, handle in self._handles.items():
            if step < newest and handle.done():
                handle.mark(committed="parity")

    def count_skip(self, handle: Snapshot) -> None:
        """Note that nothing was captured; warn the first time for each kind of reason."""
        kind = handle.skipped.partition(":")[0]
        self._stats.skipped[kind] = self._stats.skipped.get(kind, 0) + 1
        self._warn_once(kind, f"the snapshot of step {handle.step} was skipped: {handle.skipped}")

    def _carry_out(self, work: Work) -> None:
        """On the capture's thread: copy what is left, then seal."""
        capture = work.capture
        try:
            capture.enter_thread()
            capture.carry(self._limits.seal_s)
            if not capture.done.is_set():
                capture.give_up()
                capture.carry(self._limits.seal_s)  # until nothing writes to the slot
            with self._counting:
                self._stats.count(capture.stats)
            if capture.torn:
                self._torn(work)
                return
            if not capture.complete:
                late = f"it was not copied within {self._limits.seal_s:g} s"
                self._abandon(work, capture.problem or late)
                return
            # The agent drops what is older and open when it commits a newer one.
            await_ends(work.older, self._limits.seal_s)
            failpoint("client.seal.before")
            _complete(work)
            self._seal(work)
            failpoint("client.seal.after")
        except EverstepError as error:
            self._drop(work.handle, str(error))
        except Exception as error:
            log.exception("the capture of step %d failed", work.handle.step)
            self._abandon(work, repr(error))
        finally:
            capture.release()
            work.ended.set()

    def _seal(self, work: Work) -> None:
        request = wire.SealRequest(
            session=self._session.identity,
            step=work.handle.step,
            slot=work.slot,
            generation=work.arrangement.arena.generation,
            record=seal_record(work.record),
        )
        deadline = time.monotonic() + self._limits.seal_s
        while True:
            try:
                remaining_s = max(0.1, deadline - time.monotonic())
                reply = self._channel.call("Seal", request, remaining_s)
                break
            except (AgentUnavailable, DeadlineExceeded):
                # The agent may be on its way back, and will find the copy where it is.
                if time.monotonic() >= deadline or self._session.ended or self._closed:
                    raise
                self._session.await_return(deadline)
        if reply.accepted:
            work.handle.mark(sealed=True)
        else:
            self._drop(work.handle, reply.reason)

    def _torn(self, work: Work) -> None:
        names = work.capture.torn
        shown = ", ".join(names[:3]) + (" and more" if len(names) > 3 else "")
        self._arranger.distrust(names)
        self._abandon(work, f"{shown} changed between snapshot() and the optimizer's step")

    def _abandon(self, work: Work, reason: str) -> None:
        step = work.handle.step
        request = wire.AbandonRequest(session=self._session.identity, step=step, reason=reason)
        try:
            self._channel.call("Abandon", request, self._limits.offer_s)
        except EverstepError:
            log.debug("the agent was not told that step %d is abandoned", step)
        self._drop(work.handle, reason)

    def _drop(self, handle: Snapshot, reason: str) -> None:
        if handle.mark(dropped=reason):
            self._stats.dropped += 1
            self._warn_once("dropped", f"the snapshot of step {handle.step} was dropped: {reason}")

    def _warn_once(self, kind: str, message: str) -> None:
        level = logging.DEBUG if kind in self._warned else logging.WARNING
        self._warned.add(kind)
        log.log(level, "%s. Training goes on; client.stats counts further ones.", message)


def _complete(work: Work) -> None:
    """What the record could not say before everything was copied, or need not have said."""
    capture, record = work.capture, work.record
    record.values.append(Value(path=RNG_PATH, json=values.encode(work.generators, RNG_PATH)))
    record.replica_samples = work.arrangement.replica_samples(capture.replica_samples())
    record.unit_digests = bytes(capture.digests)
