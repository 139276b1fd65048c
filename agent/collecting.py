"""Freeing what is no longer needed, through an agent or on a directory alone.

Owns `everstep gc`: what would be freed and why, and freeing it. Promises that nothing is freed by
`planned`; that on a bare directory the retention rule counts only snapshots whose digests were
checked, so that an intact older one is never given up for a damaged newer one; and that a
directory that an agent uses is left to that agent.
"""

from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from everstep.agent.asking import Agent
from everstep.agent.bare import Held, Place, held, held_by_agent
from everstep.agent.display import Meter
from everstep.agent.verifying import by_directory
from everstep.proto.agent_pb2 import CollectedItem
from everstep.proto.errors import AgentUnavailable, Refused
from everstep.proto.ids import SnapshotId
from everstep.storage.arena import MemoryLevel
from everstep.storage.retention import Rule, expired

_WHOLE_JOB = "the whole job was named"


@dataclass(frozen=True, slots=True)
class Item:
    """Something that is, or would be, freed."""

    job: str
    level: str
    snapshot: SnapshotId | None
    """None for an arena: the memory that a job has reserved."""
    bytes: int | None
    reason: str


class AgentTask:
    """Freeing through an agent. Use as a context manager.

    Args:
        address: The agent's.
        job: This job only; empty for all.
        everything: Whole jobs, arenas included.

    Raises:
        AgentUnavailable: If it does not answer.
        Refused: If it knows no such job.
    """

    def __init__(self, address: str, job: str, *, everything: bool) -> None:
        self._agent = Agent(address)
        self._everything = everything
        self._status = self._agent.status(job)
        self._sizes = {
            (one.job, one.level, one.snapshot): one.bytes
            for one in held_by_agent(self._status, address)
        }

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._agent.close()

    def planned(self) -> list[Item]:
        """What would be freed.

        Raises:
            Refused: If a whole job is in use.
        """
        return self._asked(dry_run=True)

    def free(self) -> list[Item]:
        """Free it; return what was freed. Raises as `planned`."""
        return self._asked(dry_run=False)

    def _asked(self, *, dry_run: bool) -> list[Item]:
        items = []
        for job in self._status.jobs:
            found = self._agent.collect(job.job, everything=self._everything, dry_run=dry_run)
            items += [self._item(job.job, one) for one in found]
            arena_bytes = sum(rank.arena_bytes for rank in job.ranks)
            if self._everything and arena_bytes:
                items.append(Item(job.job, "memory", None, arena_bytes, _WHOLE_JOB))
        return items

    def _item(self, job: str, one: CollectedItem) -> Item:
        snapshot = SnapshotId(one.incarnation, one.step)
        size = one.bytes or self._sizes.get((job, one.level, snapshot))
        return Item(job, one.level, snapshot, size, one.reason)


class BareTask:
    """Freeing on a bare directory. Use as a context manager.

    Args:
        place: The directory; of one job if `everything`.
        rule: What to keep.
        address: Of an agent that might be using the directory.
        meter: Shows the progress of checking what is to be kept.
        everything: The whole job.

    Raises:
        Refused: If an agent uses the directory, or if retention is asked of a memory directory,
            where it has no meaning.
    """

    def __init__(
        self, place: Place, rule: Rule, address: str, meter: Meter, *, everything: bool
    ) -> None:
        self._place = place
        self._rule = rule
        self._meter = meter
        self._everything = everything
        self._plan: list[Item] = []
        _refuse_if_used(place, address)
        if everything:
            place.one_job()
        elif any(isinstance(store, MemoryLevel) for store in place.stores):
            raise Refused(
                f"{place.name} is a memory directory, whose slots are reused by themselves. To "
                "free a job's memory say --job NAME --all. Nothing was freed."
            )
        elif place.snapshot is not None:
            raise Refused(f"{place.name} is one step: name the job's directory.")

    def __enter__(self) -> Self:
        self._place.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._place.__exit__(kind, error, trace)

    def planned(self) -> list[Item]:
        """What would be freed."""
        there = [one for one in held(self._place) if one.committed or self._everything]
        if self._everything:
            self._plan = [_item(one, _WHOLE_JOB) for one in there]
            return self._plan
        self._plan = []
        for job in self._place.jobs():
            mine = {one.snapshot: one for one in there if one.job == job}
            going = _expired(self._place, job, set(mine), self._rule, self._meter)
            self._plan += [_item(mine[snapshot], reason) for snapshot, reason in going]
        return self._plan

    def free(self) -> list[Item]:
        """Free what `planned` has said; return it.

        Raises:
            WriteFailed: If the device fails; the rest stays.
        """
        job = self._place.one_job() if self._everything else ""
        for store in self._place.stores:
            if self._everything:
                store.remove_job(job)
                continue
            for item in self._plan:
                if item.snapshot is not None:
                    store.delete(item.job, item.snapshot)
        return self._plan


def _refuse_if_used(place: Place, address: str) -> None:
    try:
        with Agent(address) as agent:
            status = agent.status()
    except AgentUnavailable:
        return
    directories = (status.memory_dir, status.nvme_dir)
    used = {Path(directory).resolve() for directory in directories if directory}
    for store in place.stores:
        if store.root.resolve() in used:
            raise Refused(
                f"{store.root} is used by agent {status.node_id}, pid {status.pid}: run "
                "`everstep gc` without a directory to work through it. Nothing was freed."
            )


def _item(one: Held, reason: str) -> Item:
    return Item(one.job, one.level, one.snapshot, one.bytes, reason)


def _expired(
    place: Place, job: str, snapshots: set[SnapshotId], rule: Rule, meter: Meter
) -> list[tuple[SnapshotId, str]]:
    """What the rule lets go. What it keeps was checked; what is damaged neither counts nor goes:
    it may be all that is left of a step."""
    sound = set(snapshots)
    checked: set[SnapshotId] = set()
    while True:
        going = expired(sound, rule, set())
        unchecked = sound - {snapshot for snapshot, _ in going} - checked
        if not going or not unchecked:
            return going
        for snapshot in unchecked:
            one = Place(place.stores, place.name, job, snapshot)
            if by_directory(one, None, meter).damaged:
                sound.discard(snapshot)
        checked |= unchecked
