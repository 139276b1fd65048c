"""When parity is encoded, by whom, and when a round of it is over.

Owns the coordinator's side of the two-phase commit of parity. Promises one round of a job at a
time: a commit that comes meanwhile is skipped, never queued; that a round is committed only when
every member of every group has published its parity; and that a round which an earlier coordinator
left behind is decided only by what all its members report in this term, so that two coordinators
never decide it differently. Does no I/O and reads no clock.

Two-phase commit cannot tell what a silent member did, nor one that has lost all memory: maybe it
had committed the round, and told so. Such a round is kept as it is, and so is the parity before it,
until a newer round is committed.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

from everstep.agent import events
from everstep.agent.holdings import RoundFact
from everstep.agent.plans import ParityPlan, PlannedMember, PlannedShard
from everstep.agent.tables import JobTable
from everstep.erasure.placement import PlacedNode, Placement, place
from everstep.proto.ids import SnapshotId

if TYPE_CHECKING:
    from everstep.agent.coordination import Cluster, Coordination

_GIVEN_UP = "given up by a new coordinator: not all members had finished it"
_GONE = ("failed", "lost")
_DAMAGED = ("mending", "lost")
"""Stages of a member that had its part, and maybe had committed it, before that was damaged."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProtectionRules:
    """What the configuration says of parity."""

    enabled: bool = True
    parities: int = 0
    """0: by the number of nodes."""
    group_size: int = 0
    interval_steps: int | None = 1
    interval_s: float | None = None
    timeout_s: float = 60.0
    retry_s: float = 5.0


@dataclass(slots=True)
class _Round:
    """A round that this coordinator has begun."""

    snapshot: SnapshotId
    plans: tuple[ParityPlan, ...]
    by_node: dict[str, ParityPlan]
    started_s: float
    waiting: set[str]
    commit: bool | None = None
    reason: str = ""

    def hear(self, table: JobTable, node_ids: Iterable[str]) -> None:
        """Take what these members have reported of their parts."""
        for node_id in node_ids:
            fact = table.rounds.get(self.by_node[node_id].plan_id, {}).get(node_id)
            if fact is None:
                continue
            if fact.stage == "prepared":
                self.waiting.discard(node_id)
            elif fact.stage in _GONE:
                self.commit = False
                self.reason = f"{node_id}: {fact.problem}"
            else:
                self.waiting.add(node_id)


@dataclass(slots=True)
class _Attempt:
    """The last round of a job that has ended."""

    snapshot: SnapshotId
    ended_s: float
    committed: bool
    node_ids: frozenset[str]


@dataclass(slots=True)
class _Progress:
    """A job's rounds in this term."""

    round: _Round | None = None
    last: _Attempt | None = None
    orphans: dict[str, bool] = field(default_factory=dict)
    """Decisions on rounds of earlier terms, by plan."""
    kept: dict[str, SnapshotId] = field(default_factory=dict)
    """Rounds of earlier terms of which nobody can say any more whether they were committed."""
    count: int = 0


class Protection:
    """All jobs' parity rounds, for one coordinator."""

    def __init__(self, rules: ProtectionRules) -> None:
        self._rules = rules
        self._term = 0
        self._jobs: dict[str, _Progress] = {}
        self._placements: dict[object, Placement] = {}
        self.warnings: tuple[str, ...] = ()
        """Of the last placement."""

    def take_over(self, term: int) -> None:
        """See `Coordination.take_over`."""
        self._term = term
        self._jobs.clear()

    def rounds(self) -> dict[str, tuple[SnapshotId, tuple[str, ...], float]]:
        """The round under way of each job: its snapshot, who has not finished, when it began."""
        return {
            name: (known.snapshot, tuple(sorted(known.waiting)), known.started_s)
            for name, known in ((n, progress.round) for n, progress in self._jobs.items())
            if known is not None
        }

    def decide(self, facts: "Coordination", cluster: "Cluster", now_s: float) -> set[str]:
        """Start, end and give up rounds; return the nodes that get new orders."""
        changed: set[str] = set()
        for name in [name for name in self._jobs if name not in facts.jobs]:
            del self._jobs[name]
        for name, table in facts.jobs.items():
            progress = self._jobs.setdefault(name, _Progress())
            changed |= self._decide_orphans(progress, table, facts, cluster)
            if progress.round is not None:
                changed |= self._go_on(progress, table, cluster, now_s)
            if progress.round is None and self._rules.enabled:
                changed |= self._begin(name, progress, facts, cluster, now_s)
        return changed

    def _decide_orphans(
        self, progress: _Progress, table: JobTable, facts: "Coordination", cluster: "Cluster"
    ) -> set[str]:
        changed: set[str] = set()
        progress.kept.clear()
        for plans in _earlier_rounds(progress, table):
            open_plans = [p for p in plans if p not in progress.orphans and _is_open(plans[p])]
            if not open_plans:
                continue
            decision = _orphan_decision(plans, table, facts, cluster)
            for plan_id in open_plans:
                if decision is _Orphan.KEPT:
                    progress.kept[plan_id] = next(iter(plans[plan_id].values())).snapshot
                elif decision is not _Orphan.UNKNOWN:
                    progress.orphans[plan_id] = decision is _Orphan.COMMITTED
                    changed |= set(plans[plan_id])
        for plan_id in [p for p in progress.orphans if p not in table.rounds]:
            del progress.orphans[plan_id]
        return changed

    def revocable(self, name: str, facts: "Coordination", cluster: "Cluster") -> frozenset[str]:
        """Plans of rounds that were given up, or may be yet, and that nobody has committed."""
        progress, table = self._jobs.get(name, _Progress()), facts.jobs.get(name)
        if table is None:
            return frozenset()
        own = progress.round
        found = (
            {plan.plan_id for plan in own.plans} if own is not None and not own.commit else set()
        )
        for plans in _earlier_rounds(progress, table):
            decided = [
                progress.orphans[plan_id] for plan_id in plans if plan_id in progress.orphans
            ]
            if not decided:
                decided = [_orphan_decision(plans, table, facts, cluster) is not _Orphan.GIVEN_UP]
            if not all(decided):
                found |= plans.keys()
        return frozenset(found)

    def _go_on(
        self, progress: _Progress, table: JobTable, cluster: "Cluster", now_s: float
    ) -> set[str]:
        known = progress.round
        assert known is not None
        if known.commit is None:
            known.hear(table, list(known.waiting))
            if not known.waiting:
                known.hear(table, known.by_node)  # who had its part may have lost it since
            late = ", ".join(sorted(known.waiting)[:16])
            if known.commit is None and not known.waiting:
                known.commit = True
            elif known.commit is None and now_s - known.started_s > self._rules.timeout_s:
                known.commit = False
                known.reason = f"not done within {self._rules.timeout_s:g} s; late: {late}"
            return set(known.by_node) if known.commit is not None else set()
        if not any(_unsettled(table, plan, known.commit, cluster) for plan in known.plans):
            # Who is silent hears it when he speaks again.
            progress.orphans |= {plan.plan_id: known.commit for plan in known.plans}
            nodes = frozenset(known.by_node)
            progress.last = _Attempt(known.snapshot, now_s, known.commit, nodes)
            progress.round = None
        return set()

    def _begin(
        self,
        name: str,
        progress: _Progress,
        facts: "Coordination",
        cluster: "Cluster",
        now_s: float,
    ) -> set[str]:
        table = facts.jobs[name]
        if any(
            fact.stage != "committed" and node_id in cluster.live
            for plan_id, nodes in table.rounds.items()
            if plan_id not in progress.kept
            for node_id, fact in nodes.items()
        ):
            return set()  # something earlier is not settled yet
        newest = facts.newest_committed(name)
        known = (fact.snapshot for nodes in table.rounds.values() for fact in nodes.values())
        if newest is None or newest < max(known, default=newest):
            return set()  # nobody gives up newer parity for it, and maybe that is needed yet
        if not self._due(progress, table, newest, cluster, now_s):
            return set()
        holders = {
            node_id: part
            for node_id, part in table.snapshots[newest].parts.items()
            if node_id in cluster.live
        }
        held = {shard.rank for part in holders.values() for shard in part.shards}
        if len(held) != table.snapshots[newest].world or len(cluster.live) < 2:
            return set()
        progress.count += 1
        plans = self._plans(name, newest, table, cluster, progress.count)
        by_node = {member.node_id: plan for plan in plans for member in plan.members}
        if not by_node:
            return set()
        progress.round = _Round(newest, plans, by_node, now_s, set(by_node))
        return set(by_node)

    def _due(
        self,
        progress: _Progress,
        table: JobTable,
        newest: SnapshotId,
        cluster: "Cluster",
        now_s: float,
    ) -> bool:
        protected = _protected(table, cluster)
        last = progress.last
        if protected is not None and newest <= protected:
            return False
        if last is not None and last.snapshot == newest:
            # Given up, or weakened since by a node that is gone.
            return now_s - last.ended_s >= self._rules.retry_s
        before = protected or (last.snapshot if last is not None else None)
        if before is None or before.incarnation != newest.incarnation:
            return True
        if self._rules.interval_steps:
            every = self._rules.interval_steps
            return newest.step // every > before.step // every
        if self._rules.interval_s is None or last is None:
            return True
        return now_s - last.ended_s >= self._rules.interval_s

    def _plans(
        self, name: str, snapshot: SnapshotId, table: JobTable, cluster: "Cluster", number: int
    ) -> tuple[ParityPlan, ...]:
        known = table.snapshots[snapshot]
        shards: dict[str, list[PlannedShard]] = {node_id: [] for node_id in cluster.live}
        taken: set[int] = set()
        for node_id in sorted(known.parts):
            for shard in known.parts[node_id].shards if node_id in shards else ():
                if shard.rank not in taken:
                    taken.add(shard.rank)
                    planned = PlannedShard(
                        shard.rank, shard.image_bytes, shard.layout_id, shard.record_digest
                    )
                    shards[node_id].append(planned)
        placement = self._place(shards, cluster)
        count = len(placement.groups)
        return tuple(
            ParityPlan(
                plan_id=f"{self._term}-{snapshot.incarnation}-{snapshot.step}-{number}-{index}.{count}",
                job=name,
                snapshot=snapshot,
                world=known.world,
                parities=group.parities,
                members=tuple(
                    PlannedMember(node_id, tuple(sorted(shards[node_id], key=lambda s: s.rank)))
                    for node_id in group.members
                ),
            )
            for index, group in enumerate(placement.groups)
        )

    def _place(self, shards: dict[str, list[PlannedShard]], cluster: "Cluster") -> Placement:
        nodes = tuple(
            PlacedNode(node_id, cluster.labels.get(node_id, {}), sum(s.image_bytes for s in held))
            for node_id, held in sorted(shards.items())
        )
        key = tuple((n.node_id, tuple(sorted(n.labels.items())), n.stream_bytes) for n in nodes)
        known = self._placements.get(key)
        if known is None:
            self._placements.clear()
            known = place(nodes, self._rules.group_size, self._rules.parities)
            self._placements[key] = known
        self.warnings = known.warnings
        return known

    def orders(
        self, facts: "Coordination", node_id: str, cluster: "Cluster"
    ) -> Iterator["events.PrepareOrdered | events.RoundEnded"]:
        """A node's part in the rounds that are not over for it."""
        for name, progress in self._jobs.items():
            table = facts.jobs.get(name)
            if table is None:
                continue
            yield from _own_orders(progress.round, table, name, node_id)
            told = table.facts.get(node_id)
            for fact in told.rounds if told is not None else ():
                commit = progress.orphans.get(fact.plan_id)
                if commit is not None and fact.stage != "committed":
                    commit = commit and fact.stage not in _GONE
                    reason = "" if commit else _GIVEN_UP
                    yield events.RoundEnded(name, fact.plan_id, commit, reason)


def _own_orders(
    known: _Round | None, table: JobTable, name: str, node_id: str
) -> Iterator["events.PrepareOrdered | events.RoundEnded"]:
    plan = known.by_node.get(node_id) if known is not None else None
    if known is None or plan is None:
        return
    fact = table.rounds.get(plan.plan_id, {}).get(node_id)
    if fact is None and known.commit is None:
        yield events.PrepareOrdered(plan)
    elif fact is not None and known.commit is not None and fact.stage != "committed":
        # A node that was lost after it had prepared, and came back with nothing, has failed what
        # the others commit: it has no part that it could commit.
        commit = known.commit and fact.stage not in _GONE
        yield events.RoundEnded(name, plan.plan_id, commit, known.reason)


class _Orphan(Enum):
    """What becomes of a round that an earlier coordinator left behind."""

    UNKNOWN = "unknown"
    COMMITTED = "committed"
    GIVEN_UP = "given up"
    KEPT = "kept"


def _is_open(nodes: dict[str, RoundFact]) -> bool:
    return any(fact.stage != "committed" for fact in nodes.values())


def _earlier_rounds(progress: _Progress, table: JobTable) -> list[dict[str, dict[str, RoundFact]]]:
    """The rounds that are not this coordinator's present one: by plan, by node."""
    own = progress.round.plans[0].plan_id if progress.round is not None else ""
    left: dict[str, dict[str, dict[str, RoundFact]]] = {}
    for plan_id, nodes in table.rounds.items():
        if round_of(plan_id) != round_of(own):
            left.setdefault(round_of(plan_id), {})[plan_id] = nodes
    return list(left.values())


def _orphan_decision(
    plans: dict[str, dict[str, RoundFact]],
    table: JobTable,
    facts: "Coordination",
    cluster: "Cluster",
) -> _Orphan:
    """What is to become of a round, all its groups together: it commits for all or for none."""
    stages = {fact.stage for nodes in plans.values() for fact in nodes.values()}
    if "committed" in stages:
        return _Orphan.COMMITTED
    members = {m for nodes in plans.values() for fact in nodes.values() for m in fact.members}
    if len(plans) < groups_of(next(iter(plans))):
        members |= cluster.members  # of some group nobody knows who was in it
    silent = (members & cluster.members).difference(facts.reported)
    stage_of = {n: fact.stage for nodes in plans.values() for n, fact in nodes.items()}
    damaged = {n for n, stage in stage_of.items() if stage in _DAMAGED}
    if any(n in silent or stage_of.get(n) == "mending" for n in members & cluster.live):
        return _Orphan.UNKNOWN  # it will say
    if stages - {"prepared", *_DAMAGED}:
        return _Orphan.GIVEN_UP
    lacking = members.difference(*plans.values()) | silent | damaged
    if not lacking:
        return _Orphan.COMMITTED
    # Who committed it has forgotten the rounds before it, and forgets it only for a newer one: a
    # member that has committed another round never committed this one, or something newer has taken
    # its place. Any other, or one that is gone, may have committed it and told so.
    elsewhere = {
        node_id
        for others in table.rounds.values()
        for node_id, fact in others.items()
        if fact.stage == "committed"
    }
    return _Orphan.GIVEN_UP if (lacking - damaged) & elsewhere else _Orphan.KEPT


def _unsettled(table: JobTable, plan: ParityPlan, commit: bool, cluster: "Cluster") -> bool:
    """Whether some member that lives has still to hear, or to do, what was decided."""
    return any(
        node_id in cluster.live and not (commit and fact.stage == "committed")
        for node_id, fact in table.rounds.get(plan.plan_id, {}).items()
    )


def _protected(table: JobTable, cluster: "Cluster") -> SnapshotId | None:
    """The newest snapshot with a round whose every group is whole: all its members there, and
    committed."""
    whole: dict[str, int] = {}
    best: SnapshotId | None = None
    for plan_id, nodes in table.rounds.items():
        fact = next(iter(nodes.values()))
        if fact.stage != "committed" or not set(fact.members) <= nodes.keys() & cluster.live:
            continue
        known = whole[round_of(plan_id)] = whole.get(round_of(plan_id), 0) + 1
        if known == groups_of(plan_id) and (best is None or fact.snapshot > best):
            best = fact.snapshot
    return best


def round_of(plan_id: str) -> str:
    """What the plans of all groups of a round have in common."""
    return plan_id.rpartition("-")[0]


def groups_of(plan_id: str) -> int:
    """How many groups the round of a plan has, as its name says."""
    count = plan_id.rpartition(".")[2]
    return int(count) if count.isdecimal() else 1
