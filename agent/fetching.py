"""Brings a shard, or some units of it, into this node's memory: from a peer, or decoded by peers.

Owns the streams of one transfer and the choice of who decodes. Promises that a unit counts only
once its bytes match the record's digest, that no more streams are open at one time than
`bulk.max_streams` for all transfers of this node together, that every wait has a bound, and that
an error names the node which failed. Writes only into the buffers that it is given, and does not
judge which copy is wanted: the plan does.
"""

import logging
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, zip_longest

from everstep.agent.calling import Calls
from everstep.agent.cluster_options import BulkOptions
from everstep.agent.describing import Described, check_record, describe_plan
from everstep.agent.rates import Rate
from everstep.agent.rebuilding import Rebuilding, Segment
from everstep.agent.receiving import Expected, receive_all
from everstep.agent.sources import Held, SnapshotPlan
from everstep.agent.tickets import IssuedTicket
from everstep.proto import peer_pb2 as wire
from everstep.proto.errors import (
    DeadlineExceeded,
    EverstepError,
    FormatInvalid,
    PeerBusy,
    PeerUnavailable,
)
from everstep.proto.ids import UNIT_BYTES
from everstep.proto.state_pb2 import Record
from everstep.snapshot.digest import DIGEST_BYTES, unit_count

log = logging.getLogger("everstep.agent")

_STREAMS = 4
"""Of one transfer: more do not make it faster."""
_STRIPE_UNITS = 64
"""What one stream of a held shard carries: several share the work, and none is long to repeat."""
_RETRIES = 1
_ROUNDS = 6
"""How often in a row, with pauses of some seconds together, a stream of a held shard may break: a
node that serves as many streams as it may refuses others."""
_DECODE_ROUNDS = 2
"""Each decodes anew: better at another node, soon."""
_PAUSE_S = 0.1
_ASKED = 2
"""How often in a row a node that does not answer is asked."""
_EXECUTORS = 4
"""How many nodes are asked to decode one segment."""
_BUSY_PAUSE_S = 0.05
_LONGEST_BUSY_PAUSE_S = 1.0
REBUILD_STALLS = 6
"""How many stall timeouts the decoding of a segment may take."""

BufferFor = Callable[[int], memoryview]


@dataclass(slots=True)
class _Transfer:
    """One shard on its way."""

    plan: SnapshotPlan
    rank: int
    record: Record
    buffer_for: BufferFor
    progress: Callable[[int], None]
    rate: Rate | None
    deadline_s: float
    stopped: threading.Event
    lock: threading.Lock
    shunned: set[str]
    """Nodes that failed to decode: asked last from then on."""

    def length(self, unit: int) -> int:
        return min(UNIT_BYTES, int(self.record.image_bytes) - unit * UNIT_BYTES)

    def digest(self, unit: int) -> bytes:
        return bytes(self.record.unit_digests[unit * DIGEST_BYTES : (unit + 1) * DIGEST_BYTES])

    def came(self, units: Sequence[int]) -> None:
        with self.lock:
            self.progress(sum(map(self.length, units)))

    def left_s(self, waited_for: str, late: str) -> float:
        left_s = self.deadline_s - time.monotonic()
        if left_s <= 0:
            raise DeadlineExceeded(waited_for, 0, (late,))
        return left_s


class Fetching:
    """The taking side of one node."""

    def __init__(
        self,
        calls: Calls,
        bulk: BulkOptions,
        *,
        tls: ssl.SSLContext | None = None,
        joining: bool = False,
    ) -> None:
        """Prepare.

        Args:
            calls: To other nodes.
            bulk: The limits.
            tls: A client's context; None for none.
            joining: Whether it is for ranks that join live, which the nodes that send may slow.
        """
        self._joining = joining
        self._calls = calls
        self._bulk = bulk
        self._tls = tls
        self._streams = threading.BoundedSemaphore(bulk.max_streams)

    def records(
        self, job: str, plan: SnapshotPlan, ranks: Sequence[int], deadline_s: float
    ) -> dict[int, Described]:
        """Records and layouts of some ranks; see `describe_plan`. Blocks."""
        return describe_plan(self._calls, job, plan, ranks, deadline_s)

    def fetch(
        self,
        plan: SnapshotPlan,
        rank: int,
        units: Sequence[range] | None,
        buffer_for: BufferFor,
        record: Record,
        *,
        deadline_s: float,
        rate: Rate | None = None,
        progress: Callable[[int], None] = lambda count_bytes: None,
    ) -> None:
        """Bring units of a rank's shard here. Blocks: call it in a thread.

        Args:
            plan: Where the shard is, or how it is decoded.
            rank: Whose.
            units: Which units of the image; None for all.
            buffer_for: Where a unit goes; as long as the unit. Called from several threads, for a
                unit from one at a time, and again if it must be repeated; when a thread asks for
                its next unit, those it asked for before have come.
            record: The shard's, from `records`.
            deadline_s: By the monotonic clock.
            rate: Not to be exceeded, by all streams together.
            progress: Told how many more bytes have come and were right; by one thread at a time.

        Raises:
            KeyError: If the plan has no source of the rank.
            PeerUnavailable: If a node stopped delivering; likewise the others.
            FormatInvalid: A node sent something else than it was asked for.
            ShardCorrupt: A node's copy is damaged, or it lies.
            TooFewSymbols: Too few nodes deliver for decoding.
            DeadlineExceeded: If the deadline passed first.
        """
        source = plan.source_of(rank)
        _check_planned(record, plan, rank, source.image_bytes)
        wanted = _wanted_units(units, unit_count(record.image_bytes))
        transfer = _Transfer(
            plan,
            rank,
            record,
            buffer_for,
            progress,
            rate,
            deadline_s,
            threading.Event(),
            threading.Lock(),
            set(),
        )
        tasks: list[Callable[[], None]]
        if isinstance(source, Held):
            firsts = range(0, len(wanted), _STRIPE_UNITS)
            stripes = [wanted[first : first + _STRIPE_UNITS] for first in firsts]
            tasks = [partial(self._held, transfer, source, stripe) for stripe in stripes]
        else:
            segments = self._segments(plan, rank, wanted)
            tasks = [partial(self._decoded, transfer, segment) for segment in segments]
        self._side_by_side(transfer, tasks)

    def _side_by_side(self, transfer: _Transfer, tasks: Sequence[Callable[[], None]]) -> None:
        """Do all of it, some at a time; the first that fails ends the others."""
        workers = max(1, min(_STREAMS, self._bulk.max_streams, len(tasks)))

        def perform(task: Callable[[], None]) -> None:
            left_s = transfer.left_s("a free stream", self._calls.node_id)
            if not self._streams.acquire(timeout=left_s):
                transfer.left_s("a free stream", self._calls.node_id)
            try:
                if not transfer.stopped.is_set():
                    task()
            finally:
                self._streams.release()

        with ThreadPoolExecutor(workers, f"everstep-fetch-{transfer.rank}") as pool:
            futures = [pool.submit(perform, task) for task in tasks]
            done, left = wait(futures, return_when=FIRST_EXCEPTION)
            failed = [future.exception() for future in done if future.exception() is not None]
            if failed:
                transfer.stopped.set()
                for future in left:
                    future.cancel()
        if failed:
            assert failed[0] is not None
            raise failed[0]

    def _held(self, transfer: _Transfer, source: Held, units: Sequence[int]) -> None:
        snapshot = transfer.plan.snapshot

        def ask(first: int) -> IssuedTicket:
            request = wire.OpenRequest(job=transfer.record.job, level=source.level)
            request.joining = self._joining
            request.incarnation, request.step = snapshot.incarnation, snapshot.step
            request.shard.rank = transfer.rank
            request.shard.units.extend(_ranges(units[first:]))
            timeout_s = self._bulk.stall_timeout_s
            return self._ask(transfer, source.node_id, "Open", request, timeout_s)

        self._receive(transfer, source.node_id, _Run(units, units), ask, _ROUNDS)

    def _receive(
        self,
        transfer: _Transfer,
        peer: str,
        run: "_Run",
        ask: Callable[[int], IssuedTicket],
        rounds: int,
    ) -> None:
        """Receive what is left of a run; `run.done` tells how far it got, whatever happens."""
        failures = 0
        while not transfer.stopped.is_set():
            before = run.done
            try:
                self._receive_once(transfer, peer, run, ask)
                return
            except _Stopped:
                return
            except _Final as final:
                raise final.error from None
            except PeerUnavailable:
                failures = 1 if run.done > before else failures + 1
                if failures >= rounds:
                    raise
            left_s = transfer.left_s(f"units from {peer}", peer)
            transfer.stopped.wait(min(_PAUSE_S * 2 ** (failures - 1), left_s))

    def _receive_once(
        self, transfer: _Transfer, peer: str, run: "_Run", ask: Callable[[int], IssuedTicket]
    ) -> None:
        begin, unanswered = run.done, 0
        expected = [
            Expected(index, transfer.length(unit), transfer.digest(unit))
            for unit, index in zip(run.units[begin:], run.indices[begin:], strict=True)
        ]

        def came(position: int) -> None:
            transfer.came(run.units[run.done : begin + position])
            run.done = max(run.done, begin + position)

        def buffer_for(position: int) -> memoryview:
            came(position)
            if transfer.stopped.is_set():
                raise _Stopped
            return transfer.buffer_for(run.units[begin + position])

        def open_ticket(position: int) -> IssuedTicket:
            nonlocal unanswered
            came(position)
            try:
                ticket = ask(begin + position)
            except EverstepError as error:
                unanswered += 1
                if unanswered < _ASKED and isinstance(error, PeerUnavailable):
                    raise
                raise _Final(error) from error
            unanswered = 0
            return ticket

        receive_all(
            open_ticket,
            peer,
            expected,
            buffer_for,
            retries=_RETRIES,
            connect_timeout_s=self._bulk.stall_timeout_s,
            stall_timeout_s=self._bulk.stall_timeout_s,
            deadline_s=transfer.deadline_s,
            rate=transfer.rate,
            tls=self._tls,
        )
        came(len(expected))

    def _segments(self, plan: SnapshotPlan, rank: int, wanted: Sequence[int]) -> list[Segment]:
        """The segments that hold wanted units, so ordered that all executors work at once."""
        segment_units = max(1, self._bulk.buffer_bytes // UNIT_BYTES)
        by_executor: dict[str, list[Segment]] = {}
        wanted_set = wanted if isinstance(wanted, range) else frozenset(wanted)
        for segment in Rebuilding(plan).segments(rank, segment_units):
            for cut in _cut(segment, wanted_set):
                by_executor.setdefault(cut.executor, []).append(cut)
        turns = zip_longest(*by_executor.values())
        return [segment for turn in turns for segment in turn if segment is not None]

    def _decoded(self, transfer: _Transfer, segment: Segment) -> None:
        """Have a segment decoded, by another node if the first cannot."""
        # Who holds no symbol can decode, too: symbols that are zeros are nobody's.
        others = [one.node_id for one in transfer.plan.parities]
        nodes = dict.fromkeys([segment.executor, *map(_node_of, segment.usable), *others])
        ordered = sorted(nodes, key=lambda node: node in transfer.shunned)
        run = _Run(
            range(segment.image_unit, segment.image_unit + segment.units),
            range(segment.first_unit, segment.first_unit + segment.units),
        )
        problem: EverstepError | None = None
        for node in ordered[:_EXECUTORS]:
            try:
                self._decoded_by(transfer, segment, run, node)
                return
            except EverstepError as error:
                transfer.left_s(f"decoding rank {transfer.rank}", node)
                log.warning("rank %d: %s did not decode: %s", transfer.rank, node, error)
                transfer.shunned.add(node)
                problem = problem or error
        raise problem or PeerUnavailable(segment.executor, "nobody is left to decode")

    def _decoded_by(self, transfer: _Transfer, segment: Segment, run: "_Run", node: str) -> None:
        timeout_s = (REBUILD_STALLS + 1) * self._bulk.stall_timeout_s

        def ask(first: int) -> IssuedTicket:
            request = wire.RebuildRequest(
                plan=segment.plan.encoded(),
                row=segment.row,
                member=segment.member,
                units=wire.UnitRange(first=run.indices[first], count=segment.units - first),
                usable=segment.usable,
                joining=self._joining,
            )
            return self._ask(transfer, node, "Rebuild", request, timeout_s)

        self._receive(transfer, node, run, ask, _DECODE_ROUNDS)

    def _ask(
        self, transfer: _Transfer, node: str, method: str, request: object, timeout_s: float
    ) -> IssuedTicket:
        """A ticket; as long as the node has no room, it is asked again."""
        pause_s = _BUSY_PAUSE_S
        patient_until_s = time.monotonic() + REBUILD_STALLS * self._bulk.stall_timeout_s
        while True:
            left_s = transfer.left_s(f"a ticket of {node}", node)
            try:
                reply = self._calls.call_blocking(node, method, request, min(left_s, timeout_s))
                return IssuedTicket(reply.token, reply.address, reply.units, reply.bytes)
            except PeerBusy:
                if time.monotonic() >= patient_until_s:
                    raise
                if transfer.stopped.wait(min(pause_s, left_s)):
                    raise _Stopped from None
                pause_s = min(2 * pause_s, _LONGEST_BUSY_PAUSE_S)


@dataclass(slots=True)
class _Run:
    """Units of an image that one stream brings, by the indices that the peer has for them."""

    units: Sequence[int]
    indices: Sequence[int]
    done: int = 0


class _Final(Exception):
    """A peer gave an answer that asking again does not change."""

    def __init__(self, error: EverstepError) -> None:
        super().__init__(str(error))
        self.error = error


class _Stopped(Exception):
    """Another stream of the transfer failed."""


def _check_planned(record: Record, plan: SnapshotPlan, rank: int, image_bytes: int) -> None:
    """Raise FormatInvalid unless it is of the rank, and as long as planned."""
    check_record(record, record.job, plan.snapshot, rank, f"the record of rank {rank}")
    if record.image_bytes != image_bytes or record.unit_bytes != UNIT_BYTES:
        raise FormatInvalid(
            f"the record of rank {rank}",
            f"it is of {record.image_bytes} bytes, the plan of {image_bytes}",
        )


def _wanted_units(units: Sequence[range] | None, count: int) -> Sequence[int]:
    """In order, each once; None for all of so many."""
    wanted = range(count) if units is None else sorted(set(chain.from_iterable(units)))
    assert not wanted or (wanted[0] >= 0 and wanted[-1] < count), (wanted[-1], count)
    return wanted


def _node_of(place: str) -> str:
    return place.rpartition("/")[0]


def _ranges(units: Sequence[int]) -> list[wire.UnitRange]:
    """Ascending units as ranges."""
    found: list[wire.UnitRange] = []
    for unit in units:
        if found and found[-1].first + found[-1].count == unit:
            found[-1].count += 1
        else:
            found.append(wire.UnitRange(first=unit, count=1))
    return found


def _cut(segment: Segment, wanted: range | frozenset[int]) -> Iterator[Segment]:
    """The runs of a segment that are wanted."""
    first = None
    for offset in range(segment.units + 1):
        inside = offset < segment.units and segment.image_unit + offset in wanted
        if inside and first is None:
            first = offset
        elif not inside and first is not None:
            yield replace(
                segment,
                first_unit=segment.first_unit + first,
                image_unit=segment.image_unit + first,
                units=offset - first,
            )
            first = None
