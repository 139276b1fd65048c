"""What the coordinator knows of one job: every node's last report, added up.

Owns the sums that decisions need, kept up to date report by report, so that the work for a commit
grows with the number of nodes and not with its square. Promises that what a node said before its
last report leaves no trace. Decides nothing: see `agent.coordination`.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TypeVar

from everstep.agent.attempts import fingerprint
from everstep.agent.holdings import FlushedFact, JobFact, RoundFact, ShardFact, SnapshotFact
from everstep.agent.inventory import DIGEST_BYTES
from everstep.proto.ids import SnapshotId
from everstep.snapshot.samples import drifted

Key = TypeVar("Key")


def _uncount(counter: Counter[Key], keys: Iterable[Key]) -> None:
    for key in keys:
        counter[key] -= 1
        if not counter[key]:
            del counter[key]


def _ranks(fact: JobFact, *, at_work: bool) -> list[tuple[int, int]]:
    return [
        (fact.incarnation, member.rank)
        for member in fact.members
        if (member.attached and not member.joining) == at_work
    ]


def _fingerprint(shard: ShardFact) -> int:
    return fingerprint(shard.rank, shard.record_digest)


def _begun(known: RoundFact) -> tuple[SnapshotId, ...]:
    return (known.snapshot,) if known.stage != "failed" else ()


@dataclass(slots=True)
class SnapshotTable:
    """All nodes' parts of one snapshot."""

    world: int
    parts: dict[str, SnapshotFact] = field(default_factory=dict)
    ranks: Counter[int] = field(default_factory=Counter)
    committed_at: set[str] = field(default_factory=set)
    dropped_at: dict[str, SnapshotFact] = field(default_factory=dict)
    open_at: set[str] = field(default_factory=set)
    """Nodes that may seal their part yet."""
    given_up: str = ""
    """Why it was ordered to be dropped while it was not whole: it never commits from then on."""
    passed_by: str = ""
    """A node that has gone on to a newer step without sealing its part."""
    samples: Counter[bytes] = field(default_factory=Counter)
    """How many shards have which samples of the replicated leaves."""
    _drifted: tuple[int, ...] | None = ()
    """What follows from `samples`, unless they have `_changed` since."""
    _changed: bool = False
    announced: bool = False
    """Whether the nodes that hold it were told what becomes of it."""
    _records: Counter[int] = field(default_factory=Counter)
    """The fingerprints of all records."""
    _sum: int = 0

    def add(self, node_id: str, fact: SnapshotFact) -> None:
        """A node's part."""
        if fact.stage == "dropped":
            self.dropped_at[node_id] = fact
            return
        if fact.stage == "open":
            self.open_at.add(node_id)
            return
        self.parts[node_id] = fact
        if fact.world != self.world and not self.committed_at and not self.given_up:
            # All memory of a number was out of reach when it was taken again.
            self.given_up = (
                f"two launches have it, of {self.world} and of {fact.world} ranks: their numbers "
                "are the same"
            )
        for shard in fact.shards:
            self.ranks[shard.rank] += 1
            record = _fingerprint(shard)
            self._records[record] += 1
            if self._records[record] == 1:
                self._sum ^= record
        self.samples.update(shard.replica_samples for shard in fact.shards)
        self._changed = True
        if fact.stage == "committed":
            self.committed_at.add(node_id)

    def remove(self, node_id: str) -> None:
        """A node's part, as it was added."""
        self.dropped_at.pop(node_id, None)
        self.open_at.discard(node_id)
        self.committed_at.discard(node_id)
        fact = self.parts.pop(node_id, None)
        shards = fact.shards if fact is not None else ()
        for shard in shards:
            if self._records[_fingerprint(shard)] == 1:
                self._sum ^= _fingerprint(shard)
        _uncount(self._records, [_fingerprint(shard) for shard in shards])
        _uncount(self.ranks, [shard.rank for shard in shards])
        _uncount(self.samples, [shard.replica_samples for shard in shards])
        self._changed = True

    @property
    def whole(self) -> bool:
        """Whether every rank's shard is somewhere."""
        return len(self.ranks) == self.world

    @property
    def decided(self) -> bool:
        """Whether it can be said what becomes of it."""
        return bool(self.whole or self.committed_at or self.dropped_at or self.passed_by)

    @property
    def commit_id(self) -> bytes:
        """A digest of all ranks' records, kept up to date shard by shard.

        Empty if some are out of reach, or two nodes have different ones of a rank: it must never be
        another than the one that was ordered first.
        """
        known = self.whole and len(self._records) == self.world
        return self._sum.to_bytes(DIGEST_BYTES, "big") if known else b""

    def drifted_replicas(self) -> tuple[int, ...] | None:
        """Which replicated leaves differ between ranks; None if even their plans do."""
        if self._changed:
            # Asked for every node that holds a part of it.
            self._drifted, self._changed = drifted(self.samples), False
        return self._drifted

    def shards(self) -> dict[int, ShardFact]:
        """One shard for each rank that there is, ascending."""
        found = {s.rank: s for fact in self.parts.values() for s in fact.shards}
        return dict(sorted(found.items()))


@dataclass(slots=True)
class FlushedTable:
    """All nodes' parts of one snapshot on NVMe."""

    world: int
    ranks: Counter[int] = field(default_factory=Counter)
    nodes: set[str] = field(default_factory=set)
    announced: bool = False

    @property
    def whole(self) -> bool:
        """Whether every rank's shard is on some disk."""
        return len(self.ranks) == self.world


@dataclass(slots=True)
class JobTable:
    """All nodes' parts of one job."""

    facts: dict[str, JobFact] = field(default_factory=dict)
    snapshots: dict[SnapshotId, SnapshotTable] = field(default_factory=dict)
    flushed: dict[SnapshotId, FlushedTable] = field(default_factory=dict)
    flushing: Counter[SnapshotId] = field(default_factory=Counter)
    durable: Counter[SnapshotId] = field(default_factory=Counter)
    """How many nodes know a snapshot to be durable everywhere."""
    rounds: dict[str, dict[str, RoundFact]] = field(default_factory=dict)
    """By plan, by node."""
    encoded: Counter[SnapshotId] = field(default_factory=Counter)
    """How many parts of rounds that have not failed there are."""
    incarnation: int = 0
    world: int = 0
    launch_id: str = ""
    newest_incarnation: int = 0
    decided_incarnation: int = 0
    """The newest one of which it is known what it restored."""
    restored: SnapshotId | None = None
    at_work: Counter[tuple[int, int]] = field(default_factory=Counter)
    """By incarnation and rank, how many nodes have it attached, and not joining."""
    away: Counter[tuple[int, int]] = field(default_factory=Counter)
    """Likewise, how many nodes know it and have not; hardly ever any."""

    def absent_rank(self, snapshot: SnapshotId) -> int | None:
        """A rank that has not sealed a snapshot of the present incarnation, and is not there to.

        Its node says so; of a rank that no node tells of nothing is known.
        """
        known = self.snapshots[snapshot]
        if snapshot.incarnation != self.incarnation or known.open_at:
            return None
        for incarnation, rank in sorted(self.away):
            there = (incarnation, rank) in self.at_work or rank in known.ranks
            if incarnation == snapshot.incarnation and not there:
                return rank
        return None

    def find_passed(self) -> set[str]:
        """Look for snapshots that a node has passed by: its ranks took part in a newer step of the
        same incarnation, and it knows nothing of this one. A trainer that could not reach its agent
        for one step leaves no refusal. One that has several captures under way has the older open
        there, so that it is known; should it go on without it, its agent drops it.

        Returns:
            The nodes that hold parts of those that were found now.
        """
        present = [s for s in self.snapshots if s.incarnation == self.incarnation]
        newest = max(present, default=None)
        found: set[str] = set()
        for snapshot in present:
            known = self.snapshots[snapshot]
            if snapshot != newest and known.parts and not known.decided:
                known.passed_by = self._passer(snapshot, known)
                if known.passed_by:
                    known.announced = True
                    found |= set(known.parts)
        return found

    def _passer(self, snapshot: SnapshotId, known: SnapshotTable) -> str:
        for node_id, fact in self.facts.items():
            if node_id in known.parts or node_id in known.open_at or not fact.members:
                continue
            if fact.incarnation == snapshot.incarnation and any(
                part.snapshot.incarnation == snapshot.incarnation and part.snapshot > snapshot
                for part in fact.snapshots
            ):
                return node_id
        return ""

    def replace(self, node_id: str, fact: JobFact | None) -> set[SnapshotId]:
        """Take a node's newest report of the job; None if it has nothing of it.

        Returns:
            The snapshots about which it says something else than before.
        """
        before = self.facts.pop(node_id, None)
        if fact is not None:
            self.facts[node_id] = fact
        if before == fact:
            return set()
        # Most of what a node says it has said before: only what differs is taken out and put in.
        old, new = before or _NOTHING, fact or _NOTHING
        touched = self._replace_parts(node_id, old.snapshots, new.snapshots)
        if old.flushed != new.flushed:
            self._replace_flushed(node_id, old.flushed, new.flushed)
        if old.flushing != new.flushing:
            _uncount(self.flushing, [old.flushing] if old.flushing is not None else ())
            self.flushing.update([new.flushing] if new.flushing is not None else ())
        if old.durable != new.durable:
            _uncount(self.durable, old.durable)
            self.durable.update(new.durable)
        if old.rounds != new.rounds:
            self._replace_rounds(node_id, old.rounds, new.rounds)
        if (old.incarnation, old.members) != (new.incarnation, new.members):
            for counter, at_work in ((self.at_work, True), (self.away, False)):
                _uncount(counter, _ranks(old, at_work=at_work))
                counter.update(_ranks(new, at_work=at_work))
        self._learn(new)
        return touched

    def _replace_parts(
        self, node_id: str, old: tuple[SnapshotFact, ...], new: tuple[SnapshotFact, ...]
    ) -> set[SnapshotId]:
        gone = {part.snapshot: part for part in old}
        come = []
        for part in new:
            if gone.get(part.snapshot) == part:
                del gone[part.snapshot]
            else:
                come.append(part)
        for snapshot in gone:
            table = self.snapshots[snapshot]
            table.remove(node_id)
            if not (table.parts or table.dropped_at or table.open_at):
                del self.snapshots[snapshot]
        for part in come:
            known = self.snapshots.get(part.snapshot)
            if known is None:
                known = self.snapshots[part.snapshot] = SnapshotTable(part.world)
            known.add(node_id, part)
        return gone.keys() | {part.snapshot for part in come}

    def _replace_flushed(
        self, node_id: str, old: tuple[FlushedFact, ...], new: tuple[FlushedFact, ...]
    ) -> None:
        for flushed in old:
            self._remove_flushed(node_id, flushed)
        for flushed in new:
            disk = self.flushed.get(flushed.snapshot)
            if disk is None:
                disk = self.flushed[flushed.snapshot] = FlushedTable(flushed.world)
            disk.nodes.add(node_id)
            disk.ranks.update(flushed.ranks)

    def _replace_rounds(
        self, node_id: str, old: tuple[RoundFact, ...], new: tuple[RoundFact, ...]
    ) -> None:
        for known in old:
            nodes = self.rounds[known.plan_id]
            nodes.pop(node_id, None)
            _uncount(self.encoded, _begun(known))
            if not nodes:
                del self.rounds[known.plan_id]
        for known in new:
            self.rounds.setdefault(known.plan_id, {})[node_id] = known
            self.encoded.update(_begun(known))

    def _remove_flushed(self, node_id: str, flushed: FlushedFact) -> None:
        table = self.flushed[flushed.snapshot]
        table.nodes.discard(node_id)
        _uncount(table.ranks, flushed.ranks)
        if not table.nodes:
            del self.flushed[flushed.snapshot]

    def _learn(self, fact: JobFact) -> None:
        if fact.incarnation > self.incarnation:
            self.incarnation = fact.incarnation
            self.world = fact.world
            self.launch_id = fact.launch_id
        self.newest_incarnation = max(self.newest_incarnation, fact.newest_incarnation)
        if fact.restore_decided and fact.incarnation > self.decided_incarnation:
            self.decided_incarnation, self.restored = fact.incarnation, fact.restored


_NOTHING = JobFact("", 0, 0)
