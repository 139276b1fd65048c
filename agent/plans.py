"""The plan of one parity round: which nodes protect each other, and with what.

Owns the plan as plain data, and its form on the wire and on disk. Promises that a plan that was
parsed is consistent: names are harmless, ranks ascend and belong to one member each, sizes are
bounded, there are more members than parities. Geometry follows from it: `erasure.rows`.
"""

from dataclasses import dataclass, field
from itertools import pairwise

from everstep.erasure.rows import Rows
from everstep.proto import state_pb2
from everstep.proto.errors import FormatInvalid, InvalidName
from everstep.proto.ids import UNIT_BYTES, SnapshotId, checked_name

CODE = "cauchy-11d"
MAX_MEMBERS = 255
MAX_IMAGE_BYTES = 1 << 44
_DIGEST_BYTES = 16


@dataclass(frozen=True, slots=True)
class PlannedShard:
    """One rank's shard, as the plan knows it."""

    rank: int
    image_bytes: int
    layout_id: str
    record_digest: bytes = field(repr=False)

    @property
    def units(self) -> int:
        """Units of its image."""
        return -(-self.image_bytes // UNIT_BYTES)


@dataclass(frozen=True, slots=True)
class PlannedMember:
    """One node of a group."""

    node_id: str
    shards: tuple[PlannedShard, ...]

    @property
    def units(self) -> int:
        """Units of its stream: its shards' images, each padded to whole units."""
        return sum(shard.units for shard in self.shards)

    def locate(self, unit: int) -> tuple[PlannedShard, int]:
        """The shard that a unit of the stream belongs to, and the unit's index in its image."""
        for shard in self.shards:
            if unit < shard.units:
                return shard, unit
            unit -= shard.units
        raise IndexError(unit)


@dataclass(frozen=True, slots=True)
class ParityPlan:
    """Who protects whom, of one snapshot."""

    plan_id: str
    job: str
    snapshot: SnapshotId
    world: int
    parities: int
    members: tuple[PlannedMember, ...]

    def rows(self) -> Rows:
        """The geometry."""
        return Rows(tuple(member.units for member in self.members), self.parities)

    def index_of(self, node_id: str) -> int:
        """A member's index.

        Raises:
            KeyError: If the node is none.
        """
        for index, member in enumerate(self.members):
            if member.node_id == node_id:
                return index
        raise KeyError(node_id)

    def unit_bytes_of(self, member: int, unit: int) -> int:
        """How many bytes of a member's stream unit are real; the rest are virtual zeros."""
        shard, within = self.members[member].locate(unit)
        return min(UNIT_BYTES, shard.image_bytes - within * UNIT_BYTES)

    def encoded(self) -> state_pb2.ParityPlan:
        """As a message."""
        return state_pb2.ParityPlan(
            plan_id=self.plan_id,
            job=self.job,
            incarnation=self.snapshot.incarnation,
            step=self.snapshot.step,
            world=self.world,
            code=CODE,
            parities=self.parities,
            unit_bytes=UNIT_BYTES,
            members=[
                state_pb2.PlannedMember(
                    node_id=member.node_id,
                    shards=[
                        state_pb2.PlannedShard(
                            rank=shard.rank,
                            image_bytes=shard.image_bytes,
                            layout_id=shard.layout_id,
                            record_digest=shard.record_digest,
                        )
                        for shard in member.shards
                    ],
                )
                for member in self.members
            ],
        )


def parsed(message: state_pb2.ParityPlan, where: str) -> ParityPlan:
    """The plan in a message, checked.

    Raises:
        FormatInvalid: If it is of another code, or contradicts itself.
    """
    if message.code != CODE or message.unit_bytes != UNIT_BYTES:
        raise FormatInvalid(where, f"its parity is coded as {message.code!r}, not {CODE!r}")
    plan = ParityPlan(
        plan_id=message.plan_id,
        job=message.job,
        snapshot=SnapshotId(message.incarnation, message.step),
        world=message.world,
        parities=message.parities,
        members=tuple(
            PlannedMember(
                member.node_id,
                tuple(
                    PlannedShard(s.rank, s.image_bytes, s.layout_id, s.record_digest)
                    for s in member.shards
                ),
            )
            for member in message.members
        ),
    )
    problem = _problem(plan)
    if problem:
        raise FormatInvalid(where, problem)
    return plan


def _problem(plan: ParityPlan) -> str:
    try:
        checked_name("job", plan.job)
        checked_name("plan", plan.plan_id)
        for member in plan.members:
            checked_name("node", member.node_id)
    except InvalidName as error:
        return str(error)
    names = [member.node_id for member in plan.members]
    ranks = [shard.rank for member in plan.members for shard in member.shards]
    if not 1 <= plan.parities < len(names) <= MAX_MEMBERS:
        return f"{plan.parities} parities of {len(names)} members are not possible"
    if len(set(names)) != len(names) or len(set(ranks)) != len(ranks):
        return "a node or a rank occurs twice"
    if any(rank >= plan.world for rank in ranks):
        return f"it names a rank beyond the world of {plan.world}"
    for member in plan.members:
        if any(left.rank >= right.rank for left, right in pairwise(member.shards)):
            return f"the ranks of {member.node_id} are not in order"
        for shard in member.shards:
            if shard.image_bytes > MAX_IMAGE_BYTES or len(shard.record_digest) != _DIGEST_BYTES:
                return f"rank {shard.rank} has no possible size or digest"
    return ""
