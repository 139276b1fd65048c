"""Where each rank's shard of a snapshot can be had: a plan of recovery, as plain data.

Owns the plan, and its form on the wire. Promises that one that was parsed names each rank once
and only nodes and levels that can be. `agent/planning.py` makes them, `agent/rebuilding.py` says
what they cost.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from everstep.agent import plans
from everstep.agent.inventory import DIGEST_BYTES, LEVELS
from everstep.agent.plans import MAX_IMAGE_BYTES, ParityPlan
from everstep.proto import peer_pb2
from everstep.proto.errors import FormatInvalid
from everstep.proto.ids import MAX_RANKS, SnapshotId, checked_name


@dataclass(frozen=True, slots=True)
class Held:
    """A rank's shard that a node has."""

    rank: int
    node_id: str
    level: str
    image_bytes: int


@dataclass(frozen=True, slots=True)
class Decoded:
    """A rank's shard that nobody has any more, but the group it was protected in can decode."""

    rank: int
    plan: ParityPlan
    member: int
    """Who held it: an index into the plan's members."""
    image_bytes: int


Source = Held | Decoded


@dataclass(frozen=True, slots=True)
class ParityAt:
    """A member's parity, where it is in reach."""

    plan_id: str
    node_id: str
    level: str


@dataclass(frozen=True, slots=True)
class SnapshotPlan:
    """What is left of a snapshot, and how it is put together again."""

    snapshot: SnapshotId
    world: int
    sources: tuple[Source, ...]
    """Ascending by rank; all of the world if it is recoverable."""
    missing: tuple[str, ...] = ()
    """Why it is not recoverable, in words; empty if it is."""
    further_losses: int = 0
    """How many more nodes may be lost, any of them, each with its memory and its disk, with this
    snapshot still recoverable."""
    memory_losses: int | None = None
    """The same by what is in memory alone; None if memory alone does not have it now."""
    parities: tuple[ParityAt, ...] = ()
    """In reach, of the plans that something is decoded with."""
    commit_id: bytes = b""
    """What the shards were committed as, see `events.CommitOrdered`; empty if that is not known."""

    @property
    def recoverable(self) -> bool:
        """Whether every rank has a source."""
        return not self.missing

    @property
    def decoded(self) -> tuple[Decoded, ...]:
        """The shards that take decoding."""
        return tuple(source for source in self.sources if isinstance(source, Decoded))

    @property
    def levels(self) -> tuple[str, ...]:
        """Where from, fastest first; with those that parity is read from."""
        used = {source.level for source in self.sources if isinstance(source, Held)}
        used |= {parity.level for parity in self.parities}
        return tuple(level for level in LEVELS if level in used)

    @property
    def further_loss_level(self) -> str:
        """The fastest level that survives as many further losses."""
        return LEVELS[0] if self.memory_losses == self.further_losses else LEVELS[-1]

    def source_of(self, rank: int) -> Source:
        """A rank's source.

        Raises:
            KeyError: If it has none.
        """
        for source in self.sources:
            if source.rank == rank:
                return source
        raise KeyError(rank)

    def encoded(self) -> peer_pb2.SnapshotPlan:
        """As a message."""
        return peer_pb2.SnapshotPlan(
            incarnation=self.snapshot.incarnation,
            step=self.snapshot.step,
            world=self.world,
            recoverable=self.recoverable,
            sources=[_source_message(source) for source in self.sources],
            missing=self.missing,
            further_losses=self.further_losses,
            further_loss_level=self.further_loss_level if self.recoverable else "",
            memory_losses=self.memory_losses,
            parities=[
                peer_pb2.ParitySource(plan_id=p.plan_id, node_id=p.node_id, level=p.level)
                for p in self.parities
            ],
            commit_id=self.commit_id,
        )


def _source_message(source: Source) -> peer_pb2.ShardSource:
    if isinstance(source, Held):
        return peer_pb2.ShardSource(
            rank=source.rank,
            node_id=source.node_id,
            level=source.level,
            image_bytes=source.image_bytes,
        )
    return peer_pb2.ShardSource(
        rank=source.rank, plan=source.plan.encoded(), image_bytes=source.image_bytes
    )


def parsed(message: peer_pb2.SnapshotPlan, where: str) -> SnapshotPlan:
    """The plan in a message, checked.

    Raises:
        FormatInvalid: If it contradicts itself.
        InvalidName: If a node's name is none.
    """
    if message.world > MAX_RANKS:
        raise FormatInvalid(where, f"a world of {message.world} ranks is not possible")
    if len(message.commit_id) not in (0, DIGEST_BYTES):
        raise FormatInvalid(where, f"a commit id of {len(message.commit_id)} bytes is not possible")
    snapshot = SnapshotId(message.incarnation, message.step)
    known: dict[str, ParityPlan] = {}
    sources = tuple(_source(source, message, known, where) for source in message.sources)
    _check_ranks([source.rank for source in sources], message, where)
    return SnapshotPlan(
        snapshot=snapshot,
        world=message.world,
        sources=sources,
        missing=tuple(message.missing) or (() if message.recoverable else ("it does not say",)),
        further_losses=message.further_losses,
        memory_losses=message.memory_losses if message.HasField("memory_losses") else None,
        parities=tuple(
            ParityAt(
                parity.plan_id,
                checked_name("node", parity.node_id),
                _level(parity.level, where),
            )
            for parity in message.parities
        ),
        commit_id=message.commit_id,
    )


def _check_ranks(ranks: Sequence[int], message: peer_pb2.SnapshotPlan, where: str) -> None:
    whole = ranks == list(range(message.world)) and not message.missing
    if ranks != sorted(set(ranks)) or (ranks and ranks[-1] >= message.world):
        raise FormatInvalid(where, "its ranks are not in order, or beyond its world")
    if message.recoverable and not whole:
        raise FormatInvalid(where, "it says that it is recoverable, but not from where")


def _source(
    message: peer_pb2.ShardSource,
    of: peer_pb2.SnapshotPlan,
    known: dict[str, ParityPlan],
    where: str,
) -> Source:
    if message.image_bytes > MAX_IMAGE_BYTES:
        raise FormatInvalid(where, f"rank {message.rank} has no possible size")
    if message.node_id:
        node_id = checked_name("node", message.node_id)
        return Held(message.rank, node_id, _level(message.level, where), message.image_bytes)
    # Many ranks are decoded with one plan: keep one of it.
    plan = plans.parsed(message.plan, where)
    plan = known.setdefault(plan.plan_id, plan)
    if (plan.snapshot, plan.world) != (SnapshotId(of.incarnation, of.step), of.world):
        raise FormatInvalid(where, f"a plan is of {plan.snapshot}")
    for index, member in enumerate(plan.members):
        for shard in member.shards:
            if shard.rank == message.rank and shard.image_bytes == message.image_bytes:
                return Decoded(message.rank, plan, index, message.image_bytes)
    raise FormatInvalid(where, f"plan {plan.plan_id} does not protect rank {message.rank}")


def _level(level: str, where: str) -> str:
    if level not in LEVELS:
        raise FormatInvalid(where, f"there is no level {level!r}")
    return level
