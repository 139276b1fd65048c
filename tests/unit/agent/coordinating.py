"""Reports as members send them: what the tests of the coordinator begin with."""

from collections.abc import Iterable

from everstep.agent.coordination import Cluster, Coordination
from everstep.agent.holdings import (
    JobFact,
    MemberFact,
    Order,
    Report,
    RoundFact,
    ShardFact,
    SnapshotFact,
)
from everstep.agent.protection import ProtectionRules
from everstep.proto.ids import UNIT_BYTES, SnapshotId

JOB = "gpt"
S1, S2 = SnapshotId(1, 1), SnapshotId(1, 2)


def shard(rank: int, version: int = 0) -> ShardFact:
    digest = bytes([version]) * 8 + rank.to_bytes(8, "big")
    return ShardFact(rank, "layout", UNIT_BYTES, digest, b"")


def part(snapshot: SnapshotId, stage: str, ranks: Iterable[int], world: int) -> SnapshotFact:
    shards = tuple(shard(rank) for rank in ranks) if stage in ("sealed", "committed") else ()
    return SnapshotFact(snapshot, world, stage, shards)


def fact(
    ranks: Iterable[int],
    snapshots: Iterable[SnapshotFact] = (),
    *,
    world: int = 2,
    incarnation: int = 1,
    rounds: Iterable[RoundFact] = (),
    **more: object,
) -> JobFact:
    members = tuple(MemberFact(rank, f"p{rank}", True) for rank in ranks)
    return JobFact(
        JOB,
        incarnation,
        world,
        "launch",
        incarnation,
        members,
        tuple(snapshots),
        tuple(rounds),
        **more,  # type: ignore[arg-type]
    )


class Office:
    """A coordinator, and the members that report to it."""

    def __init__(self, nodes: int, rules: ProtectionRules | None = None) -> None:
        self.coordination = Coordination(rules or ProtectionRules(enabled=False))
        self.coordination.take_over(1)
        self.members = frozenset(f"n{index + 1}" for index in range(nodes))
        self.live = self.members
        self.now_s = 0.0
        self._sequence = 0

    @property
    def cluster(self) -> Cluster:
        return Cluster(self.members, self.live, {})

    def reports(self, node_id: str, *facts: JobFact) -> None:
        self._sequence += 1
        self.coordination.report(node_id, Report(self._sequence, 1, facts))

    def decide(self, after_s: float = 0.0) -> None:
        self.now_s += after_s
        self.coordination.decide(self.cluster, self.now_s)

    def orders(self, node_id: str, kind: type | None = None) -> list[Order]:
        found = self.coordination.orders(node_id, self.cluster)
        return [order for order in found if kind is None or isinstance(order, kind)]
