"""What must hold after every step of a simulation, whatever happened.

Owns the ledger of what was promised to whom, kept apart from the agent's own state, and the
comparison with what really is in the files. A breach raises `BrokenPromise`.
"""

from collections import Counter
from typing import Protocol

from everstep.agent.actions import Place
from everstep.agent.job import REMEMBERED_REFUSALS, Job, Stage
from everstep.agent.state import State
from everstep.proto.ids import SnapshotId

from .files import ROTTEN, MemoryFiles, NvmeFiles, Token, tokens


class BrokenPromise(AssertionError):
    """The agent's decisions broke one of the promises of the design."""


def insist(holds: bool, promise: str) -> None:
    """Raise unless it holds."""
    if not holds:
        raise BrokenPromise(promise)


class Claimant(Protocol):
    """A trainer process."""

    rank: int
    incarnation: int

    @property
    def process_id(self) -> str: ...


class Promises:
    """The ledger."""

    def __init__(self, memory: MemoryFiles, nvme: NvmeFiles) -> None:
        self.memory = memory
        self.nvme = nvme
        self.newest: SnapshotId | None = None
        """The newest commit in memory that somebody was told of and that is not rotten."""
        self.newest_durable: SnapshotId | None = None
        self.worlds: dict[SnapshotId, int] = {}
        self.commits = 0
        self.rotten: set[SnapshotId] = set()
        self.decided: dict[int, SnapshotId | None] = {}
        self.base: tuple[SnapshotId, int] | None = None
        """What was restored last, and by which incarnation."""
        self.claims: dict[int, dict[int, str]] = {}
        """By incarnation and rank, the process."""
        self.emptied = False
        self.most_slots = 0
        self.refused: set[tuple[SnapshotId, int]] = set()
        self.dropped: set[SnapshotId] = set()
        """Only by the present agent: the next one may be given the rest of a capture that went
        on meanwhile, and it is whole then."""
        self.reading: Counter[tuple[int, Place]] = Counter()
        """Slots that a flush, a check or a trainer of the present incarnation reads."""

    def committed(self, snapshot: SnapshotId, level: str, world: int) -> None:
        """Somebody was told that a snapshot is committed."""
        if level == "nvme":
            insist(self.nvme.get(snapshot) is not None, f"{snapshot} told durable before it was")
            self.newest_durable = max(snapshot, self.newest_durable or snapshot)
            return
        self.commits += 1
        self.worlds[snapshot] = world
        insist(snapshot not in self.dropped, f"{snapshot} was committed after it was dropped")
        gaps = [rank for rank in range(world) if (snapshot, rank) in self.refused]
        insist(not gaps, f"{snapshot} was committed, but was refused to rank(s) {gaps}")
        rotten = snapshot in self.rotten
        self._insist_whole(snapshot, world, "told committed", rot_allowed=rotten)
        if self.newest is not None:
            insist(snapshot > self.newest, f"{snapshot} was committed after {self.newest}")
        self.newest = None if rotten else snapshot
        self.base = None

    def told_newest(self, job: Job) -> None:
        """As it attaches, a rank is told the newest commits, those found at the start included."""
        newest = job.newest_committed()
        if newest is not None and newest.id not in self.rotten:
            if self.newest is None or job.preference(newest.id) > job.preference(self.newest):
                self.worlds[newest.id] = newest.world
                self.newest = newest.id
        durable = job.newest_durable()
        if durable is not None:
            self.newest_durable = durable

    def told_dropped(self, snapshot: SnapshotId) -> None:
        """Somebody was told that a snapshot will never commit."""
        self.dropped.add(snapshot)
        if self.newest == snapshot:
            insist(False, f"{snapshot} was committed and then dropped without damage")
            self.newest = None

    def attached(self, incarnation: int, process: Claimant, members: set[int]) -> None:
        """A process was told that it is this rank of this incarnation."""
        insist(
            process.incarnation in (0, incarnation),
            f"{process} was moved to incarnation {incarnation}",
        )
        run = self.claims.setdefault(incarnation, {})
        if not process.incarnation and members == {process.rank} and self.emptied:
            self._forget_run(incarnation)
        holder = run.setdefault(process.rank, process.process_id)
        insist(
            holder == process.process_id,
            f"{holder} and {process} are the same rank of incarnation {incarnation}",
        )

    def _forget_run(self, incarnation: int) -> None:
        """A number was forgotten by everything, and is taken again."""
        self.claims[incarnation].clear()
        self.decided.pop(incarnation, None)
        self.rotten = {one for one in self.rotten if one.incarnation != incarnation}
        self.refused = {one for one in self.refused if one[0].incarnation != incarnation}
        self.worlds = {s: w for s, w in self.worlds.items() if s.incarnation != incarnation}

    def granted(self, snapshot: SnapshotId, rank: int, place: Place) -> None:
        """A rank was told to write into a slot."""
        held = self.memory.held.get((rank, place))
        insist(held is None, f"rank {rank}, {place} granted while a record claims it: {held}")
        insist(
            self.memory.slot(rank, place) is not None, f"rank {rank}, {place} granted and not there"
        )
        insist(
            not self.reading[rank, place],
            f"rank {rank}, {place} granted to {snapshot} while it is being read",
        )

    def restored(
        self,
        incarnation: int,
        found: SnapshotId | None,
        to_step: int | None,
        levels: frozenset[str],
    ) -> None:
        """A rank was told what to restore."""
        known = self.decided.setdefault(incarnation, found)
        insist(
            known == found,
            f"incarnation {incarnation} restores both {known} and {found}",
        )
        if to_step is not None:
            insist(found is not None and found.step == to_step, f"asked for {to_step}: {found}")
        else:
            self._insist_newest(found, levels)

    def _insist_newest(self, found: SnapshotId | None, levels: frozenset[str]) -> None:
        promised = []
        if not levels or "memory" in levels:
            promised.append(self.newest)
        if not levels or "nvme" in levels:
            promised.append(self.newest_durable)
        for snapshot in promised:
            if snapshot is not None and not self._left_behind(snapshot):
                insist(
                    found is not None and found >= snapshot,
                    f"{snapshot} was promised, but {found} is restored",
                )

    def _left_behind(self, snapshot: SnapshotId) -> bool:
        if self.base is None:
            return False
        base, incarnation = self.base
        return base < snapshot and snapshot.incarnation < incarnation

    def decision(self, incarnation: int, found: SnapshotId | None, *, free: bool) -> None:
        """The agent decided, `free` or as it was asked, what an incarnation restores.

        Newer ones are left behind, and not to be chosen again.
        """
        if found is None:
            return
        if free and self.base is not None and self._whole(self.base[0]):
            insist(not self._left_behind(found), f"{found} had been left behind for {self.base}")
        self.base = (found, incarnation)
        if self._whole(found):
            self.newest = found
        elif self.newest is not None and self._left_behind(self.newest):
            self.newest = None

    def check_unit(self, seen: Token, wanted: Token, who: str) -> bool:
        """Whether a unit that somebody reads is sound; False if it rotted by itself."""
        insist(seen in (wanted, ROTTEN), f"{who} reads {seen} instead of {wanted}")
        return seen == wanted

    def look(self, state: State | None) -> None:
        """Compare the ledger with the files and the agent's state."""
        if self.newest is not None:
            self._insist_whole(self.newest, self.worlds[self.newest], "promised in memory")
        if self.newest_durable is not None:
            # A later incarnation's commit of the same step takes its place.
            there = self.nvme.by_step.get(self.newest_durable.step)
            insist(
                there is not None and there.incarnation >= self.newest_durable.incarnation,
                f"{self.newest_durable} was promised on NVMe and is gone",
            )
        if state is not None:
            insist(len(state.jobs) <= state.rules.max_jobs, "too many jobs")
            for job in state.jobs.values():
                self._look_at(job)

    def _look_at(self, job: Job) -> None:
        for snapshot in job.snapshots.values():
            if snapshot.stage is Stage.COMMITTED:
                self._insist_whole(snapshot.id, snapshot.world, "committed", rot_allowed=True)
                insist(snapshot.drifted_replicas() == (), f"{snapshot.id} has drifted apart")
            elif snapshot.stage is Stage.OPEN:
                present = snapshot.id.incarnation == job.incarnation
                insist(present, f"{snapshot.id} is open in incarnation {job.incarnation}")
                insist(
                    all(
                        s.stage is not Stage.COMMITTED
                        for s in job.snapshots.values()
                        if s.id > snapshot.id
                    ),
                    f"{snapshot.id} is open beside a newer commit",
                )
        slots = sum(arena.slot_count for arenas in job.arenas.values() for arena in arenas)
        insist(len(job.refused) <= REMEMBERED_REFUSALS, f"{len(job.refused)} refusals kept")
        self.most_slots = max(slots, self.most_slots)
        insist(
            len(job.snapshots) <= self.most_slots + 1,
            f"{len(job.snapshots)} snapshots, never more than {self.most_slots} slots",
        )
        insist(len(job.agreements) <= 1, "declarations pile up")
        insist(len(job.members) <= job.world, "more members than ranks")

    def _whole(self, snapshot: SnapshotId) -> bool:
        world = self.worlds.get(snapshot)
        holders = self.memory.holders(snapshot)
        return world is not None and len(holders) == world and snapshot not in self.rotten

    def _insist_whole(
        self, snapshot: SnapshotId, world: int, why: str, *, rot_allowed: bool = False
    ) -> None:
        holders = self.memory.holders(snapshot)
        for rank in range(world):
            if rank not in holders and rot_allowed and snapshot in self.rotten:
                continue
            insist(rank in holders, f"{snapshot} is {why}, but rank {rank} has no record")
            place, body = holders[rank]
            content = self.memory.slot(rank, place)
            insist(content is not None, f"{snapshot} is {why}, but rank {rank}'s arena is gone")
            assert content is not None
            wanted = tokens(snapshot, rank, body.image_bytes)
            if content[: body.image_bytes] == wanted:
                continue
            whole = rot_allowed and all(
                seen in (want, ROTTEN) for seen, want in zip(content, wanted, strict=False)
            )
            insist(whole, f"{snapshot} is {why}, but rank {rank} holds {content}")

    def rot(self, snapshot: SnapshotId) -> None:
        """A unit in memory rotted: what was promised of this snapshot is void."""
        self.rotten.add(snapshot)
        if self.newest == snapshot:
            self.newest = None

    def memory_emptied(self) -> None:
        """Memory was emptied, with trainers and perhaps an agent that remember what it was."""
        self.emptied = True
        self.newest = None

    def power_lost(self) -> None:
        """Memory is gone, and with it what was promised of it; numbers on NVMe stay taken."""
        durable = [commit.incarnation for commit in self.nvme.by_step.values()]
        last = max(durable, default=0)
        self.newest = self.base = None
        self.rotten.clear()
        self.decided = {known: found for known, found in self.decided.items() if known <= last}
        self.claims = {known: who for known, who in self.claims.items() if known <= last}
        self.refused.clear()
        self.dropped.clear()
        self.worlds.clear()

    def forget(self) -> None:
        """The whole job was removed on request."""
        self.power_lost()
        self.newest_durable = None
