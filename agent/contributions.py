"""What members contribute to a row: fetched unit by unit, and added to the row's parity at once.

Owns one row's parity while it is computed, and the streams that bring its data. The parity is the
sum of its contributions, so they are added as they come, each on its own thread, in any order: no
stream waits for another, and each needs the memory of one unit only. Promises that a unit is added
exactly once, after it was verified against its shard's record, and that a digest is taken of a unit
of parity when its last contribution is in. Does not know what becomes of the parity.
"""

import ssl
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from everstep.agent.calling import Calls
from everstep.agent.inventory import MEMORY
from everstep.agent.plans import ParityPlan, PlannedShard
from everstep.agent.rates import Rate
from everstep.agent.receiving import Expected, receive_all
from everstep.agent.tickets import IssuedTicket
from everstep.erasure.codec import Codec
from everstep.proto import peer_pb2
from everstep.proto.failpoint import failpoint
from everstep.proto.ids import UNIT_BYTES
from everstep.proto.state_pb2 import Record
from everstep.snapshot.digest import DIGEST_BYTES, unit_digest

RETRIES = 8
"""How many streams of one contribution may fail in a row, in some seconds: a member that serves
others as well may have no room at first, and one that is lost is noticed by its silence."""


class Stopped(Exception):
    """The round is over or another stream of it failed; does not leave the encoding."""


@dataclass(frozen=True, slots=True)
class Link:
    """How contributions are fetched.

    Attributes:
        calls: To the contributors.
        rate: Shared by all streams of this node.
        stall_timeout_s: How long a contributor may stand still.
        deadline_s: Of the round, by the monotonic clock.
        stop: Ends every stream before its next unit.
        received: Told how many bytes came.
        tls: A client's context; None for none.
    """

    calls: Calls
    rate: Rate | None
    stall_timeout_s: float
    deadline_s: float
    stop: threading.Event
    received: Callable[[int], None]
    tls: ssl.SSLContext | None = None


class RowParity:
    """One parity of a row, in the making.

    Args:
        codec: The group's.
        parity: Which of the row's parities.
        lengths: How many units each contribution has, by data symbol.
        target: Where it goes; overwritten. Held until `close`.
    """

    def __init__(
        self, codec: Codec, parity: int, lengths: Mapping[int, int], target: memoryview
    ) -> None:
        units = max(lengths.values(), default=0)
        assert target.nbytes == units * UNIT_BYTES
        self._codec = codec
        self._parity = parity
        self._target = target
        self._missing = [sum(length > unit for length in lengths.values()) for unit in range(units)]
        self._begun = bytearray(units)
        self._locks = [threading.Lock() for _ in range(min(units, 64))]
        self._digests = bytearray(units * DIGEST_BYTES)

    def add(self, symbol: int, unit: int, data: memoryview) -> None:
        """Add a unit of a contribution; exactly once."""
        with (
            self._locks[unit % len(self._locks)],
            self._target[unit * UNIT_BYTES : (unit + 1) * UNIT_BYTES] as place,
        ):
            if self._begun[unit]:
                self._codec.encode_changed(self._parity, symbol, b"", data, place)
            else:
                # The first one writes, also the zeros behind it: what was there is another plan's.
                sources: list[memoryview | None] = [None] * self._codec.data_symbols
                sources[symbol] = data
                self._codec.encode(self._parity, sources, place)
                self._begun[unit] = True
            self._missing[unit] -= 1
            assert self._missing[unit] >= 0
            if not self._missing[unit]:
                begin = unit * DIGEST_BYTES
                self._digests[begin : begin + DIGEST_BYTES] = unit_digest(place)
                failpoint("agent.encode.unit")

    def digests(self) -> bytes:
        """Of all units, 16 bytes each, once every contribution is in."""
        assert not any(self._missing)
        return bytes(self._digests)

    def close(self) -> None:
        """Let go of the target."""
        self._target.release()


@dataclass(frozen=True, slots=True)
class Run:
    """Units of one shard that follow each other in a contribution."""

    shard: PlannedShard
    first: int
    """Of the image."""
    count: int
    offset: int
    """Of the first one in the contribution."""


def runs_of(plan: ParityPlan, member: int, units: range) -> Iterator[Run]:
    """The shards that a range of a member's stream lies in."""
    begin = 0
    for shard in plan.members[member].shards:
        first = max(units.start, begin)
        stop = min(units.stop, begin + shard.units)
        if first < stop:
            yield Run(shard, first - begin, stop - first, first - units.start)
        begin += shard.units


@dataclass(frozen=True, slots=True)
class Contribution:
    """What one member contributes to one row."""

    plan: ParityPlan
    row: int
    member: int
    records: Mapping[int, Record]
    """By rank; of at least this member's shards."""

    @property
    def node_id(self) -> str:
        """Who has it."""
        return self.plan.members[self.member].node_id

    def fetch(self, into: RowParity, link: Link) -> None:
        """Fetch all of it, and add it. Blocks.

        Raises:
            Stopped: If it was told to.
            EverstepError: If the member does not deliver what its records say, or not in time.
        """
        rows = self.plan.rows()
        symbol = rows.symbol_of(self.member, self.row)
        units = rows.contribution(self.member, self.row)
        with memoryview(bytearray(UNIT_BYTES)) as buffer:
            for run in runs_of(self.plan, self.member, units):
                self._fetch_run(run, symbol, into, link, buffer)

    def _fetch_run(
        self, run: Run, symbol: int, into: RowParity, link: Link, buffer: memoryview
    ) -> None:
        record = self.records[run.shard.rank]
        expected = [expected_unit(record, run.first + at) for at in range(run.count)]
        added = 0

        def open_ticket(first: int) -> IssuedTicket:
            if link.stop.is_set():
                raise Stopped
            return ask_for(self.plan, self.node_id, run, first, link)

        def buffer_for(position: int) -> memoryview:
            if link.stop.is_set():
                raise Stopped
            # Asked for again where a unit is repeated: what came before it was added then.
            if added < position:
                add()
            assert added == position
            return buffer

        def add() -> None:
            nonlocal added
            length = expected[added].length
            link.received(length)
            with buffer[:length] as data:
                into.add(symbol, run.offset + added, data)
            added += 1

        receive_all(
            open_ticket,
            self.node_id,
            expected,
            buffer_for,
            retries=RETRIES,
            connect_timeout_s=link.stall_timeout_s,
            stall_timeout_s=link.stall_timeout_s,
            deadline_s=link.deadline_s,
            rate=link.rate,
            tls=link.tls,
        )
        add()


def expected_unit(record: Record, unit: int) -> Expected:
    """A unit of an image, as its record says."""
    length = min(UNIT_BYTES, record.image_bytes - unit * UNIT_BYTES)
    digest = record.unit_digests[unit * DIGEST_BYTES : (unit + 1) * DIGEST_BYTES]
    return Expected(unit, length, digest)


def ask_for(plan: ParityPlan, node_id: str, run: Run, first: int, link: Link) -> IssuedTicket:
    """A ticket for a run of units in a member's memory, from the unit `first` of the run on.

    Raises:
        EverstepError: What the member raised.
    """
    units = peer_pb2.UnitRange(first=run.first + first, count=run.count - first)
    request = peer_pb2.OpenRequest(
        job=plan.job,
        incarnation=plan.snapshot.incarnation,
        step=plan.snapshot.step,
        level=MEMORY,
        shard=peer_pb2.ShardUnits(rank=run.shard.rank, units=[units]),
    )
    ticket = link.calls.call_blocking(node_id, "Open", request, link.stall_timeout_s)
    return IssuedTicket(ticket.token, ticket.address, ticket.units, ticket.bytes)
