"""Which snapshot and which copies a question or an export is about.

Owns the search for `inspect` and `export`: newest first, each rank's shard from memory, else NVMe.
Promises that an export's copies are all of one snapshot and passed their digests, and that each
copy that was passed over is named. `agent/recovery.py` does the same for trainers, inside the
agent.
"""

from collections.abc import Callable
from dataclasses import dataclass

from everstep.agent.bare import Place, held
from everstep.agent.display import Meter
from everstep.agent.shards import Copy, Store, check_copy, locate
from everstep.proto.errors import EverstepError, NothingRecoverable, Refused
from everstep.proto.ids import SnapshotId


@dataclass(frozen=True, slots=True)
class Chosen:
    """A whole snapshot, each copy checked."""

    job: str
    snapshot: SnapshotId
    copies: dict[int, Copy]
    """By rank, all of the world."""
    rejected: tuple[str, ...]
    """Copies and snapshots that were passed over, and why."""


def candidates(place: Place, job: str, step: int | None) -> list[SnapshotId]:
    """The committed snapshots of a job, newest first.

    Raises:
        NothingRecoverable: If there is none, or none of that step.
    """
    there = [one for one in held(place) if one.job == job and one.committed]
    found = sorted({one.snapshot for one in there}, reverse=True)
    wanted = [snapshot for snapshot in found if step in (None, snapshot.step)]
    if not wanted:
        what = "no step is" if step is None else f"step {step} is not"
        steps = ", ".join(str(snapshot.step) for snapshot in found[:20]) or "none"
        reason = f"{what} committed at {place.name}; committed there: {steps}"
        raise NothingRecoverable(job, (reason,))
    return wanted


def copy_of(place: Place, job: str, step: int | None, rank: int | None) -> Copy:
    """One shard of the newest snapshot, or of a step; its image is not checked.

    Args:
        place: Where to look.
        job: The job.
        step: The step; None for the newest.
        rank: The rank; None for the lowest there is.

    Raises:
        NothingRecoverable: If there is none, with the reasons.
    """
    snapshot = candidates(place, job, step)[0]
    reasons = []
    for store in place.stores:
        ranks = store.ranks(job, snapshot)
        wanted = rank if rank is not None else min(ranks, default=0)
        try:
            return locate(store, job, snapshot, wanted)
        except (EverstepError, OSError) as error:
            reasons.append(f"{snapshot}, rank {wanted}, {store.name}: {error}")
    raise NothingRecoverable(job, tuple(reasons))


def choose(place: Place, job: str, step: int | None, meter: Meter) -> Chosen:
    """The newest snapshot that is whole, or a step if it is; every digest checked.

    Raises:
        NothingRecoverable: If none is, with the reasons.
    """
    rejected: list[str] = []
    for snapshot in candidates(place, job, step):
        copies = _whole(place, job, snapshot, meter, rejected.append)
        if copies is not None:
            return Chosen(job, snapshot, copies, tuple(rejected))
    raise NothingRecoverable(job, tuple(rejected))


def _whole(
    place: Place, job: str, snapshot: SnapshotId, meter: Meter, reject: Callable[[str], None]
) -> dict[int, Copy] | None:
    """A checked copy of each rank's shard, or None if one has none."""
    holdings = [
        one for one in held(place) if (one.job, one.snapshot) == (job, snapshot) and one.committed
    ]
    levels = {one.level for one in holdings}
    stores = [store for store in place.stores if store.name in levels]
    copies = {}
    for rank in range(max(one.world for one in holdings)):
        copy = _checked_copy(stores, job, snapshot, rank, meter, reject)
        if copy is None:
            return None
        copies[rank] = copy
    return copies


def _checked_copy(
    stores: list[Store],
    job: str,
    snapshot: SnapshotId,
    rank: int,
    meter: Meter,
    reject: Callable[[str], None],
) -> Copy | None:
    for store in stores:
        try:
            copy = locate(store, job, snapshot, rank)
            with meter(f"checking {copy}", copy.record.image_bytes) as advance:
                check_copy(copy, advance)
        except (EverstepError, OSError) as error:
            reject(f"{snapshot}, rank {rank}, {store.name}: {error}")
        else:
            return copy
    return None


def checked_rank(chosen: Chosen, rank: int) -> int:
    """The rank, if the snapshot has it.

    Raises:
        Refused: If it does not.
    """
    if rank not in chosen.copies:
        raise Refused(f"{chosen.snapshot} has ranks 0 to {len(chosen.copies) - 1}, no {rank}.")
    return rank
