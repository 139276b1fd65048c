"""What the coordinator decides from the members' reports: commits, drops, durability.

Owns the derivation of every decision that concerns more than one node; parity rounds are in
`agent.protection`. Promises that decisions follow from the last reports alone, so that a new
coordinator comes to the same ones once all members have reported to it; that the orders for a node
are everything it still has to do; and that the work for a commit grows linearly with the nodes.
Does no I/O and reads no clock.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from everstep.agent import events
from everstep.agent.holdings import JobFact, Order, Report
from everstep.agent.protection import Protection, ProtectionRules
from everstep.agent.tables import JobTable
from everstep.proto.ids import SnapshotId


@dataclass(frozen=True, slots=True)
class Cluster:
    """Who takes part, as the coordinator sees it at the moment."""

    members: frozenset[str]
    live: frozenset[str]
    labels: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    @property
    def whole(self) -> bool:
        """Whether nobody is suspected."""
        return self.members <= self.live


class Coordination:
    """One agent's work as coordinator, for as long as it is one."""

    def __init__(self, rules: ProtectionRules) -> None:
        self.term = 0
        self.jobs: dict[str, JobTable] = {}
        self.reported: dict[str, int] = {}
        """The sequence number of each node's last report in this term."""
        self._protection = Protection(rules)
        self._changed: set[str] = set()

    @property
    def protection(self) -> Protection:
        """The parity rounds."""
        return self._protection

    def take_over(self, term: int) -> None:
        """Begin a term of office: what others said to someone else is not known."""
        self.term = term
        self.jobs.clear()
        self.reported.clear()
        self._changed.clear()
        self._protection.take_over(term)

    def forget(self, node_id: str) -> None:
        """A node is no member any more, or was started anew."""
        self.reported.pop(node_id, None)
        for name in [name for name, table in self.jobs.items() if node_id in table.facts]:
            self._replace(name, node_id, None)

    def report(self, node_id: str, report: Report) -> None:
        """Take a member's report; older ones than the last are ignored."""
        if report.sequence <= self.reported.get(node_id, -1):
            return
        self.reported[node_id] = report.sequence
        named = {fact.job: fact for fact in report.jobs}
        for name in [n for n, t in self.jobs.items() if node_id in t.facts and n not in named]:
            self._replace(name, node_id, None)
        for name, fact in named.items():
            self._replace(name, node_id, fact)

    def _replace(self, name: str, node_id: str, fact: JobFact | None) -> None:
        table = self.jobs.setdefault(name, JobTable())
        before = table.incarnation, table.decided_incarnation
        for snapshot in table.replace(node_id, fact):
            known = table.snapshots.get(snapshot)
            # Told once; whoever comes later hears it in the answer to its own report.
            if known is not None and known.decided and not known.announced:
                known.announced = True
                self._changed |= set(known.parts)
        self._announce_flushes(table, fact)
        if (table.incarnation, table.decided_incarnation) > before:
            self._changed |= set(table.facts)
        if not table.facts:
            del self.jobs[name]

    def _announce_flushes(self, table: JobTable, fact: JobFact | None) -> None:
        if fact is None:
            return
        for flushed in fact.flushed:
            disk = table.flushed[flushed.snapshot]
            if disk.whole and not disk.announced:
                disk.announced = True
                self._changed |= set(table.facts)
        begun = fact.flushing
        if begun is not None and table.flushing[begun] == 1 and begun not in table.flushed:
            self._changed |= set(table.facts)

    def begun(self, name: str, incarnation: int, world: int, launch_id: str) -> None:
        """A job was started anew, on this coordinator's word: see `agent.assembly`."""
        table = self.jobs.setdefault(name, JobTable())
        if incarnation > table.incarnation:
            table.incarnation, table.world, table.launch_id = incarnation, world, launch_id
            table.newest_incarnation = max(table.newest_incarnation, incarnation)
            self._changed |= set(table.facts)

    def restored(self, name: str, incarnation: int, snapshot: SnapshotId | None) -> None:
        """This coordinator has decided what an incarnation goes on from: nothing that is against it
        is decided from now on, though nobody has reported it yet."""
        table = self.jobs.get(name)
        if table is not None and incarnation > table.decided_incarnation:
            table.decided_incarnation, table.restored = incarnation, snapshot
            self._changed |= set(table.facts)

    def revocable(self, name: str, cluster: Cluster) -> frozenset[str]:
        """Plans whose parity may be freed at any time: of rounds that were given up, or may be yet.

        Nobody was told of these rounds. A restore that counts on one may find nothing of it when it
        comes to decoding.
        """
        return self._protection.revocable(name, self, cluster)

    def decide(self, cluster: Cluster, now_s: float) -> None:
        """Start, end and give up parity rounds; give up steps that some node has passed by."""
        for table in self.jobs.values():
            self._changed |= table.find_passed()
        self._changed |= self._protection.decide(self, cluster, now_s)

    def changed(self, but: str = "") -> set[str]:
        """The nodes for which there are new orders since this was asked last."""
        found = self._changed - {but}
        self._changed = set()
        return found

    def orders(self, node_id: str, cluster: Cluster) -> tuple[Order, ...]:
        """Everything that a node still has to do."""
        found: list[Order] = []
        for name, table in self.jobs.items():
            fact = table.facts.get(node_id)
            if fact is not None:
                found += self._orders_for(name, table, fact, cluster)
        found += self._protection.orders(self, node_id, cluster)
        return tuple(found)

    def _orders_for(
        self, name: str, table: JobTable, fact: JobFact, cluster: Cluster
    ) -> Iterator[Order]:
        if 0 < fact.incarnation < table.incarnation:
            yield events.BeginOrdered(name, table.incarnation, table.world, table.launch_id)
        # Ascending: a commit drops what is older and open, and both may be whole by now.
        for part in sorted(fact.snapshots, key=lambda part: part.snapshot):
            if part.stage == "sealed":
                order = self._verdict(name, part.snapshot, cluster)
                if order is not None:
                    yield order
        for flushed in fact.flushed:
            named = flushed.snapshot
            whole = table.flushed[named].whole and not _overtaken(table, named)
            if whole or named in table.durable:
                yield events.DurableOrdered(name, named)
        if fact.incarnation == table.incarnation and not fact.members:
            yield from self._passed_by(name, table, fact)
        wanted = _flush_wanted(table, fact)
        if wanted is not None:
            yield events.FlushOrdered(name, wanted)

    def _passed_by(self, name: str, table: JobTable, fact: JobFact) -> Iterator[Order]:
        """What a node hears that runs no rank of the present incarnation, and holds something of an
        earlier one: what it holds was superseded, or was not."""
        here = [part.snapshot for part in fact.snapshots]
        newest = self.newest_committed(name) if here else None
        if newest is not None and newest.incarnation == table.incarnation and newest not in here:
            yield events.CommitOrdered(name, newest, table.snapshots[newest].commit_id)
        disk = {*fact.durable, *(flushed.snapshot for flushed in fact.flushed)}
        durable = {s for s, known in table.flushed.items() if known.whole} | table.durable.keys()
        latest = max(durable, default=None)
        if disk and latest is not None and latest not in disk:
            if latest.incarnation == table.incarnation:
                yield events.DurableOrdered(name, latest)

    def _verdict(self, name: str, snapshot: SnapshotId, cluster: Cluster) -> Order | None:
        table = self.jobs[name]
        known = table.snapshots[snapshot]
        if known.committed_at or self.is_committed(name, snapshot):
            return events.CommitOrdered(name, snapshot, known.commit_id)
        if _left_behind(table, snapshot):
            # Who has reported is not proof enough: after all agents have restarted, a coordinator
            # may know for a while of itself alone. What was restored is.
            return events.DropOrdered(
                name, snapshot, "not all ranks had sealed it, and the job went on without it"
            )
        if known.whole and not known.given_up:
            drifted = known.drifted_replicas()
            what = "disagree on what is replicated" if drifted is None else "have drifted apart"
            return events.DropOrdered(
                name, snapshot, f"the ranks' replicas {what}", tuple(drifted or ())
            )
        if known.dropped_at:
            node_id, fact = min(known.dropped_at.items())
            reason = f"{node_id}: {fact.reason}"
            return events.DropOrdered(name, snapshot, reason, fact.drifted)
        if known.passed_by:
            return events.DropOrdered(
                name, snapshot, f"{known.passed_by} went on to a newer step without sealing it"
            )
        absent = table.absent_rank(snapshot)
        # Who has not reported in this term may hold that rank's part: it may even be committed.
        heard = absent is not None and cluster.members <= self.reported.keys()
        if heard and not known.given_up:
            # Nobody shall wait for it: if it was to seal this, its node would say so. Some will
            # have heard of the drop before it says otherwise.
            known.given_up = f"rank {absent} is not attached, or is joining"
        return events.DropOrdered(name, snapshot, known.given_up) if known.given_up else None

    def is_committed(self, name: str, snapshot: SnapshotId) -> bool:
        """Whether a snapshot is committed, as far as the reports say.

        A parity round is begun for nothing else: whoever remembers one proves the commit.
        """
        table = self.jobs.get(name)
        known = table.snapshots.get(snapshot) if table is not None else None
        if table is None or known is None:
            return False
        if known.committed_at or snapshot in table.encoded or snapshot == table.restored:
            return True
        settled = _left_behind(table, snapshot)
        whole = known.whole and not known.given_up
        return not settled and whole and known.drifted_replicas() == ()

    def newest_committed(self, name: str) -> SnapshotId | None:
        """The newest snapshot of a job whose every shard is in memory somewhere."""
        table = self.jobs[name]
        found = [s for s, known in table.snapshots.items() if known.whole]
        return next((s for s in sorted(found, reverse=True) if self.is_committed(name, s)), None)


def _left_behind(table: JobTable, snapshot: SnapshotId) -> bool:
    """Whether the job was started anew since, and has restored another one."""
    settled = snapshot.incarnation < table.incarnation == table.decided_incarnation
    return settled and snapshot != table.restored


def _overtaken(table: JobTable, snapshot: SnapshotId) -> bool:
    """Whether the job went back to something older since. Were it durable now, nodes that have not
    heard of that yet would delete for it what the job could go back to again."""
    settled = snapshot.incarnation < table.incarnation == table.decided_incarnation
    return settled and (table.restored is None or snapshot > table.restored)


def _flush_wanted(table: JobTable, fact: JobFact) -> SnapshotId | None:
    """The newest commit here, if other nodes have begun to flush it."""
    if not (table.flushed or table.flushing):
        return None
    committed = [s.snapshot for s in fact.snapshots if s.stage == "committed"]
    newest = max(committed, default=None)
    if newest is None or fact.flushing is not None or newest in fact.flush_failed:
        return None
    begun = newest in table.flushed or newest in table.flushing
    done = newest in fact.durable or any(f.snapshot == newest for f in fact.flushed)
    return newest if begun and not done else None
