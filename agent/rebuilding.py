"""What carrying out a plan of recovery takes: who decodes which segment, and which bytes travel.

Owns the division of the work among the survivors, as a pure function of the plan, so that all who
have the plan divide it alike. Each lost chunk of a row is decoded by one survivor that holds a
symbol of the row; it fetches the others and passes the chunk on. The rows go round, so that no
survivor receives more than its share (notes on erasure coding: at most ceil(p / (p - f)) chunks
decoded at each, k - 1 to k chunks received for each). A row of which several chunks are lost is
read once for each of them. Does not move anything.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from everstep.agent.display import ranks as ranks_in_words
from everstep.agent.inventory import LEVELS, MEMORY
from everstep.agent.plans import ParityPlan
from everstep.agent.sources import Decoded, Held, SnapshotPlan
from everstep.agent.stock import Copy, units_of_rank
from everstep.proto.ids import UNIT_BYTES


@dataclass(frozen=True, slots=True)
class Segment:
    """Units of a lost chunk that one survivor decodes and passes on: a `RebuildRequest`."""

    plan: ParityPlan
    row: int
    member: int
    """Whose chunk it is."""
    first_unit: int
    """Of the chunk."""
    units: int
    image_unit: int
    """Where its first unit belongs in the rank's image."""
    executor: str
    """The node that decodes."""
    usable: tuple[str, ...]
    """ "NODE/LEVEL" that hold symbols of the row; those that suffice come first. Symbols that are
    zeros by the plan's geometry are not listed: nobody needs to hold them."""


@dataclass(frozen=True, slots=True)
class Movement:
    """Bytes that travel; from a node to itself, if they are only on its disk."""

    from_node: str
    to_node: str
    bytes: int
    what: str


@dataclass(frozen=True, slots=True)
class _Piece:
    """Part of a symbol that lies at one place."""

    units: range
    """Of the chunk."""
    bytes: int
    copies: tuple[Copy, ...]


@dataclass(frozen=True, slots=True)
class _Symbol:
    """A symbol of a row that is in reach."""

    member: int
    pieces: tuple[_Piece, ...]
    """None at all if it is zeros."""

    @property
    def first(self) -> list[Copy]:
        """The best copy of each piece."""
        return [piece.copies[0] for piece in self.pieces]

    def bytes_from(self, units: range) -> Iterator[tuple[str, int]]:
        """Which node sends how much of some units of it."""
        for piece in self.pieces:
            start, stop = max(units.start, piece.units.start), min(units.stop, piece.units.stop)
            if start < stop:
                # Only the last unit of a piece may be shorter.
                end = min((stop - piece.units.start) * UNIT_BYTES, piece.bytes)
                amount = end - (start - piece.units.start) * UNIT_BYTES
                yield piece.copies[0].node_id, amount


class Rebuilding:
    """The division of a snapshot plan's decoding among the survivors."""

    def __init__(self, plan: SnapshotPlan) -> None:
        self._held = {s.rank: s for s in plan.sources if isinstance(s, Held)}
        self._decoded = {s.rank: s for s in plan.sources if isinstance(s, Decoded)}
        self._parities: dict[tuple[str, str], list[Copy]] = defaultdict(list)
        for parity in plan.parities:
            copy = Copy(parity.node_id, parity.level)
            self._parities[parity.plan_id, parity.node_id].append(copy)
        self._executors: dict[str, dict[tuple[int, int], str]] = {}
        self._symbols: dict[tuple[str, int], list[_Symbol]] = {}

    def segments(self, rank: int, segment_units: int) -> list[Segment]:
        """How a rank's shard is decoded, ascending; empty if it takes no decoding.

        Args:
            rank: The rank.
            segment_units: The most units in one segment.
        """
        assert segment_units > 0
        source = self._decoded.get(rank)
        if source is None:
            return []
        plan, member = source.plan, source.member
        executors = self._executors_of(plan)
        found = []
        for row, units, image_unit in self._spans(source):
            executor = executors[row, member]
            symbols = self._ordered(plan, row, executor)
            usable = tuple(dict.fromkeys(_places(symbols)))
            for first in range(units.start, units.stop, segment_units):
                count = min(segment_units, units.stop - first)
                at = image_unit + first - units.start
                found.append(Segment(plan, row, member, first, count, at, executor, usable))
        return found

    def flows(self, rank: int) -> Iterator[tuple[str, str, int]]:
        """The bytes that decoding a rank's shard moves between survivors, as (from, to, bytes)."""
        for segment in self.segments(rank, 1 << 62):
            symbols = self._ordered(segment.plan, segment.row, segment.executor)
            units = range(segment.first_unit, segment.first_unit + segment.units)
            for symbol in symbols[: segment.plan.rows().data_symbols]:
                for node, amount in symbol.bytes_from(units):
                    yield node, segment.executor, amount

    def _spans(self, source: Decoded) -> Iterator[tuple[int, range, int]]:
        """The pieces of a shard by row: (row, units of the chunk, first unit of the image)."""
        rows = source.plan.rows()
        stream = units_of_rank(source.plan, source.member, source.rank)
        unit = stream.start
        while unit < stream.stop:
            row, offset = rows.place_of(source.member, unit)
            count = min(rows.chunk_units - offset, stream.stop - unit)
            yield row, range(offset, offset + count), unit - stream.start
            unit += count

    def _executors_of(self, plan: ParityPlan) -> dict[tuple[int, int], str]:
        """Who decodes each lost chunk, as (row, member): always the one with the least to do."""
        found = self._executors.get(plan.plan_id)
        if found is not None:
            return found
        found = self._executors[plan.plan_id] = {}
        load: dict[str, int] = defaultdict(int)
        lost = sorted(s.rank for s in self._decoded.values() if s.plan.plan_id == plan.plan_id)
        work: dict[tuple[int, int], int] = defaultdict(int)
        for rank in lost:
            for row, units, _ in self._spans(self._decoded[rank]):
                work[row, self._decoded[rank].member] += len(units)
        for (row, member), amount in sorted(work.items()):
            holders = list(
                dict.fromkeys(
                    copy.node_id for symbol in self._in_reach(plan, row) for copy in symbol.first
                )
            )
            turn = row % len(holders)
            turns = holders[turn:] + holders[:turn]
            executor = min(turns, key=lambda node: load[node])
            load[executor] += amount
            found[row, member] = executor
        return found

    def _ordered(self, plan: ParityPlan, row: int, executor: str) -> list[_Symbol]:
        """The row's symbols, in the order in which an executor best takes them: what it has, what
        is zeros, from memory, and else by turns."""
        size = len(plan.members)

        def order(symbol: _Symbol) -> tuple[bool, int, int]:
            elsewhere = any(copy.node_id != executor for copy in symbol.first)
            level = max((LEVELS.index(copy.level) for copy in symbol.first), default=0)
            return elsewhere, level, (symbol.member - row - 1) % size

        return sorted(self._in_reach(plan, row), key=order)

    def _in_reach(self, plan: ParityPlan, row: int) -> list[_Symbol]:
        found = self._symbols.get((plan.plan_id, row))
        if found is None:
            found = self._symbols[plan.plan_id, row] = list(self._each_in_reach(plan, row))
        return found

    def _each_in_reach(self, plan: ParityPlan, row: int) -> Iterator[_Symbol]:
        rows = plan.rows()
        parity_units = range(rows.parity_units(row))
        holders = rows.parity_holders(row)
        for index, member in enumerate(plan.members):
            if index not in holders:
                pieces = self._data(plan, index, rows.contribution(index, row))
                if pieces is not None:
                    yield _Symbol(index, pieces)
            elif copies := self._parities.get((plan.plan_id, member.node_id)):
                size = len(parity_units) * UNIT_BYTES
                yield _Symbol(index, (_Piece(parity_units, size, tuple(copies)),))

    def _data(self, plan: ParityPlan, member: int, chunk: range) -> tuple[_Piece, ...] | None:
        """Where a contribution lies; None if part of it is lost."""
        pieces, first = [], 0
        for shard in plan.members[member].shards:
            start, stop = max(first, chunk.start), min(first + shard.units, chunk.stop)
            if start < stop:
                held = self._held.get(shard.rank)
                if held is None:
                    return None
                end = min((stop - first) * UNIT_BYTES, shard.image_bytes)
                size = end - (start - first) * UNIT_BYTES
                units = range(start - chunk.start, stop - chunk.start)
                pieces.append(_Piece(units, size, (Copy(held.node_id, held.level),)))
            first += shard.units
        return tuple(pieces)


def _places(symbols: Iterable[_Symbol]) -> Iterator[str]:
    """The best copies of all symbols, then the others."""
    later = []
    for symbol in symbols:
        for piece in symbol.pieces:
            yield f"{piece.copies[0].node_id}/{piece.copies[0].level}"
            later += [f"{copy.node_id}/{copy.level}" for copy in piece.copies[1:]]
    yield from later


def rebuild_work(plan: SnapshotPlan, rank: int, segment_units: int) -> list[Segment]:
    """How a rank's shard is decoded; to ask for several ranks, keep one `Rebuilding`."""
    return Rebuilding(plan).segments(rank, segment_units)


def movements(plan: SnapshotPlan, destination: Mapping[int, str]) -> list[Movement]:
    """Which bytes travel so that ranks' shards are in memory where they are wanted.

    Args:
        plan: A recoverable plan.
        destination: By rank, the node that shall have it; ranks that are not named stay away.
    """
    rebuilding = Rebuilding(plan)
    amounts: dict[tuple[str, str, str], int] = defaultdict(int)
    ranks: dict[tuple[str, str, str], set[int]] = defaultdict(set)

    def add(from_node: str, to_node: str, what: str, amount: int, rank: int) -> None:
        amounts[from_node, to_node, what] += amount
        ranks[from_node, to_node, what].add(rank)

    for source in plan.sources:
        node = destination.get(source.rank)
        if node is None:
            continue
        if isinstance(source, Held):
            if (source.node_id, source.level) != (node, MEMORY):
                what = f"from {source.level}"
                add(source.node_id, node, what, source.image_bytes, source.rank)
            continue
        for from_node, to_node, amount in rebuilding.flows(source.rank):
            if from_node != to_node:
                add(from_node, to_node, "to decode", amount, source.rank)
        for executor, amount in _delivered(rebuilding.segments(source.rank, 1 << 62), source):
            if executor != node:
                add(executor, node, "decoded", amount, source.rank)
    return [
        Movement(from_node, to_node, amount, _described(what, ranks[from_node, to_node, what]))
        for (from_node, to_node, what), amount in sorted(amounts.items())
    ]


def _delivered(segments: Iterable[Segment], source: Decoded) -> Iterator[tuple[str, int]]:
    for segment in segments:
        first = segment.image_unit * UNIT_BYTES
        stop = min(first + segment.units * UNIT_BYTES, source.image_bytes)
        yield segment.executor, stop - first


def _described(what: str, ranks: set[int]) -> str:
    words = f"{'ranks' if len(ranks) > 1 else 'rank'} {ranks_in_words(ranks)}"
    return f"symbols to decode {words}" if what == "to decode" else f"{words}, {what}"


def expected_s(moved: Iterable[Movement], bytes_s: float) -> float:
    """How long that takes at least, if each node sends and receives so many bytes a second.

    The busiest node counts; what it sends and what it receives go side by side.
    """
    assert bytes_s > 0
    sent: dict[str, int] = defaultdict(int)
    received: dict[str, int] = defaultdict(int)
    for movement in moved:
        received[movement.to_node] += movement.bytes
        if movement.from_node != movement.to_node:
            sent[movement.from_node] += movement.bytes
    return max([0, *sent.values(), *received.values()]) / bytes_s
