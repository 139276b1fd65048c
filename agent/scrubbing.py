"""Looks for bit rot in what is held here, steadily and slowly, and mends it.

Owns the scrub: what is looked at next and how fast (`Course`, pure), the reading, and what becomes
of damage. Promises that every copy that stays is looked at in turn, none twice before
`REST_S` are over, at no more than `parity.scrub_bytes_s`; that a damaged shard is repaired from
peers or parity where there are any, else reported as damaged; and that damaged parity is made anew.
What is replaced sooner than `SETTLED_S` is not worth it and is not looked at. `verify_and_repair`
does the same at once, for `everstep verify --repair`.
"""

import asyncio
import logging
import os
import threading
import time
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from everstep.agent import events
from everstep.agent.inventory import LEVELS, MEMORY, NVME
from everstep.agent.job import Job, RoundStage
from everstep.agent.pipeline import Pipeline
from everstep.agent.rates import Rate
from everstep.agent.repairing import DamagedCopy, Image, Repairing, bad_units
from everstep.proto.errors import EverstepError, FormatInvalid, Retryable, ShardCorrupt
from everstep.proto.ids import SnapshotId
from everstep.proto.state_pb2 import Record
from everstep.snapshot.record import open_record

log = logging.getLogger("everstep.agent")

SETTLED_S = 60.0
REST_S = 1800.0
_PAUSE_S = 5.0
_MOST_BAD = 64
"""What is worse is looked at again after that much is repaired."""
_WHOLE = (RoundStage.PREPARED, RoundStage.COMMITTED)
_LEAST_NICE = 19


@dataclass(frozen=True, slots=True, order=True)
class Item:
    """A copy to look at: a shard, or this node's parity of a plan."""

    job: str
    level: str
    snapshot: SnapshotId
    rank: int
    """-1: parity."""
    place: str = ""
    """Where a shard lies, or the plan of parity: another one there is another item."""

    def __str__(self) -> str:
        what = "parity" if self.rank < 0 else f"rank {self.rank}"
        return f"{self.snapshot}, {what}, {self.level}"


@dataclass(slots=True)
class Course:
    """What to look at next. Pure: the clock is passed in."""

    settled_s: float = SETTLED_S
    rest_s: float = REST_S
    _due_s: dict[Item, float] = field(default_factory=dict)

    def next(self, held: Collection[Item], now_s: float) -> Item | None:
        """The item that has waited longest of those that are due; None if none is.

        Args:
            held: All that is held now.
            now_s: The clock.
        """
        kept = {item: due_s for item, due_s in self._due_s.items() if item in set(held)}
        for item in held:
            kept.setdefault(item, now_s + self.settled_s)
        self._due_s = kept
        found = min(held, key=lambda item: (kept[item], item), default=None)
        return found if found is not None and kept[found] <= now_s else None

    def looked_at(self, item: Item, now_s: float, *, again: bool = False) -> None:
        """Take note that an item was looked at, or is to be looked at again soon."""
        self._due_s[item] = now_s + (self.settled_s if again else self.rest_s)


@dataclass(frozen=True, slots=True)
class Looked:
    """What came of looking at a copy."""

    item: Item
    bytes: int
    bad_units: tuple[int, ...] = ()
    repaired: bool = False
    problem: str = ""
    """Empty if it is, or was made, intact."""
    again: bool = False
    """Whether it may be better soon: a peer did not answer."""


class Scrubbing:
    """The scrub of one agent. Lives on the agent's loop."""

    def __init__(
        self, pipeline: Pipeline, repairing: Repairing | None, *, course: Course | None = None
    ) -> None:
        """Prepare.

        Args:
            pipeline: Of this agent.
            repairing: None where there are no peers: damage is only reported then.
            course: What to look at when.
        """
        self._pipeline = pipeline
        self._repairing = repairing
        self._course = course or Course()
        bytes_s = pipeline.config.parity.scrub_bytes_s
        self._rate = Rate(bytes_s, min(4 << 20, bytes_s)) if bytes_s else None
        self._stopping = threading.Event()
        self._worker = ThreadPoolExecutor(1, "everstep-scrub", initializer=_yield_to_others)
        self._hasty = ThreadPoolExecutor(1, "everstep-verify")

    async def run(self) -> None:
        """Scrub until cancelled; at once if it is switched off."""
        while self._rate is not None:
            now_s = time.monotonic()
            item = self._course.next(list(held_items(self._pipeline)), now_s)
            if item is None:
                await asyncio.sleep(_PAUSE_S)
                continue
            looked = await self._look(item, self._worker, self._rate)
            self._course.looked_at(item, time.monotonic(), again=looked.again)

    def close(self) -> None:
        """End what is under way within a unit."""
        self._stopping.set()
        self._worker.shutdown(wait=False, cancel_futures=True)
        self._hasty.shutdown(wait=False, cancel_futures=True)

    async def verify_and_repair(
        self, job: str, *, step: int | None = None, levels: Collection[str] = ()
    ) -> list[Looked]:
        """Look at everything that is held of a job now, and mend what is damaged.

        Args:
            job: The job.
            step: Only this one.
            levels: Only these; empty for all.
        """
        return [
            await self._look(item, self._hasty, None)
            for item in sorted(held_items(self._pipeline))
            if item.job == job
            and step in (None, item.snapshot.step)
            and (not levels or item.level in levels)
        ]

    async def _look(self, item: Item, worker: ThreadPoolExecutor, rate: Rate | None) -> Looked:
        looked_bytes = 0

        def before(count_bytes: int) -> bool:
            nonlocal looked_bytes
            if rate is not None and not rate.take(count_bytes, cancelled=self._stopping):
                return False
            looked_bytes += count_bytes
            return not self._stopping.is_set()

        def read(most: int = _MOST_BAD) -> tuple[Image, Record | None, list[int]]:
            image, record = self._located(item)
            with _opened(image.path) as descriptor:
                return image, record, bad_units(descriptor, image, range(image.units), before, most)

        loop = asyncio.get_running_loop()
        pinned = False
        try:
            image, record, bad = await loop.run_in_executor(worker, read)
            if bad and item.rank >= 0 and item.level == MEMORY:
                # Not pinned before: a look takes long, and slots are few. Now it is looked at again
                # with the slot held fast: it may have been given to another snapshot meanwhile.
                pinned = self._pinned(item)
                if not pinned:
                    return Looked(item, looked_bytes)
                image, record, bad = await loop.run_in_executor(worker, read)
            self._count(item, "scrubbed_bytes", looked_bytes)
            if not bad:
                return Looked(item, looked_bytes)
            if item not in set(held_items(self._pipeline)):
                return Looked(item, looked_bytes)
            damage = ShardCorrupt(f"{item} ({image.path})", tuple(bad))
            return await self._mend(item, image, record, damage, looked_bytes)
        except (EverstepError, OSError) as error:
            if item not in set(held_items(self._pipeline)):
                return Looked(item, looked_bytes)
            return await self._report(item, error, looked_bytes)
        finally:
            if pinned:
                self._pipeline.submit(events.Unpin(item.job, item.snapshot))

    def _pinned(self, item: Item) -> bool:
        if item not in set(held_items(self._pipeline)):
            return False
        return bool(self._pipeline.submit(events.Pin(item.job, item.snapshot)))

    async def _mend(
        self,
        item: Item,
        image: Image,
        record: Record | None,
        damage: ShardCorrupt,
        looked_bytes: int,
    ) -> Looked:
        log.warning("job %s: %s", item.job, damage)
        if record is None or self._repairing is None:
            return await self._report(item, damage, looked_bytes)
        copy = DamagedCopy(
            item.job, item.snapshot, item.rank, item.level, image, record, damage.units
        )
        try:
            await self._repairing.repair(copy)
        except Retryable as error:
            log.warning("job %s: %s is not repaired yet: %s", item.job, item, error)
            return Looked(item, looked_bytes, damage.units, problem=str(error), again=True)
        except (EverstepError, OSError) as error:
            problem = ShardCorrupt(f"{item} ({error})", damage.units)
            return await self._report(item, problem, looked_bytes)
        self._count(item, "scrub_repaired", len(damage.units))
        log.warning("job %s: %d unit(s) of %s were repaired", item.job, len(damage.units), item)
        again = len(damage.units) >= _MOST_BAD
        return Looked(item, looked_bytes, damage.units, repaired=True, again=again)

    async def _report(self, item: Item, error: Exception, looked_bytes: int) -> Looked:
        """Damage that cannot be repaired here, and what can be done about it."""
        units = error.units if isinstance(error, ShardCorrupt) else ()
        reason = str(error)
        log.error("job %s: %s: %s", item.job, item, reason)
        remade = False
        if item.rank < 0 and item.level == MEMORY:
            # It is encoded anew, which takes a while.
            self._pipeline.submit(events.ParityDamaged(item.job, item.place, reason))
            return Looked(item, looked_bytes, units, problem=reason, again=True)
        if item.rank < 0:
            remade = await self._store_parity_again(item)
        elif item.level == MEMORY:
            self._pipeline.submit(events.Damaged(item.job, item.snapshot, reason))
        else:
            self._count(item, "damaged", 1)
            job = self._pipeline.state.jobs.get(item.job)
            if job is not None:
                job.last_error = f"{item}: {reason}"
        return Looked(item, looked_bytes, units, remade, "" if remade else reason)

    async def _store_parity_again(self, item: Item) -> bool:
        """Write parity to NVMe once more, from memory; its digests are checked on the way."""

        def store() -> None:
            parity, nvme = self._pipeline.parity, self._pipeline.nvme
            if parity is None or nvme is None:
                raise FormatInvalid(str(item), "there is no other copy here")
            with parity.open(item.job, item.place) as held:
                nvme.parity.store(item.job, item.snapshot, held.image, held.record)

        try:
            await asyncio.get_running_loop().run_in_executor(self._hasty, store)
        except (EverstepError, OSError) as error:
            log.error("job %s: %s stays damaged: %s", item.job, item, error)
            self._count(item, "damaged", 1)
            return False
        self._count(item, "scrub_repaired", 1)
        return True

    def _located(self, item: Item) -> tuple[Image, Record | None]:
        """Where an item's bytes are, and what they should be. In a thread.

        Raises:
            FormatInvalid: If it cannot be used at all.
        """
        memory, nvme, parity = self._pipeline.memory, self._pipeline.nvme, self._pipeline.parity
        if item.rank < 0:
            stored = parity if item.level == MEMORY else nvme.parity if nvme else None
            if stored is None:
                raise FormatInvalid(str(item), "this node has no such level")
            with stored.open(item.job, item.place) as held:
                digests = held.manifest.unit_digests
                return Image(held.path, held.offset, held.image.nbytes, digests), None
        level = memory if item.level == MEMORY else nvme
        if level is None:
            raise FormatInvalid(str(item), "this node has no such level")
        with level.open_shard(item.job, item.snapshot, item.rank) as shard:
            record = open_record(shard.record, str(shard.path))
            digests = record.unit_digests
            return Image(shard.path, shard.offset, record.image_bytes, digests), record

    def _count(self, item: Item, name: str, by: int) -> None:
        job = self._pipeline.state.jobs.get(item.job)
        if job is not None:
            job.counters[name] = job.counters.get(name, 0) + by


class _opened:
    """A file to be read."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)

    def __enter__(self) -> int:
        return self._descriptor

    def __exit__(self, *about: object) -> None:
        os.close(self._descriptor)


def held_items(pipeline: Pipeline) -> Iterator[Item]:
    """All that is held here and may rot, by the agent's state. On its loop."""
    for job in pipeline.state.jobs.values():
        for snapshot in job.snapshots.values():
            if job.holds(snapshot) and snapshot.verified:
                for rank, shard in snapshot.sealed.items():
                    place = f"{shard.place.generation}/{shard.place.slot}"
                    yield Item(job.name, MEMORY, snapshot.id, rank, place)
        if pipeline.nvme is not None:
            for durable, ranks in _durable(pipeline, job):
                for rank in ranks:
                    yield Item(job.name, NVME, durable, rank)
        for plan_id, known in job.rounds.items():
            for level in LEVELS:
                if known.stage in _WHOLE and (level == MEMORY or known.on_nvme):
                    yield Item(job.name, level, known.plan.snapshot, -1, plan_id)


def _durable(pipeline: Pipeline, job: Job) -> Iterator[tuple[SnapshotId, Collection[int]]]:
    for snapshot, world in job.durable.items():
        alone = not pipeline.state.rules.clustered
        yield snapshot, range(world) if alone else job.durable_ranks.get(snapshot, ())
    for snapshot, (_, ranks) in job.flushed.items():
        yield snapshot, ranks


def _yield_to_others() -> None:
    with suppress(OSError, AttributeError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LEAST_NICE)
