"""Decodes segments of lost chunks for others: the handler of `Rebuild`.

Owns the work of one surviving node: it takes the symbols of a row from here and from other nodes,
unit by unit, decodes, and hands the segment out for a ticket. Promises that only what matches the
lost shard's record is handed out, whatever the sources send; that a source which fails or lies is
done without as long as others suffice; and that memory is bounded: `bulk.max_streams` segments at
one time, each with at most `bulk.buffer_bytes` decoded and one unit of each symbol. Who asks for
more is told that this node is busy.
"""

import asyncio
import contextlib
import logging
import ssl
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations

from everstep.agent import plans
from everstep.agent.calling import Calls
from everstep.agent.cluster_options import BulkOptions
from everstep.agent.describing import check_record
from everstep.agent.fetching import REBUILD_STALLS
from everstep.agent.inventory import LEVELS
from everstep.agent.plans import ParityPlan, PlannedShard
from everstep.agent.rates import Rate
from everstep.agent.sending import BufferPiece, BulkServer, Source
from everstep.agent.stock import Copy, ranks_in
from everstep.agent.symbols import Stores, Symbol, Work, digest_of, parity_store, planned
from everstep.agent.tickets import IssuedTicket
from everstep.erasure.codec import Codec
from everstep.proto import peer_pb2 as wire
from everstep.proto.errors import (
    DeadlineExceeded,
    EverstepError,
    FormatInvalid,
    PeerBusy,
    PeerUnavailable,
    ShardCorrupt,
    TooFewSymbols,
)
from everstep.proto.failpoint import failpoint
from everstep.proto.ids import UNIT_BYTES, checked_name
from everstep.proto.state_pb2 import Record
from everstep.snapshot.digest import unit_matches
from everstep.snapshot.record import open_record, record_digest

log = logging.getLogger("everstep.agent")
_MAX_PLACES = 1024
_REMEMBERED_PLANS = 2


class Executing:
    """The decoding side of one node."""

    def __init__(
        self,
        calls: Calls,
        stores: Stores,
        server: BulkServer,
        bulk: BulkOptions,
        *,
        tls: ssl.SSLContext | None = None,
        join_rate: Rate | None = None,
    ) -> None:
        """Prepare.

        Args:
            calls: To other nodes.
            stores: What is held here.
            server: Hands out what was decoded.
            bulk: The limits.
            tls: A client's context; None for none.
            join_rate: How fast ranks that join may take it; see `agent.rates.join_rate`.
        """
        self._join_rate = join_rate
        self._calls = calls
        self._stores = stores
        self._server = server
        self._bulk = bulk
        self._tls = tls
        self._free = threading.BoundedSemaphore(bulk.max_streams)
        self._workers = ThreadPoolExecutor(bulk.max_streams, "everstep-decode")
        self._lock = threading.Lock()
        self._known: OrderedDict[ParityPlan, dict[int, Record]] = OrderedDict()

    def close(self) -> None:
        """Take no more work; what is under way is not waited for."""
        self._workers.shutdown(wait=False, cancel_futures=True)

    async def rebuild(self, request: wire.RebuildRequest) -> wire.Ticket:
        """The handler of `Rebuild`.

        Raises:
            PeerBusy: If this node decodes as much as it may: ask again.
            FormatInvalid: If the request makes no sense, or this node knows the plan otherwise.
            PeerUnavailable: If too few sources deliver; likewise the others.
            ShardCorrupt: If what they deliver does not decode to the lost shard.
            TooFewSymbols: If there are too few to begin with.
            DeadlineExceeded: If it takes too long.
        """
        if not self._free.acquire(blocking=False):
            most = self._bulk.max_streams
            raise PeerBusy(self._calls.node_id, f"it decodes {most} segments at one time")
        handed_over = threading.Event()
        try:
            work = self._workers.submit(self._rebuild, request, handed_over)
        except RuntimeError as error:
            self._free.release()
            raise PeerUnavailable(self._calls.node_id, "it is shutting down") from error

        def ended(_: object) -> None:
            if not handed_over.is_set():
                self._free.release()

        work.add_done_callback(ended)
        issued = await asyncio.wrap_future(work)
        return wire.Ticket(
            token=issued.token, address=issued.address, units=issued.units, bytes=issued.bytes
        )

    def _rebuild(self, request: wire.RebuildRequest, handed_over: threading.Event) -> IssuedTicket:
        deadline_s = time.monotonic() + REBUILD_STALLS * self._bulk.stall_timeout_s

        def left_s() -> float:
            left = deadline_s - time.monotonic()
            if left <= 0:
                waited_s = REBUILD_STALLS * self._bulk.stall_timeout_s
                raise DeadlineExceeded(f"decoding at {self._calls.node_id}", waited_s)
            return left

        plan = plans.parsed(request.plan, "a plan to rebuild with")
        units = self._checked(request, plan)
        work = Work(
            plan=plan,
            row=request.row,
            units=units,
            usable=_places(request.usable),
            records={},
            calls=self._calls,
            stores=self._stores,
            bulk=self._bulk,
            tls=self._tls,
            left_s=left_s,
            joining=request.joining,
        )
        work.records = self._remembered(work)
        pieces = Decoding(work, request.member).run()
        failpoint("agent.rebuild.decoded")
        handed_over.set()
        rate = self._join_rate if request.joining else None
        return self._server.issue(Source(pieces, self._free.release), rate=rate)

    def _checked(self, request: wire.RebuildRequest, plan: ParityPlan) -> range:
        """The units of the chunk that are asked for, if that makes sense."""
        where = f"a request to rebuild {plan.snapshot}"
        first, count = request.units.first, request.units.count
        try:
            contribution = plan.rows().contribution(request.member, request.row)
        except ValueError as error:
            raise FormatInvalid(where, str(error)) from error
        if not 0 < count <= max(1, self._bulk.buffer_bytes // UNIT_BYTES):
            raise FormatInvalid(where, f"{count} units at once are not possible")
        if first + count > len(contribution):
            raise FormatInvalid(where, f"unit {first + count - 1} is beyond the chunk's end")
        return range(first, first + count)

    def _remembered(self, work: Work) -> dict[int, Record]:
        """The records, which the segments of one recovery share."""
        with self._lock:
            found = dict(self._known.get(work.plan, {}))
        wanted = _concerned(work)
        if any(shard.rank not in found for shard in wanted):
            self._check_plan(work.plan)
            found = self._records(work, wanted, found)
            with self._lock:
                self._known[work.plan] = found
                self._known.move_to_end(work.plan)
                if len(self._known) > _REMEMBERED_PLANS:
                    self._known.popitem(last=False)
        return found

    def _check_plan(self, plan: ParityPlan) -> None:
        where = f"a request to rebuild {plan.snapshot}"
        for level in LEVELS:
            store = parity_store(self._stores, level)
            for manifest in store.manifests(plan.job) if store is not None else ():
                known = manifest.plan
                if known.plan_id == plan.plan_id and plans.parsed(known, where) != plan:
                    raise FormatInvalid(where, f"plan {plan.plan_id} is another one here")

    def _records(
        self, work: Work, concerned: Sequence[PlannedShard], found: dict[int, Record]
    ) -> dict[int, Record]:
        """The records of all shards that the units concern, from here or from other nodes."""
        wanted = {shard.rank: shard for shard in concerned}

        def take(rank: int, envelope: bytes, where: str) -> None:
            shard = wanted.get(rank)
            if shard is None or rank in found:
                return
            with contextlib.suppress(FormatInvalid):
                record = open_record(envelope, where)
                check_record(record, work.plan.job, work.plan.snapshot, rank, where)
                known = record_digest(envelope) == shard.record_digest
                if known and record.image_bytes == shard.image_bytes:
                    found[rank] = record

        for level in LEVELS:
            store = parity_store(self._stores, level)
            for manifest in store.manifests(work.plan.job) if store is not None else ():
                if manifest.plan.plan_id == work.plan.plan_id:
                    for known in manifest.records:
                        take(known.rank, known.record, "a parity manifest")
        nodes = dict.fromkeys(copy.node_id for copy in work.usable)
        for node in [self._calls.node_id, *nodes]:
            missing = sorted(wanted.keys() - found.keys())
            if not missing:
                return found
            with contextlib.suppress(EverstepError):
                for described in self._described(work, node, missing):
                    take(described.rank, described.record, f"what {node} says")
        missing = sorted(wanted.keys() - found.keys())
        if missing:
            ranks = ", ".join(map(str, missing))
            raise PeerUnavailable(
                self._calls.node_id, f"nobody in reach has the records of rank {ranks}"
            )
        return found

    def _described(
        self, work: Work, node: str, ranks: Sequence[int]
    ) -> Sequence[wire.DescribedShard]:
        snapshot = work.plan.snapshot
        request = wire.DescribeRequest(job=work.plan.job, ranks=ranks)
        request.incarnation, request.step = snapshot.incarnation, snapshot.step
        timeout_s = min(work.left_s(), self._bulk.stall_timeout_s)
        reply = self._calls.call_blocking(node, "Describe", request, timeout_s)
        return list(reply.shards)


class Decoding:
    """One segment, decoded unit by unit. Use once."""

    def __init__(self, work: Work, member: int) -> None:
        rows = work.plan.rows()
        self._work = work
        self._member = member
        self._wanted = rows.symbol_of(member, work.row)
        self._codec = Codec(rows.data_symbols, rows.parities)
        self._contribution = rows.contribution(member, work.row)
        symbols = [Symbol(work, other) for other in range(rows.members) if other != member]
        self._symbols = sorted(symbols, key=lambda symbol: symbol.order)

    def run(self) -> list[BufferPiece]:
        """The units, each as the lost shard's record says.

        Raises:
            EverstepError: What the last source that failed said, if too few are left.
            ShardCorrupt: If no choice of symbols gives the right bytes.
            TooFewSymbols: If there are too few sources, and none that failed.
        """
        pieces = []
        try:
            for unit in self._work.units:
                self._work.left_s()
                pieces.append(self._unit(unit))
        finally:
            for symbol in self._symbols:
                symbol.close()
        return pieces

    def _unit(self, unit: int) -> BufferPiece:
        stream_unit = self._contribution.start + unit
        shard, within = self._work.plan.members[self._member].locate(stream_unit)
        length = self._work.plan.unit_bytes_of(self._member, stream_unit)
        digest = digest_of(self._work.records[shard.rank], within)
        target = memoryview(bytearray(length))
        read: dict[Symbol, memoryview] = {}
        chosen = self._choose(unit, read, ())
        if self._decoded(chosen, read, target, digest):
            return BufferPiece(unit, target, digest)
        # Data units were checked, so it is parity that is not what it should be.
        suspects = [symbol for symbol in chosen if symbol.is_parity]
        for count in range(1, len(suspects) + 1):
            for left_out in combinations(suspects, count):
                with contextlib.suppress(EverstepError):
                    others = self._choose(unit, read, left_out)
                    if self._decoded(others, read, target, digest):
                        self._expose(left_out)
                        return BufferPiece(unit, target, digest)
        nodes = ", ".join(symbol.node_id for symbol in suspects)
        where = f"rank {shard.rank}, decoded with the parity of {nodes or 'nobody'}"
        raise ShardCorrupt(where, (within,))

    def _choose(
        self, unit: int, read: dict[Symbol, memoryview], left_out: Sequence[Symbol]
    ) -> list[Symbol]:
        """As many symbols as it takes, their unit read."""
        chosen: list[Symbol] = []
        for symbol in self._symbols:
            if len(chosen) == self._codec.data_symbols:
                break
            if symbol in left_out or (symbol.gone and symbol not in read):
                continue
            if symbol not in read:
                try:
                    read[symbol] = symbol.read(unit)
                except (DeadlineExceeded, EverstepError):
                    self._work.left_s()
                    continue
            chosen.append(symbol)
        if len(chosen) == self._codec.data_symbols:
            return chosen
        if self._work.problems:
            raise self._work.problems[-1]
        raise TooFewSymbols(self._codec.data_symbols, len(chosen))

    def _decoded(
        self,
        chosen: Sequence[Symbol],
        read: dict[Symbol, memoryview],
        target: memoryview,
        digest: bytes,
    ) -> bool:
        present = {symbol.index: read[symbol] for symbol in chosen}
        self._codec.decode(present, self._wanted, target)
        return unit_matches(target, digest)

    def _expose(self, symbols: Sequence[Symbol]) -> None:
        for symbol in symbols:
            log.error("the parity of %s is not that of its row", symbol.node_id)
            symbol.gone = True


def _places(usable: Sequence[str]) -> tuple[Copy, ...]:
    """Parse "NODE/LEVEL"."""
    found = []
    if len(usable) > _MAX_PLACES:
        raise FormatInvalid("a request to rebuild", f"it names {len(usable)} places")
    for place in usable:
        node, _, level = place.rpartition("/")
        if level not in LEVELS:
            raise FormatInvalid("a request to rebuild", f"{place!r} is no place")
        found.append(Copy(checked_name("node", node), level))
    return tuple(dict.fromkeys(found))


def _concerned(work: Work) -> list[PlannedShard]:
    """The shards whose bytes are in the units of the row."""
    rows = work.plan.rows()
    ranks = []
    for member in range(rows.members):
        if rows.symbol_of(member, work.row) < rows.data_symbols:
            chunk = rows.contribution(member, work.row)
            asked = range(
                min(chunk.start + work.units.start, chunk.stop),
                min(chunk.start + work.units.stop, chunk.stop),
            )
            ranks += ranks_in(work.plan, member, asked)
    return [planned(work.plan, rank) for rank in ranks]
