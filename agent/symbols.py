"""The symbols of a row, read unit by unit from wherever they are: here, or at other nodes.

Owns the way from a symbol to its bytes, with the search for another place when one fails. Promises
that a data unit which is returned matches the record of its shard, that parity matches
its manifest, and that each place is tried a bounded number of times. Whether parity is that of the
row nobody can say who has not decoded with it: what comes of it must be checked.
"""

import contextlib
import logging
import os
import ssl
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from everstep.agent.calling import Calls
from everstep.agent.cluster_options import BulkOptions
from everstep.agent.inventory import MEMORY, NVME
from everstep.agent.plans import ParityPlan, PlannedShard
from everstep.agent.receiving import Expected, Receiver
from everstep.agent.stock import Copy
from everstep.agent.tickets import IssuedTicket
from everstep.proto import peer_pb2 as wire
from everstep.proto.errors import (
    EverstepError,
    FormatInvalid,
    PeerBusy,
    PeerUnavailable,
    ShardCorrupt,
)
from everstep.proto.ids import UNIT_BYTES
from everstep.proto.state_pb2 import ParityManifest, Record
from everstep.snapshot.digest import DIGEST_BYTES, unit_matches
from everstep.snapshot.record import record_digest
from everstep.storage.arena import MemoryLevel
from everstep.storage.level import ShardImage
from everstep.storage.nvme import NvmeLevel
from everstep.storage.parity import ParityStore
from everstep.storage.parity_memory import ParityMemory

log = logging.getLogger("everstep.agent")
_ATTEMPTS = 3
"""How often a place that does not deliver is tried before another one is."""
_BUSY_PAUSE_S = 0.1


class Stores(Protocol):
    """What this node holds: the levels of a `Pipeline`."""

    @property
    def memory(self) -> MemoryLevel:
        """Shards in memory."""

    @property
    def nvme(self) -> NvmeLevel | None:
        """Shards and parity on NVMe."""

    @property
    def parity(self) -> ParityMemory | None:
        """Parity in memory."""


def parity_store(stores: Stores, level: str) -> ParityStore | None:
    """Where this node's parity of a level is."""
    if level == MEMORY:
        return stores.parity
    return stores.nvme.parity if stores.nvme is not None else None


@dataclass(slots=True)
class Work:
    """What is common to all symbols of one segment."""

    plan: ParityPlan
    row: int
    units: range
    """Of the chunk."""
    usable: tuple[Copy, ...]
    records: Mapping[int, Record]
    """By rank; all that the row needs."""
    calls: Calls
    stores: Stores
    bulk: BulkOptions
    tls: ssl.SSLContext | None
    left_s: Callable[[], float]
    """Seconds until the deadline; raises when it is over."""
    joining: bool = False
    """Whether it is for a rank that joins live."""
    problems: list[EverstepError] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Piece:
    """A run of a symbol's units that one stream can bring."""

    first: int
    expected: tuple[Expected, ...]
    what: wire.ShardUnits | wire.ParityUnits


class _Stream(Protocol):
    """Units of a piece, one after the other."""

    def read_into(self, buffer: memoryview) -> int:
        """The next unit; its length."""

    def close(self) -> None:
        """End it."""


class Symbol:
    """One member's symbol of the row. Use from one thread, and `close` it."""

    def __init__(self, work: Work, member: int) -> None:
        rows = work.plan.rows()
        self._work = work
        self._member = member
        self.index = rows.symbol_of(member, work.row)
        self.is_parity = self.index >= rows.data_symbols
        self.gone = False
        self._places: dict[int, list[Copy]] = {}
        """By piece, those that have not failed yet."""
        node = work.plan.members[member].node_id
        self._pieces = tuple(self._parity() if self.is_parity else self._data())
        self._own = [copy for copy in work.usable if copy.node_id == node]
        others = [] if self.is_parity else [c for c in work.usable if c.node_id != node]
        self._candidates = self._own + others
        self._stream: _Stream | None = None
        self._next = -1
        self._buffer = memoryview(bytearray(UNIT_BYTES if self._pieces else 0))

    @property
    def order(self) -> tuple[bool, int]:
        """Zeros first, then as the places are listed; unknown ones last."""
        if not self._pieces:
            return False, 0
        at = [self._work.usable.index(copy) for copy in self._own]
        return True, min(at, default=len(self._work.usable))

    @property
    def node_id(self) -> str:
        """The member."""
        return self._work.plan.members[self._member].node_id

    def close(self) -> None:
        """Hang up. Idempotent."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def read(self, unit: int) -> memoryview:
        """The bytes of a unit of the chunk, good until the next call; empty where it is zeros.

        Raises:
            EverstepError: What the last place said; the symbol is gone then.
        """
        piece = next((p for p in self._pieces if p.first <= unit < p.first + len(p.expected)), None)
        if piece is None:
            return self._buffer[:0]
        places = self._places.setdefault(piece.first, list(self._candidates))
        problem: EverstepError = PeerUnavailable(self.node_id, "nobody is known to hold its part")
        while places:
            attempts, patient_until_s = 0, time.monotonic() + self._work.bulk.stall_timeout_s / 2
            while attempts < _ATTEMPTS:
                try:
                    return self._buffer[: self._read(piece, places[0], unit)]
                except (EverstepError, OSError) as error:
                    self.close()
                    left_s = self._work.left_s()
                    problem = _typed(error, places[0])
                    if isinstance(error, PeerBusy) and time.monotonic() < patient_until_s:
                        time.sleep(min(_BUSY_PAUSE_S, left_s))
                        continue
                    # Wrong bytes may be the network's doing: only here they say something.
                    if places[0].node_id == self._work.calls.node_id:
                        break
                    attempts += 1
            log.warning("%s has no unit %d of %s: %s", places[0], unit, self.node_id, problem)
            places.pop(0)
        self.gone = True
        self._work.problems.append(problem)
        raise problem

    def _read(self, piece: _Piece, place: Copy, unit: int) -> int:
        if self._stream is None or self._next != unit:
            self.close()
            offset = unit - piece.first
            if place.node_id == self._work.calls.node_id:
                self._stream = _local(self._work, piece, place, offset)
            else:
                self._stream = self._remote(piece, place, offset)
        length = self._stream.read_into(self._buffer)
        self._next = unit + 1
        if self._next == piece.first + len(piece.expected):
            self.close()
            self._next = -1
        return length

    def _remote(self, piece: _Piece, place: Copy, offset: int) -> _Stream:
        work = self._work
        expected = piece.expected[offset:]
        snapshot = work.plan.snapshot
        request = wire.OpenRequest(job=work.plan.job, level=place.level)
        request.incarnation, request.step = snapshot.incarnation, snapshot.step
        request.joining = work.joining
        wanted = wire.UnitRange(first=expected[0].index, count=len(expected))
        if isinstance(piece.what, wire.ShardUnits):
            request.shard.CopyFrom(piece.what)
            request.shard.units.append(wanted)
        else:
            request.parity.CopyFrom(piece.what)
            request.parity.units.CopyFrom(wanted)
        timeout_s = min(work.left_s(), work.bulk.stall_timeout_s)
        reply = work.calls.call_blocking(place.node_id, "Open", request, timeout_s)
        receiver = Receiver(
            IssuedTicket(reply.token, reply.address, reply.units, reply.bytes),
            place.node_id,
            expected,
            connect_timeout_s=work.bulk.stall_timeout_s,
            stall_timeout_s=work.bulk.stall_timeout_s,
            tls=work.tls,
        )
        try:
            return receiver.__enter__()
        except PeerUnavailable as error:
            # It has just answered, so it is there: it serves as many streams as it may.
            raise PeerBusy(place.node_id, error.detail) from error

    def _data(self) -> Iterator[_Piece]:
        work = self._work
        contribution = work.plan.rows().contribution(self._member, work.row)
        expected: list[Expected] = []
        rank, first = -1, 0
        for unit in work.units:
            if unit >= len(contribution):
                break
            shard, within = work.plan.members[self._member].locate(contribution.start + unit)
            if shard.rank != rank and expected:
                yield _Piece(first, tuple(expected), wire.ShardUnits(rank=rank))
                expected = []
            if not expected:
                rank, first = shard.rank, unit
            length = work.plan.unit_bytes_of(self._member, contribution.start + unit)
            expected.append(Expected(within, length, digest_of(work.records[rank], within)))
        if expected:
            yield _Piece(first, tuple(expected), wire.ShardUnits(rank=rank))

    def _parity(self) -> Iterator[_Piece]:
        work = self._work
        stop = min(work.units.stop, work.plan.rows().parity_units(work.row))
        units = range(work.units.start, stop)
        if units:
            expected = tuple(Expected(unit, UNIT_BYTES, None) for unit in units)
            what = wire.ParityUnits(plan_id=work.plan.plan_id, row=work.row)
            yield _Piece(units.start, expected, what)


def digest_of(record: Record, unit: int) -> bytes:
    """The digest of a unit of a shard."""
    return bytes(record.unit_digests[unit * DIGEST_BYTES : (unit + 1) * DIGEST_BYTES])


def _typed(error: EverstepError | OSError, place: Copy) -> EverstepError:
    if isinstance(error, EverstepError):
        return error
    return PeerUnavailable(place.node_id, f"its {place.level} cannot be read: {error}")


class _LocalStream:
    """Units of a file of this node; read, not mapped: a bad sector is an error then."""

    def __init__(self, path: os.PathLike[str], offset: int, expected: Sequence[Expected]) -> None:
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        self._path = path
        self._offset = offset
        self._expected = iter(expected)

    def read_into(self, buffer: memoryview) -> int:
        unit = next(self._expected)
        data = buffer[: unit.length]
        read = os.preadv(self._descriptor, [data], self._offset + unit.index * UNIT_BYTES)
        assert unit.digest is not None
        if read != unit.length or not unit_matches(data, unit.digest):
            raise ShardCorrupt(str(self._path), (unit.index,))
        return unit.length

    def close(self) -> None:
        with contextlib.suppress(OSError):
            os.close(self._descriptor)


def _local(work: Work, piece: _Piece, place: Copy, offset: int) -> _Stream:
    """Open a piece that lies here.

    Raises:
        FormatInvalid: If it does not.
    """
    expected = piece.expected[offset:]
    if isinstance(piece.what, wire.ShardUnits):
        with _local_shard(work, piece.what.rank, place.level) as shard:
            return _LocalStream(shard.path, shard.offset, expected)
    store = parity_store(work.stores, place.level)
    if store is None:
        raise FormatInvalid(place.level, "this node has no such level")
    with store.open(work.plan.job, work.plan.plan_id) as parity:
        manifest = parity.manifest
        first = work.plan.rows().parity_extent(manifest.member, work.row).start
        own = [
            Expected(first + unit.index, unit.length, _parity_digest(manifest, first + unit.index))
            for unit in expected
        ]
        return _LocalStream(parity.path, parity.offset, own)


def _local_shard(work: Work, rank: int, level: str) -> ShardImage:
    """A shard that lies here, and is the one that was protected."""
    store = {MEMORY: work.stores.memory, NVME: work.stores.nvme}.get(level)
    if store is None:
        raise FormatInvalid(level, "this node has no such level")
    shard = store.open_shard(work.plan.job, work.plan.snapshot, rank)
    if record_digest(shard.record) != planned(work.plan, rank).record_digest:
        shard.__exit__(None, None, None)
        raise FormatInvalid(str(shard.path), f"rank {rank} is not the one that was protected")
    return shard


def planned(plan: ParityPlan, rank: int) -> PlannedShard:
    """A shard as a plan knows it.

    Raises:
        KeyError: If the plan does not protect it.
    """
    for member in plan.members:
        for shard in member.shards:
            if shard.rank == rank:
                return shard
    raise KeyError(rank)


def _parity_digest(manifest: ParityManifest, unit: int) -> bytes:
    return bytes(manifest.unit_digests[unit * DIGEST_BYTES : (unit + 1) * DIGEST_BYTES])
