"""Which slot a rank is given for a step, and what it gives up by asking.

Owns the rule for several captures of one rank: it names those that it still copies with every offer
and as it attaches again, ascending; an older open step that it does not name it will never seal,
so that step is dropped. Promises that a place which the rank still writes is never granted again,
even where nothing here remembers the copy. Part of the agent's decisions: see `agent.state`.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from everstep.agent import events
from everstep.agent.actions import Place
from everstep.agent.events import InFlight
from everstep.agent.job import Job, Snapshot, Stage
from everstep.proto.ids import SnapshotId

if TYPE_CHECKING:
    from everstep.agent.state import State


def give_up_older(state: "State", job: Job, offer: events.Offer) -> None:
    """A rank that asks for a step names the older ones that it will seal yet: no others."""
    rank = offer.caller.rank
    named = {copied.step: copied.place for copied in offer.in_flight}
    for snapshot in list(job.snapshots.values()):
        step = snapshot.id.step
        if step >= offer.step:
            continue
        present = snapshot.id.incarnation == job.incarnation
        if present and step in named and snapshot.granted.get(rank) == named[step]:
            if rank not in snapshot.sealed:
                # It may have begun the copy since it attached again, with the answer to an offer
                # from before: then it was not named there.
                snapshot.copying.add(rank)
            continue
        snapshot.copying.discard(rank)
        if present and snapshot.stage is Stage.OPEN and rank not in snapshot.sealed:
            state.drop(
                job, snapshot, f"rank {rank} went on to step {offer.step} without sealing it"
            )


def grant(state: "State", job: Job, snapshot: Snapshot, offer: events.Offer) -> Place | str:
    """The rank's slot for a step that is begun, or why there is none."""
    rank = offer.caller.rank
    granted = snapshot.granted.get(rank)
    # One that asks again has written nothing for this step, and may have another arena since.
    if granted is not None and granted.generation == job.arenas[rank][-1].generation:
        return granted
    written = _written(job, offer)
    place = job.free_place(rank, written)
    for old in job.evictable():
        if place is not None:
            break
        if rank in old.granted:
            state.forget(job, old)
            place = job.free_place(rank, written)
    if place is None:
        state.drop(job, snapshot, f"rank {rank} has no free slot")
        if not snapshot.granted:
            state.forget(job, snapshot)  # it holds nothing, and others are told all the same
        return snapshot.reason
    snapshot.granted[rank] = place
    snapshot.copying.add(rank)
    return place


def _written(job: Job, offer: events.Offer) -> set[Place]:
    """The places of copies that the rank names, but for those that are sealed: it may not have
    heard of that yet."""
    rank, written = offer.caller.rank, set()
    for copied in offer.in_flight:
        known = job.snapshots.get(SnapshotId(job.incarnation, copied.step))
        granted = known.granted.get(rank) if known is not None else None
        if known is None or granted != copied.place or rank in known.copying:
            written.add(copied.place)
    return written


def readmit(job: Job, rank: int, in_flight: Iterable[InFlight]) -> None:
    """As a rank attaches, take note of the copies it says are going on, and of no other."""
    for known in job.snapshots.values():
        known.copying.discard(rank)
    if job.arenas.get(rank):
        for copied in in_flight:
            _readmit(job, rank, copied)


def readmit_sealing(job: Job, seal: events.Seal) -> None:
    """A rank may seal before it has attached again to an agent that came back: what it seals it
    would have named then."""
    rank = seal.caller.rank
    member = job.members[rank]
    if not member.attached and not member.detached and job.arenas.get(rank):
        _readmit(job, rank, InFlight(seal.step, seal.place))


def _readmit(job: Job, rank: int, copied: InFlight) -> None:
    snapshot_id = SnapshotId(job.incarnation, copied.step)
    newest = job.newest_committed()
    superseded = newest is not None and newest.id > snapshot_id
    arena = job.arenas[rank][-1]
    slots = arena.slot_count if arena.generation == copied.place.generation else 0
    taken = any(
        other.granted.get(rank) == copied.place
        for other in job.snapshots.values()
        if other.id != snapshot_id
    )
    there = 0 <= copied.place.slot < slots
    if superseded or taken or not there or copied.step in job.refused:
        return
    snapshot = job.snapshots.setdefault(snapshot_id, Snapshot(snapshot_id, job.world))
    if snapshot.stage is Stage.OPEN:
        snapshot.granted.setdefault(rank, copied.place)
    if snapshot.granted.get(rank) == copied.place and rank not in snapshot.sealed:
        snapshot.copying.add(rank)
