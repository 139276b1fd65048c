"""What all living nodes together hold of one snapshot: which copies belong together, and what
they suffice for.

Owns the question of truth. A rank's copies belong together only if their records are the same,
byte for byte. If copies of one rank differ, then two snapshots go by one name (an agent's memory
was lost and a number taken again, a disk came back from elsewhere), and no majority decides: only
one whole set that is known to have been committed as one may be used: that of a parity plan over
all ranks, or that of all ranks on one node's NVMe. Plans of several groups, or the disks of several
nodes, could be of either. Without such a set nothing may be used, and nor may a copy that nobody
contradicts.

Owns, too, when a row can be decoded: a symbol counts if all of it is there, at whatever node and
level; zeros beyond the end of a stream are there always. Whether copies are sound it does not
know: those found damaged are given to it.
"""

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from everstep.agent.inventory import LEVELS, NVME, HeldShard, HeldSnapshot, NodeInventory
from everstep.agent.plans import ParityPlan, PlannedShard
from everstep.erasure.rows import Rows
from everstep.proto.ids import SnapshotId

Identity = tuple[bytes, int, str]
"""Digest of the record, bytes of the image, layout: all that tells one shard from another."""
Need = tuple[frozenset[str], ...]
"""What a symbol takes: of each of these sets, one node that lives."""
NOBODY: frozenset[str] = frozenset()


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


def identity_of(shard: HeldShard | PlannedShard) -> Identity:
    """What tells a shard from another of the same rank."""
    return shard.record_digest, shard.image_bytes, shard.layout_id


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

    found = []
    for snapshot, ones in held.items():
        stock = Stock(snapshot, max(one.world for _, one in ones))
        truth = _truth(stock, ones)
        for node_id, one in ones:
            for shard in one.shards:
                if truth.get(shard.rank) == identity_of(shard) and allowed(
                    node_id, snapshot, shard.rank, shard.level
                ):
                    stock.copies.setdefault(shard.rank, []).append(Copy(node_id, shard.level))
            for parity in one.parities:
                if _agrees(parity.plan, truth) and allowed(node_id, snapshot, None, parity.level):
                    _add_parity(stock, parity.plan, Copy(node_id, parity.level))
        for copies in stock.copies.values():
            copies.sort(key=lambda copy: copy.order)
        stock.image_bytes = {rank: identity[1] for rank, identity in truth.items()}
        found.append(stock)
    return found


def _add_parity(stock: Stock, plan: ParityPlan, copy: Copy) -> None:
    try:
        member = plan.index_of(copy.node_id)
    except KeyError:
        return  # nobody can say which rows it is of
    copies = stock.groups.setdefault(plan, Group(plan)).parities.setdefault(member, [])
    copies.append(copy)
    copies.sort(key=lambda one: one.order)


def _agrees(plan: ParityPlan, truth: Mapping[int, Identity]) -> bool:
    shards = (shard for member in plan.members for shard in member.shards)
    return all(truth.get(shard.rank) == identity_of(shard) for shard in shards)


def _truth(stock: Stock, ones: list[tuple[str, HeldSnapshot]]) -> dict[int, Identity]:
    """Which shard is each rank's; sets the stock's problem if that cannot be told."""
    claims: dict[int, set[Identity]] = defaultdict(set)
    for _, one in ones:
        for shard in one.shards:
            claims[shard.rank].add(identity_of(shard))
    plans = {parity.plan for _, one in ones for parity in one.parities}
    for plan in plans:
        for rank, identity in _planned(plan).items():
            claims[rank].add(identity)
    worlds = sorted({one.world for _, one in ones if one.world})
    if len(worlds) != 1:
        stock.problem = (
            f"its copies are of worlds of {' and '.join(map(str, worlds))} ranks"
            if worlds
            else "nobody says how many ranks it has"
        )
        return {}
    disputed = sorted(rank for rank, identities in claims.items() if len(identities) > 1)
    if not disputed:
        return {rank: next(iter(identities)) for rank, identities in claims.items()}
    sets = [_planned(plan) for plan in plans] + [_durable(one) for _, one in ones]
    whole = [one for one in sets if len(one) == stock.world]
    if whole and all(one == whole[0] for one in whole):
        return whole[0]
    stock.problem = _dispute(disputed[0], ones, len(whole))
    return {}


def _planned(plan: ParityPlan) -> dict[int, Identity]:
    return {shard.rank: identity_of(shard) for member in plan.members for shard in member.shards}


def _durable(one: HeldSnapshot) -> dict[int, Identity]:
    """What one node's commit on NVMe names."""
    return {shard.rank: identity_of(shard) for shard in one.shards if shard.level == NVME}


def _dispute(rank: int, ones: list[tuple[str, HeldSnapshot]], whole_sets: int) -> str:
    holders: dict[Identity, list[str]] = defaultdict(list)
    for node_id, one in ones:
        for shard in one.shards:
            if shard.rank == rank:
                holders[identity_of(shard)].append(f"{node_id}/{shard.level}")
    sides = " against ".join(", ".join(sorted(nodes)) for nodes in holders.values())
    why = (
        "the whole sets that parity plans and NVMe vouch for differ, too"
        if whole_sets
        else "no parity plan and no node's NVMe vouches for one whole set of them"
    )
    where = sides if len(holders) > 1 else f"{sides or 'no copy'} against a parity plan"
    return f"two snapshots go by this name: the copies of rank {rank} differ ({where}), and {why}"
