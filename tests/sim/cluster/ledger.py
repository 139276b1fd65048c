"""What was promised to whom, and what must hold after every step, whatever happened.

Owns the ledger, kept apart from the agents' own state, and the comparison with what really is in
the nodes' files. A breach raises `BrokenPromise`. Losses count against a promise of parity from the
moment a node had its part of the round: what is promised is the loss of any m nodes of a group.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from everstep.agent import events
from everstep.agent.holdings import Orders
from everstep.agent.inventory import NodeInventory
from everstep.agent.job import RoundStage
from everstep.agent.planning import plan_snapshots
from everstep.agent.plans import ParityPlan
from everstep.proto.ids import SnapshotId

from .files import Disk, Memory, Token, held_tokens, inventory


class BrokenPromise(AssertionError):
    """The decisions of the agents broke one of the promises of the design."""


def insist(holds: bool, promise: str) -> None:
    """Raise unless it holds."""
    if not holds:
        raise BrokenPromise(promise)


class Held(Protocol):
    """A node, as far as the ledger sees it."""

    node_id: str
    memory: Memory
    disk: Disk
    lost: bool


@dataclass(slots=True)
class Promise:
    """What trainers were told of the newest snapshot at a level."""

    snapshot: SnapshotId
    round_id: str = ""


@dataclass(slots=True)
class Ledger:
    """The ledger."""

    hosts: Mapping[str, Held]
    dirty: bool = False
    disk_trouble: float = 0.0
    slow_encoding: float = 0.3
    plans: dict[str, ParityPlan] = field(default_factory=dict)
    rounds: dict[str, set[str]] = field(default_factory=dict)
    """Plans by round."""
    prepared_at: dict[str, set[str]] = field(default_factory=dict)
    lost_of: dict[str, set[str]] = field(default_factory=dict)
    """By plan: members that had their part and lost it, and themselves."""
    promised: dict[str, Promise] = field(default_factory=dict)
    restores: dict[int, SnapshotId | None] = field(default_factory=dict)
    """By incarnation, what it went on from."""
    void: set[tuple[str, SnapshotId]] = field(default_factory=set)
    """What lost a part since: whoever is told of it again is told of what was."""
    commits: dict[SnapshotId, bool] = field(default_factory=dict)
    ends: dict[str, bool] = field(default_factory=dict)
    told_levels: dict[str, int] = field(default_factory=dict)
    told_of: dict[str, set[SnapshotId]] = field(default_factory=dict)
    told_before: dict[str, set[SnapshotId]] = field(default_factory=dict)
    """What `told_of` was when the calm began."""
    written: dict[SnapshotId, set[Token]] = field(default_factory=dict)
    full_checks: int = 0
    disputed: int = 0

    # What happens.

    def planned(self, plan: ParityPlan) -> None:
        """A node begins its part of a round."""
        self.plans[plan.plan_id] = plan
        self.rounds.setdefault(round_of(plan.plan_id), set()).add(plan.plan_id)

    def prepared(self, plan: ParityPlan, node_id: str) -> None:
        """A node has its part of a round."""
        self.prepared_at.setdefault(plan.plan_id, set()).add(node_id)

    def told(self, host: "Teller", snapshot: SnapshotId, level: str) -> None:
        """Trainers are told that a snapshot is committed at a level."""
        self.told_levels[level] = self.told_levels.get(level, 0) + 1
        self.dirty = True
        self.told_of.setdefault(level, set()).add(snapshot)
        if snapshot < max(self.told_of[level]) or (level, snapshot) in self.void:
            return
        if self._left_behind(snapshot):
            return  # somebody who missed it hears of it late
        round_id = ""
        if level == "parity":
            job = host.agent.job  # type: ignore[attr-defined]
            ended = [
                round_of(known.plan.plan_id)
                for known in job.rounds.values()
                if known.plan.snapshot == snapshot and known.stage is RoundStage.COMMITTED
            ]
            if not ended:
                return  # the next one is committed already
            round_id = ended[0]
            whole = {
                shard.rank
                for plan_id in self.rounds[round_id]
                for member in self.plans[plan_id].members
                for shard in member.shards
            }
            world = host.agent.job.snapshots[snapshot].world if snapshot in job.snapshots else 0  # type: ignore[attr-defined]
            insist(len(whole) >= world, f"{snapshot} is told to have parity, but {whole} have")
        self.promised[level] = Promise(snapshot, round_id)

    def wiped(self, node_id: str, *, disk: bool) -> None:
        """A node's memory, and maybe its disk, are about to go."""
        self.dirty = True
        host = self.hosts[node_id]
        self.void |= {("memory", r.token.snapshot) for r in host.memory.records.values()}
        if disk:
            self.void |= {("nvme", snapshot) for snapshot in host.disk.steps}
        for level, promise in list(self.promised.items()):
            if (level, promise.snapshot) in self.void:
                del self.promised[level]
        for plan_id, nodes in self.prepared_at.items():
            if node_id in nodes:
                self.lost_of.setdefault(plan_id, set()).add(node_id)

    def rotten(self, plan_id: str, node_id: str) -> None:
        """A node's part of a round turns out to be damaged; not more than m of a group may."""
        self.dirty = True
        self.lost_of.setdefault(plan_id, set()).add(node_id)

    def ordered(self, orders: Orders, node_id: str) -> None:
        """Orders leave a coordinator: nobody may ever have said otherwise."""
        for order in orders.orders:
            if isinstance(order, events.CommitOrdered | events.DropOrdered):
                commit = isinstance(order, events.CommitOrdered)
                if not commit and self._settled(order.snapshot):
                    continue  # somebody who missed it gives up what is of no use any more
                before = self.commits.setdefault(order.snapshot, commit)
                insist(before == commit, f"{order} after the opposite")
            elif isinstance(order, events.RoundEnded):
                before = self.ends.setdefault(order.plan_id, order.commit)
                lost = node_id in self.lost_of.get(order.plan_id, ())
                if before and not order.commit and (lost or self._superseded(order.plan_id)):
                    continue  # somebody who missed the end of it gives up what is left of it
                insist(before == order.commit, f"{order} after the opposite")

    def _left_behind(self, snapshot: SnapshotId) -> bool:
        return any(
            number > snapshot.incarnation and chosen != snapshot
            for number, chosen in self.restores.items()
        )

    def _settled(self, snapshot: SnapshotId) -> bool:
        newer = any(other > snapshot for other in self.told_of.get("memory", ()))
        return newer or self._left_behind(snapshot) or ("memory", snapshot) in self.void

    def _superseded(self, plan_id: str) -> bool:
        snapshot = self.plans[plan_id].snapshot
        return any(
            commit
            and self.plans[other].snapshot >= snapshot
            and round_of(other) != round_of(plan_id)
            for other, commit in self.ends.items()
        )

    def restored(
        self,
        incarnation: int,
        snapshot: SnapshotId | None,
        tokens: Iterable[Token],
        asked: set[str],
    ) -> None:
        """A restore was decided; `asked` are the nodes whose holdings were known."""
        one = {(token.incarnation, token.step, token.launch) for token in tokens}
        insist(len(one) == (snapshot is not None), f"restored from {one} for {snapshot}")
        insist(
            snapshot is None
            or {(s, t) for s, t, _ in one} == {(snapshot.incarnation, snapshot.step)},
            f"{one} for {snapshot}",
        )
        for level, promise in list(self.promised.items()):
            if snapshot is not None and promise.snapshot <= snapshot:
                continue
            there = {host.node_id for host in self.hosts.values() if not host.lost}
            if level == "parity" and not self._counts(promise):
                del self.promised[level]
                continue
            if self._two_of_one_name(promise.snapshot):
                del self.promised[level]
                self.disputed += 1
                continue
            insist(
                bool(there - asked),
                f"restored {snapshot}, though {promise} was told and all nodes were asked",
            )
            del self.promised[level]  # the job went on without it, and says so
        self._number_taken(incarnation)
        self.restores[incarnation] = snapshot

    def _number_taken(self, incarnation: int) -> None:
        """After all memory of them was lost, numbers may be taken again."""
        for snapshot in [s for s in self.commits if s.incarnation >= incarnation]:
            del self.commits[snapshot]
        for number in [n for n in self.restores if n > incarnation]:
            del self.restores[number]
        self.void = {known for known in self.void if known[1].incarnation < incarnation}
        for told in (*self.told_of.values(), *self.told_before.values()):
            told -= {s for s in told if s.incarnation >= incarnation}

    # What must hold.

    def look(self) -> None:
        """Compare with what is there, if anything went away."""
        if not self.dirty:
            return
        self.dirty = False
        if not self.promised:
            return
        present: list[NodeInventory] | None = None
        for level, promise in list(self.promised.items()):
            if level == "parity" and not self._counts(promise):
                del self.promised[level]
                continue
            if self._quickly(level, promise):
                continue
            if self._two_of_one_name(promise.snapshot):
                del self.promised[level]
                self.disputed += 1
                continue
            self.full_checks += 1
            if present is None:
                present = [inventory(h.node_id, h.memory, h.disk) for h in self._remaining()]
            levels = {"memory": (), "parity": (), "nvme": ("nvme",)}[level]
            plans = plan_snapshots(present, levels=levels)
            found = [p for p in plans if p.snapshot >= promise.snapshot]
            insist(
                any(plan.recoverable for plan in found),
                f"{promise} was told at {level}, and is not recoverable: "
                f"{[(p.snapshot, p.missing) for p in found]}",
            )

    def _two_of_one_name(self, snapshot: SnapshotId) -> bool:
        """Whether two launches were given one number, after all agents had restarted and a
        coordinator knew of itself alone. The planner refuses both (P0); that one of them was
        promised is a known weakness, counted in `disputed`."""
        launches = {
            token.launch for host in self.hosts.values() for token in held_tokens(host, snapshot)
        }
        return len(launches) > 1

    def _remaining(self) -> list[Held]:
        return [host for host in self.hosts.values() if not host.lost]

    def _counts(self, promise: Promise) -> bool:
        return all(
            len(self.lost_of.get(plan_id, ())) <= self.plans[plan_id].parities
            for plan_id in self.rounds[promise.round_id]
        )

    def _quickly(self, level: str, promise: Promise) -> bool:
        """Whether it is plain that the very snapshot is there."""
        if level == "parity":
            return all(self._group_holds(self.plans[p]) for p in self.rounds[promise.round_id])
        ranks: set[int] = set()
        world = -1
        for host in self._remaining():
            if level == "nvme":
                found = host.disk.steps.get(promise.snapshot)
                if found is not None and found.committed:
                    ranks |= set(found.records)
                    world = found.world
                continue
            for slot, record in host.memory.records.items():
                token = record.token
                if token.snapshot == promise.snapshot and host.memory.slots[slot] == token:
                    ranks.add(token.rank)
                    world = record.world
        return len(ranks) == world

    def _group_holds(self, plan: ParityPlan) -> bool:
        broken = 0
        for member in plan.members:
            host = self.hosts[member.node_id]
            memory = host.memory
            whole = not host.lost and plan.plan_id in memory.parities
            if not whole or not all(memory.sound(s.rank, s.record_digest) for s in member.shards):
                broken += 1
        return broken <= plan.parities


class Teller(Protocol):
    """Where trainers are told something."""

    node_id: str
    agent: object


def round_of(plan_id: str) -> str:
    """What a round's plans have in common."""
    return plan_id.rpartition("-")[0]
