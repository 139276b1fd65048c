"""Reserving a rank's arena for a layout.

Owns the decision whether the arena that is there will do, and the reservation of a larger one.
Promises that memory is really there when it answers (no late SIGBUS), that a refusal leaves the
present arena and its snapshots as they were, and that quotas hold. A rank with several captures
under way gets more slots where `memory.slots` is automatic and all ranks of this node can have as
many; fewer otherwise, down to what a rank with one capture gets.
"""

import asyncio
import contextlib
import functools
import os
from weakref import WeakKeyDictionary

from everstep.agent import events
from everstep.agent.config import MAX_SLOTS, Config
from everstep.agent.pipeline import Pipeline
from everstep.proto.errors import ArenaLost, FormatInvalid, OutOfSpace
from everstep.snapshot.layout import decode
from everstep.storage.arena import ArenaFile
from everstep.storage.headroom import available_memory_bytes

_ROUND_BYTES = 64 * 1024
_BESIDE_CAPTURES = 2
"""Slots beside those in flight: the newest committed, and one that is flushed or encoded."""
MAX_CAPTURES = MAX_SLOTS - _BESIDE_CAPTURES
_LOCKS: "WeakKeyDictionary[Pipeline, dict[tuple[str, int], asyncio.Lock]]" = WeakKeyDictionary()


async def reserve_arena(
    pipeline: Pipeline,
    config: Config,
    caller: events.Caller,
    layout: bytes,
    layout_id: str,
    captures: int = 1,
) -> ArenaFile:
    """The arena that a rank may write images of this layout into.

    Args:
        pipeline: With the job's state and the memory level.
        config: The agent's.
        caller: The rank.
        layout: As `snapshot.layout.encode` has it.
        layout_id: What the layout says it is.
        captures: How many snapshots the rank copies at once.

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
        listed = pipeline.state.jobs[caller.job].arenas.get(caller.rank, [])
        least, wanted = config.memory.slots, slots_for(config, captures)
        fits = listed and listed[-1].slot_bytes >= slot_bytes_for(declared.image_bytes)
        held = listed[-1].slot_count if fits else 0
        slots = wanted
        if held != wanted and wanted > least:
            most = _most_slots(pipeline, config, caller, wanted, declared.image_bytes)
            slots = max(least, most)
        if held == wanted or least <= slots <= held < wanted:
            return pipeline.arena_file(caller.job, caller.rank, listed[-1].generation)
        arena = await _reserved(pipeline, config, caller, declared.image_bytes, slots)
        pipeline.submit(reserved_event(arena))
        return arena


async def _reserved(
    pipeline: Pipeline, config: Config, caller: events.Caller, image_bytes: int, slots: int
) -> ArenaFile:
    with contextlib.suppress(OutOfSpace):
        if slots > config.memory.slots:  # others may have been quicker
            return await new_arena(pipeline, config, caller.job, caller.rank, image_bytes, slots)
    return await new_arena(pipeline, config, caller.job, caller.rank, image_bytes)


def slots_for(config: Config, captures: int) -> int:
    """How many slots a rank with so many captures at once should have."""
    if captures <= 1 or not config.slots_automatic:
        return config.memory.slots
    return max(config.memory.slots, min(MAX_SLOTS, _BESIDE_CAPTURES + captures))


def _most_slots(
    pipeline: Pipeline, config: Config, caller: events.Caller, wanted: int, image_bytes: int
) -> int:
    """How many slots all ranks of this node can have that have none of that size yet."""
    job, slot_bytes = pipeline.state.jobs[caller.job], slot_bytes_for(image_bytes)
    ranks = set(job.members) if pipeline.state.rules.clustered else set(range(job.world))
    served = {
        rank
        for rank, listed in job.arenas.items()
        if listed[-1].slot_bytes >= slot_bytes and listed[-1].slot_count >= config.memory.slots
    }
    space = os.statvfs(config.agent.memory_dir)
    rooms = [
        space.f_bavail * space.f_frsize,
        available_memory_bytes() - config.memory.keep_free_bytes,
    ]
    if config.memory.quota_bytes:
        rooms.append(config.memory.quota_bytes - _held_bytes(pipeline, caller.job))
    waiting = len((ranks - served) | {caller.rank})
    return min(wanted, max(0, min(rooms)) // (slot_bytes * waiting))


def arena_lock(pipeline: Pipeline, job: str, rank: int) -> asyncio.Lock:
    """Held by whoever reserves a rank's arena until the agent's state knows of it: two must not
    be given the same generation."""
    locks = _LOCKS.setdefault(pipeline, {})
    return locks.setdefault((job, rank), asyncio.Lock())


async def new_arena(
    pipeline: Pipeline,
    config: Config,
    job: str,
    rank: int,
    image_bytes: int,
    slots: int | None = None,
) -> ArenaFile:
    """Reserve one more arena for a rank, of `memory.slots` if `slots` is not given. The caller
    holds `arena_lock`.

    Raises:
        OutOfSpace: If tmpfs, memory or the job's quota do not allow it.
    """
    slots, slot_bytes = slots or config.memory.slots, slot_bytes_for(image_bytes)
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
    held = _held_bytes(pipeline, name)
    if quota and held + more_bytes > quota:
        advice = "Raise memory.quota_bytes, or free an old job with `everstep gc --job NAME --all`."
        raise OutOfSpace(f"the quota of job {name!r}", more_bytes, quota - held, advice)


def _held_bytes(pipeline: Pipeline, name: str) -> int:
    job = pipeline.state.jobs.get(name)
    arenas = job.arenas if job is not None else {}
    return sum(a.slot_bytes * a.slot_count for listed in arenas.values() for a in listed)
