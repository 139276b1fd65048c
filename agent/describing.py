"""Records and layouts of shards, from whichever node has them.

Owns the questions to the nodes and the checks of their answers. Promises that a record which is
returned is of the very shard that was asked for and has the size and, where that is known, the
digest that it must have; and that its layout belongs to it. A node that answers wrongly is passed
over, as one that does not answer.
"""

import logging
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from everstep.agent.calling import Calls
from everstep.agent.sources import Decoded, Held, SnapshotPlan
from everstep.proto import peer_pb2 as wire
from everstep.proto.errors import (
    DeadlineExceeded,
    EverstepError,
    FormatInvalid,
    PeerUnavailable,
)
from everstep.proto.ids import UNIT_BYTES, SnapshotId
from everstep.proto.state_pb2 import Record
from everstep.snapshot.layout import decode
from everstep.snapshot.record import open_record, record_digest

log = logging.getLogger("everstep.agent")
_RANKS_A_CALL = 8
"""Records have 16 bytes a unit, layouts a few hundred a leaf: messages stay within their limit."""
CALL_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class Known:
    """What is known of a shard before it is described."""

    image_bytes: int
    record_digest: bytes = field(default=b"", repr=False)
    """Empty if nobody can say."""


@dataclass(frozen=True, slots=True)
class Described:
    """A shard's record and layout, checked against each other."""

    record: Record = field(repr=False)
    record_envelope: bytes = field(repr=False)
    layout_envelope: bytes = field(repr=False)


def describe_plan(
    calls: Calls, job: str, plan: SnapshotPlan, ranks: Iterable[int], deadline_s: float
) -> dict[int, Described]:
    """Records and layouts of some ranks of a plan of recovery.

    Raises:
        KeyError: If the plan has no source of a rank.
        PeerUnavailable: If no node that may know one says what can be believed.
        FormatInvalid: Likewise, if the last one said something else.
        DeadlineExceeded: If the deadline passed first.
    """
    digests = {
        shard.rank: shard.record_digest
        for source in plan.decoded
        for member in source.plan.members
        for shard in member.shards
    }
    found: dict[int, Described] = {}
    by_nodes: dict[tuple[str, ...], dict[int, Known]] = {}
    for rank in ranks:
        source = plan.source_of(rank)
        known = Known(source.image_bytes, digests.get(rank, b""))
        by_nodes.setdefault(tuple(_nodes_of(plan, source)), {})[rank] = known
    for nodes, wanted in by_nodes.items():
        found |= describe(calls, nodes, job, plan.snapshot, wanted, plan.world, deadline_s)
    return found


def _nodes_of(plan: SnapshotPlan, source: Held | Decoded) -> Iterator[str]:
    """Who may know a shard: its holder, or those who hold parity of it."""
    if isinstance(source, Held):
        yield source.node_id
        return
    yield from dict.fromkeys(
        parity.node_id for parity in plan.parities if parity.plan_id == source.plan.plan_id
    )


def describe(
    calls: Calls,
    nodes: Iterable[str],
    job: str,
    snapshot: SnapshotId,
    wanted: Mapping[int, Known],
    world: int,
    deadline_s: float,
) -> dict[int, Described]:
    """Ask one node after the other until all of these ranks are described.

    Raises:
        PeerUnavailable: See `describe_plan`, as for the others.
        FormatInvalid: What a node said cannot be believed.
        DeadlineExceeded: If the deadline passed first.
    """
    found: dict[int, Described] = {}
    problem: EverstepError = PeerUnavailable("every node", "none is known to have the records")
    for node in nodes:
        missing = sorted(wanted.keys() - found.keys())
        for first in range(0, len(missing), _RANKS_A_CALL):
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                raise DeadlineExceeded(f"records of {snapshot}", 0, (node,))
            ranks = missing[first : first + _RANKS_A_CALL]
            request = wire.DescribeRequest(job=job, ranks=ranks)
            request.incarnation, request.step = snapshot.incarnation, snapshot.step
            try:
                timeout_s = min(left_s, CALL_TIMEOUT_S)
                reply = calls.call_blocking(node, "Describe", request, timeout_s)
                for shard in reply.shards:
                    if shard.rank in ranks and shard.rank not in found:
                        where = f"what {node} says of rank {shard.rank}"
                        described = _checked(shard, where)
                        _check(described, job, snapshot, shard.rank, wanted[shard.rank], where)
                        _check_world(described.record, world, where)
                        found[shard.rank] = described
            except EverstepError as error:
                log.warning("job %s: %s is not described by %s: %s", job, snapshot, node, error)
                problem = error
                break
        if found.keys() >= wanted.keys():
            return found
    if not wanted:
        return found
    missing_ranks = ", ".join(map(str, sorted(wanted.keys() - found.keys())))
    if isinstance(problem, PeerUnavailable):
        raise PeerUnavailable(problem.peer, f"no record of rank {missing_ranks}: {problem.detail}")
    raise problem


def _checked(shard: wire.DescribedShard, where: str) -> Described:
    record = open_record(shard.record, where)
    layout = decode(shard.layout, f"the layout in {where}")
    if record.unit_bytes != UNIT_BYTES or layout.image_bytes != record.image_bytes:
        raise FormatInvalid(where, "its record and its layout contradict each other")
    if layout.layout_id != record.layout_id:
        raise FormatInvalid(where, "its layout is not the one that its record names")
    return Described(record, shard.record, shard.layout)


def _check(
    described: Described, job: str, snapshot: SnapshotId, rank: int, known: Known, where: str
) -> None:
    check_record(described.record, job, snapshot, rank, where)
    if described.record.image_bytes != known.image_bytes:
        raise FormatInvalid(
            where, f"an image of {described.record.image_bytes} bytes, not {known.image_bytes}"
        )
    if known.record_digest and record_digest(described.record_envelope) != known.record_digest:
        raise FormatInvalid(where, "its record is not the one that was protected")


def check_record(record: Record, job: str, snapshot: SnapshotId, rank: int, where: str) -> None:
    """Return only if a record is of this very shard.

    Raises:
        FormatInvalid: If it is of another.
    """
    found = SnapshotId(record.incarnation, record.step)
    if (record.job, found, record.rank) != (job, snapshot, rank):
        raise FormatInvalid(
            where,
            f"it is of job {record.job!r}, rank {record.rank} of {found}, not of {job!r}, "
            f"rank {rank} of {snapshot}",
        )


def _check_world(record: Record, world: int, where: str) -> None:
    if record.world != world:
        raise FormatInvalid(where, f"its world has {record.world} ranks, not {world}")
