"""Reserving a rank's arena for a layout.

Owns the decision whether the arena that is there will do, and the reservation of a larger one.
Promises that memory is really there when it answers (no late SIGBUS), that a refusal leaves the
present arena and its snapshots as they were, and that quotas hold.
"""

import asyncio
import contextlib
import functools
from weakref import WeakKeyDictionary

from everstep.agent import events
from everstep.agent.config import Config
from everstep.agent.pipeline import Pipeline
from everstep.proto.errors import ArenaLost, FormatInvalid, OutOfSpace
from everstep.snapshot.layout import decode
from everstep.storage.arena import ArenaFile

_ROUND_BYTES = 64 * 1024
_LOCKS: "WeakKeyDictionary[Pipeline, dict[tuple[str, int], asyncio.Lock]]" = WeakKeyDictionary()


async def reserve_arena(
    pipeline: Pipeline, config: Config, caller: events.Caller, layout: bytes, layout_id: str
) -> ArenaFile:
    """The arena that a rank may write images of this layout into.

    Raises:
        StaleIncarnation: If the caller is not this rank any more.
        FormatInvalid: If the layout is damaged or not the one its id names.
        OutOfSpace: If tmpfs, memory or the job's quota do not allow it.
    """
    declared = decode(layout, f"layout of rank {caller.rank}")
    if declared.layout_id != layout_id:
        raise FormatInvalid("Declare", "the layout's content is not what its id names")
    async with arena_lock(pipeline, caller.job, caller.rank):
        pipeline.state.check(caller)
        with contextlib.suppress(ArenaLost):
            pipeline.check_arena(caller.job, caller.rank)
        loop = asyncio.get_running_loop()
        put = functools.partial(pipeline.memory.put_layout, caller.job, layout_id, layout)
        await loop.run_in_executor(pipeline.workers, put)
        present = pipeline.state.jobs[caller.job].arenas.get(caller.rank, [])
        needed_bytes, slots = slot_bytes_for(declared.image_bytes), config.memory.slots
        if present and present[-1].slot_bytes >= needed_bytes and present[-1].slot_count == slots:
            return pipeline.arena_file(caller.job, caller.rank, present[-1].generation)
        arena = await new_arena(pipeline, config, caller.job, caller.rank, declared.image_bytes)
        pipeline.submit(reserved_event(arena))
        return arena


def arena_lock(pipeline: Pipeline, job: str, rank: int) -> asyncio.Lock:
    """Held by whoever reserves a rank's arena until the agent's state knows of it: two must not
    be given the same generation."""
    locks = _LOCKS.setdefault(pipeline, {})
    return locks.setdefault((job, rank), asyncio.Lock())


async def new_arena(
    pipeline: Pipeline, config: Config, job: str, rank: int, image_bytes: int
) -> ArenaFile:
    """Reserve one more arena for a rank. The caller holds `arena_lock`.

    Raises:
        OutOfSpace: If tmpfs, memory or the job's quota do not allow it.
    """
    slots, slot_bytes = config.memory.slots, slot_bytes_for(image_bytes)
    _check_quota(pipeline, config, job, slots * slot_bytes)
    known = pipeline.state.jobs.get(job)
    generation = known.next_generation(rank) if known is not None else 1
    reserve = functools.partial(pipeline.memory.reserve, job, rank, generation, slots, slot_bytes)
    return await asyncio.get_running_loop().run_in_executor(pipeline.workers, reserve)


def reserved_event(arena: ArenaFile) -> events.ArenaReserved:
    """What the agent's state is told of an arena."""
    return events.ArenaReserved(
        arena.job, arena.rank, arena.generation, arena.slot_bytes, arena.slot_count
    )


def slot_bytes_for(image_bytes: int) -> int:
    """The size of a slot for such images."""
    return max(1, -(-image_bytes // _ROUND_BYTES)) * _ROUND_BYTES


def _check_quota(pipeline: Pipeline, config: Config, name: str, more_bytes: int) -> None:
    quota = config.memory.quota_bytes
    job = pipeline.state.jobs.get(name)
    arenas = job.arenas if job is not None else {}
    held = sum(a.slot_bytes * a.slot_count for listed in arenas.values() for a in listed)
    if quota and held + more_bytes > quota:
        advice = "Raise memory.quota_bytes, or free an old job with `everstep gc --job NAME --all`."
        raise OutOfSpace(f"the quota of job {name!r}", more_bytes, quota - held, advice)
