"""What all living nodes together hold of one snapshot, and what it suffices for.

Owns what can be used: copies and parity of one attempt at the snapshot, and never of two (which
these are: `agent.attempts`). Of several attempts the one that is there as a whole is taken. If
several are, none is: nobody knows which of them is wanted.

Owns, too, when a row can be decoded: a symbol counts if all of it is there, at whatever node and
level; zeros beyond the end of a stream are there always. Whether copies are sound it does not
know: those found damaged are given to it.
"""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from everstep.agent.attempts import Attempt, attempts
from everstep.agent.inventory import LEVELS, HeldSnapshot, NodeInventory
from everstep.agent.plans import ParityPlan
from everstep.erasure.rows import Rows
from everstep.proto.ids import SnapshotId

Allowed = Callable[[str, SnapshotId, int | None, str], bool]
"""Whether a node's copy of a rank's shard, or its parity (None), at a level may be used."""
Need = tuple[frozenset[str], ...]
"""What a symbol takes: of each of these sets, one node that lives."""
NOBODY: frozenset[str] = frozenset()
_NAMED = 8
"""How many places a message names."""


@dataclass(frozen=True, slots=True)
class Erasure:
    """A copy that was found damaged: as good as lost."""

    node_id: str
    snapshot: SnapshotId
    rank: int | None
    """None: that node's parity."""
    level: str


@dataclass(frozen=True, slots=True)
class Copy:
    """A place that has it."""

    node_id: str
    level: str

    @property
    def order(self) -> tuple[int, str]:
        """Fastest level first."""
        return LEVELS.index(self.level), self.node_id


@dataclass(frozen=True, eq=False)
class Group:
    """Nodes that protect each other's shards of the snapshot, by one plan."""

    plan: ParityPlan
    parities: dict[int, list[Copy]] = field(default_factory=dict)
    """By member, fastest first; only those of whom it is there."""

    @cached_property
    def rows(self) -> Rows:
        """The geometry."""
        return self.plan.rows()

    def rows_of(self, member: int, rank: int) -> list[int]:
        """The rows that a member's rank is spread over."""
        units = units_of_rank(self.plan, member, rank)
        if not units:
            return []
        chunk_units = self.rows.chunk_units
        chunks = range(units.start // chunk_units, (units.stop - 1) // chunk_units + 1)
        return [self.rows.place_of(member, chunk * chunk_units)[0] for chunk in chunks]


@dataclass(slots=True)
class Stock:
    """What can be used of a snapshot."""

    snapshot: SnapshotId
    world: int
    copies: dict[int, list[Copy]] = field(default_factory=dict)
    """By rank, fastest first; only ranks that have one."""
    image_bytes: dict[int, int] = field(default_factory=dict)
    groups: dict[ParityPlan, Group] = field(default_factory=dict)
    """Only those whose plans agree with the copies."""
    problem: str = ""
    """Why nothing of it may be used; empty if it may."""
    commit_id: bytes = b""
    """Of the attempt that this is; empty if that is not known."""
    aside: dict[int, list[Copy]] = field(default_factory=dict)
    """By rank, copies that belong to other attempts, or to which one is not known."""
    _groups_of: dict[int, list[tuple[Group, int]]] = field(default_factory=dict)
    _needs: dict[tuple[Group, int], list[Need]] = field(default_factory=dict)

    def groups_of(self, rank: int) -> list[tuple[Group, int]]:
        """The groups that protect a rank, each with the member that held it."""
        if not self._groups_of:
            for group in self.groups.values():
                for index, member in enumerate(group.plan.members):
                    for shard in member.shards:
                        self._groups_of.setdefault(shard.rank, []).append((group, index))
        return self._groups_of.get(rank, [])

    def nodes_of(self, rank: int) -> frozenset[str]:
        """The nodes that have a copy of a rank's shard."""
        return frozenset(copy.node_id for copy in self.copies.get(rank, ()))

    def needs(self, group: Group, row: int) -> list[Need]:
        """What each member's symbol of a row takes, by member."""
        found = self._needs.get((group, row))
        if found is None:
            found = self._needs[group, row] = list(self._each_need(group, row))
        return found

    def _each_need(self, group: Group, row: int) -> Iterator[Need]:
        holders = group.rows.parity_holders(row)
        for member in range(group.rows.members):
            if member in holders:
                copies = group.parities.get(member, ())
                yield (frozenset(copy.node_id for copy in copies),)
            else:
                ranks = ranks_in(group.plan, member, group.rows.contribution(member, row))
                yield tuple(self.nodes_of(rank) for rank in ranks)

    def lacking(self, group: Group, row: int, lost: frozenset[str] = NOBODY) -> int:
        """How many symbols a row lacks to be decoded, if these nodes are lost, too."""
        usable = sum(all(not nodes <= lost for nodes in need) for need in self.needs(group, row))
        return max(0, group.rows.data_symbols - usable)

    def decodable(
        self, group: Group, member: int, rank: int, lost: frozenset[str] = NOBODY
    ) -> bool:
        """Whether a rank's shard can be decoded, if these nodes are lost, too."""
        # Its record is in the manifest, and that lies beside the parity.
        manifests = (copy for copies in group.parities.values() for copy in copies)
        return any(copy.node_id not in lost for copy in manifests) and not any(
            self.lacking(group, row, lost) for row in group.rows_of(member, rank)
        )

    def available(self, rank: int, lost: frozenset[str] = NOBODY) -> bool:
        """Whether a rank's shard can be had at all, if these nodes are lost, too."""
        return not self.nodes_of(rank) <= lost or any(
            self.decodable(group, member, rank, lost) for group, member in self.groups_of(rank)
        )

    def ranks_lost(self) -> int:
        """How many ranks' shards cannot be had."""
        return sum(not self.available(rank) for rank in range(self.world))


def units_of_rank(plan: ParityPlan, member: int, rank: int) -> range:
    """Where a rank's image lies in its member's stream, in units.

    Raises:
        KeyError: If the member did not hold it.
    """
    first = 0
    for shard in plan.members[member].shards:
        if shard.rank == rank:
            return range(first, first + shard.units)
        first += shard.units
    raise KeyError(rank)


def ranks_in(plan: ParityPlan, member: int, units: range) -> list[int]:
    """The ranks that units of a member's stream belong to."""
    found, first = [], 0
    for shard in plan.members[member].shards:
        if max(first, units.start) < min(first + shard.units, units.stop):
            found.append(shard.rank)
        first += shard.units
    return found


def stocks(
    inventories: Iterable[NodeInventory],
    levels: Collection[str] = frozenset(),
    erasures: Iterable[Erasure] = (),
) -> list[Stock]:
    """What there is of each snapshot.

    Args:
        inventories: Of the nodes that live.
        levels: Those that may be used; empty for all. What lies at others still counts as
            evidence of what belongs together, and so do damaged copies.
        erasures: Copies found damaged.
    """
    held: dict[SnapshotId, list[tuple[str, HeldSnapshot]]] = defaultdict(list)
    for inventory in inventories:
        for one in inventory.snapshots:
            held[one.snapshot].append((inventory.node_id, one))
    damaged = {(e.node_id, e.snapshot, e.rank, e.level) for e in erasures}

    def allowed(node_id: str, snapshot: SnapshotId, rank: int | None, level: str) -> bool:
        there = not levels or level in levels
        return there and (node_id, snapshot, rank, level) not in damaged

    return [
        _chosen([_stock(snapshot, attempt, ones, allowed) for attempt in attempts(ones)])
        for snapshot, ones in held.items()
    ]


def _chosen(found: Sequence[Stock]) -> Stock:
    """Of the attempts at a snapshot the one that is whole; if none is, the one that lacks least."""
    if len(found) == 1:
        return found[0]
    lost = {id(stock): stock.ranks_lost() for stock in found}
    usable = [stock for stock in found if not stock.problem]
    whole = [stock for stock in usable if not lost[id(stock)]]
    if len(whole) > 1:
        sides = " against ".join(_places(stock) for stock in whole)
        problem = (
            f"{len(whole)} snapshots that were committed apart go by this name, and all of them "
            f"are whole ({sides}): take away the nodes or disks that hold the unwanted one"
        )
        return Stock(whole[0].snapshot, whole[0].world, problem=problem)
    return min(usable or found, key=lambda stock: (lost[id(stock)], stock.commit_id))


def _places(stock: Stock) -> str:
    copies = {copy for copies in stock.copies.values() for copy in copies}
    named = [f"{copy.node_id}/{copy.level}" for copy in sorted(copies, key=lambda c: c.order)]
    more = f" and {len(named) - _NAMED} more" if len(named) > _NAMED else ""
    return ", ".join(named[:_NAMED]) + more if named else "parity alone"


def _stock(
    snapshot: SnapshotId,
    attempt: Attempt,
    ones: Sequence[tuple[str, HeldSnapshot]],
    allowed: Allowed,
) -> Stock:
    stock = Stock(snapshot, attempt.world, problem=attempt.problem, commit_id=attempt.commit_id)
    for node_id, one in ones:
        for shard in one.shards:
            if allowed(node_id, snapshot, shard.rank, shard.level):
                kept = stock.copies if attempt.has(shard) else stock.aside
                kept.setdefault(shard.rank, []).append(Copy(node_id, shard.level))
        for parity in one.parities:
            if attempt.agrees(parity.plan) and allowed(node_id, snapshot, None, parity.level):
                _add_parity(stock, parity.plan, Copy(node_id, parity.level))
    for copies in (*stock.copies.values(), *stock.aside.values()):
        copies.sort(key=lambda copy: copy.order)
    stock.image_bytes = {rank: identity[1] for rank, identity in attempt.shards.items()}
    return stock


def _add_parity(stock: Stock, plan: ParityPlan, copy: Copy) -> None:
    try:
        member = plan.index_of(copy.node_id)
    except KeyError:
        return  # nobody can say which rows it is of
    copies = stock.groups.setdefault(plan, Group(plan)).parities.setdefault(member, [])
    copies.append(copy)
    copies.sort(key=lambda one: one.order)
