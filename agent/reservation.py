"""Reserving a rank's arena for a layout.

Owns the decision whether the arena that is there will do, and the reservation of a larger one.
Promises that memory is really there when it answers (no late SIGBUS), that a refusal leaves the
present arena and its snapshots as they were, and that quotas hold.
"""

import asyncio
import contextlib

from everstep.agent import events
from everstep.agent.config import Config
from everstep.agent.pipeline import Pipeline
from everstep.proto.errors import ArenaLost, FormatInvalid, OutOfSpace
from everstep.snapshot.layout import decode
from everstep.storage.arena import ArenaFile

_ROUND_BYTES = 64 * 1024


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
    pipeline.state.check(caller)
    with contextlib.suppress(ArenaLost):
        pipeline.check_arena(caller.job, caller.rank)
    loop = asyncio.get_running_loop()
    workers = pipeline.workers
    await loop.run_in_executor(workers, pipeline.memory.put_layout, caller.job, layout_id, layout)
    job = pipeline.state.jobs[caller.job]
    needed_bytes = -(-declared.image_bytes // _ROUND_BYTES) * _ROUND_BYTES
    present = job.arenas.get(caller.rank, [])
    slots = config.memory.slots
    if present and present[-1].slot_bytes >= needed_bytes and present[-1].slot_count == slots:
        return pipeline.arena_file(caller.job, caller.rank, present[-1].generation)
    _check_quota(pipeline, config, caller, needed_bytes * slots)
    generation = job.next_generation(caller.rank)
    arena = await loop.run_in_executor(
        workers,
        lambda: pipeline.memory.reserve(caller.job, caller.rank, generation, slots, needed_bytes),
    )
    pipeline.submit(events.ArenaReserved(caller.job, caller.rank, generation, needed_bytes, slots))
    return arena


def _check_quota(
    pipeline: Pipeline, config: Config, caller: events.Caller, more_bytes: int
) -> None:
    quota = config.memory.quota_bytes
    job = pipeline.state.jobs[caller.job]
    held = sum(a.slot_bytes * a.slot_count for arenas in job.arenas.values() for a in arenas)
    if quota and held + more_bytes > quota:
        advice = "Raise memory.quota_bytes, or free an old job with `everstep gc --job NAME --all`."
        raise OutOfSpace(f"the quota of job {caller.job!r}", more_bytes, quota - held, advice)
