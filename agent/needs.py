"""What a rank asks to be brought here for its restore: units of some ranks' shards.

Owns reading `GatherRequest`, and the arithmetic of spans of units. Promises that what was read is
possible: ranks of the world that saved the snapshot, each once, and units of their images; and that
it is of the very snapshot which the rank's incarnation was told to restore. Brings nothing: see
`agent.bringing`.
"""

from collections.abc import Iterable, Mapping, Sequence

from everstep.agent.job import Job
from everstep.proto import agent_pb2 as wire
from everstep.proto.errors import FormatInvalid, Refused
from everstep.proto.ids import SnapshotId
from everstep.storage.identity import unit_count
from everstep.storage.staging import MAX_IMAGE_BYTES

Spans = list[range]
"""Units, ascending; none twice, none empty."""
Needs = Mapping[int, Spans]
"""By rank of the launch that saved."""
_WHERE = "a request to gather"


def needs_of(request: wire.GatherRequest) -> dict[int, Spans]:
    """What is asked for; whether there are such units is for `check_needs`.

    Raises:
        FormatInvalid: If no shard could have them.
    """
    most = unit_count(MAX_IMAGE_BYTES)
    found: dict[int, Spans] = {}
    for need in request.needs:
        if need.rank in found:
            raise FormatInvalid(_WHERE, f"rank {need.rank} is named twice")
        if any(not 0 < span.count <= most or span.first >= most for span in need.units):
            raise FormatInvalid(_WHERE, f"rank {need.rank} cannot have such units")
        found[need.rank] = merged(range(u.first, u.first + u.count) for u in need.units)
    return found


def check_needs(needs: Needs, image_bytes: Mapping[int, int]) -> None:
    """Return only if the shards have these units.

    Args:
        needs: By rank.
        image_bytes: Of each rank's shard.

    Raises:
        FormatInvalid: If a rank or a unit is not there.
    """
    for rank, spans in needs.items():
        if rank not in image_bytes:
            raise FormatInvalid(_WHERE, f"no rank {rank} has saved it")
        units = unit_count(image_bytes[rank])
        if spans and spans[-1].stop > units:
            last = spans[-1].stop - 1
            raise FormatInvalid(_WHERE, f"unit {last} of rank {rank}, which has {units}")


def check_restoring(job: Job, rank: int, snapshot: SnapshotId) -> None:
    """Return only if a rank is restoring this very snapshot.

    Raises:
        Refused: If it restores another one, none yet, or none any more.
    """
    decided = job.joining.get(rank) or (job.restored if job.restore_decided else None)
    if decided != snapshot:
        what = f"{decided}" if decided is not None else "nothing that is known yet"
        raise Refused(
            f"rank {rank} of job {job.name!r} restores {what}, not {snapshot}. Nothing was "
            "loaded. Ask what to restore first."
        )
    if rank not in job.restoring and rank not in job.joining:
        raise Refused(
            f"rank {rank} of job {job.name!r} has gone on to a step since it restored {snapshot}. "
            "Nothing was loaded. Ask what to restore again."
        )


def merged(ranges: Iterable[range]) -> Spans:
    """The same units, in order, none twice."""
    found: Spans = []
    for one in sorted((one for one in ranges if one), key=lambda one: (one.start, one.stop)):
        if found and one.start <= found[-1].stop:
            found[-1] = range(found[-1].start, max(found[-1].stop, one.stop))
        else:
            found.append(one)
    return found


def without(spans: Sequence[range], others: Sequence[range]) -> Spans:
    """The units that are not among others."""
    left = []
    for one in spans:
        start = one.start
        for other in others:
            if other.stop <= start:
                continue
            if other.start >= one.stop:
                break
            if start < other.start:
                left.append(range(start, other.start))
            start = other.stop
        if start < one.stop:
            left.append(range(start, one.stop))
    return left
