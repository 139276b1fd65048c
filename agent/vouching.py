"""What the members of a parity plan say that their shards are, before a byte of them is fetched.

Owns asking all members at once for the records and layouts of their shards. Promises that a record
which is returned is the one that the plan names, byte for byte, and that the layouts they need are
in this node's memory then: parity is of no use to anybody without them. What goes wrong names the
member. Layouts are known by their digest and not looked into.
"""

import asyncio
from collections.abc import Mapping

from everstep.agent.calling import Calls
from everstep.agent.describing import check_record
from everstep.agent.plans import ParityPlan, PlannedMember
from everstep.proto import peer_pb2
from everstep.proto.errors import EverstepError, FormatInvalid
from everstep.proto.ids import UNIT_BYTES
from everstep.snapshot.record import open_record, record_digest
from everstep.storage.arena import MemoryLevel

_RANKS_A_CALL = 8
"""Records have 16 bytes a unit, layouts a few hundred a leaf: messages stay within their limit."""


class Undelivered(Exception):
    """A member did not do its part; the text names it. Does not leave the encoding."""


async def vouched(
    calls: Calls, plan: ParityPlan, memory: MemoryLevel, *, at_once: int, timeout_s: float
) -> dict[int, bytes]:
    """The envelopes of the records of all shards of the plan, by rank.

    Args:
        calls: To the members, this node among them.
        plan: The plan.
        memory: Takes the layouts.
        at_once: How many members are asked at one time.
        timeout_s: For each answer.

    Raises:
        Undelivered: If a member does not answer, or says something else than the plan.
    """
    free = asyncio.Semaphore(at_once)
    asked = [
        asyncio.ensure_future(_ask(calls, plan, member, memory, free, timeout_s))
        for member in plan.members
        if member.shards
    ]
    try:
        found: dict[int, bytes] = {}
        for envelopes in await asyncio.gather(*asked):
            found |= envelopes
        return found
    finally:
        for one in asked:
            one.cancel()
        await asyncio.gather(*asked, return_exceptions=True)


async def _ask(
    calls: Calls,
    plan: ParityPlan,
    member: PlannedMember,
    memory: MemoryLevel,
    free: asyncio.Semaphore,
    timeout_s: float,
) -> dict[int, bytes]:
    ranks = [shard.rank for shard in member.shards]
    found: dict[int, bytes] = {}
    try:
        async with free:
            for first in range(0, len(ranks), _RANKS_A_CALL):
                request = peer_pb2.DescribeRequest(
                    job=plan.job,
                    incarnation=plan.snapshot.incarnation,
                    step=plan.snapshot.step,
                    ranks=ranks[first : first + _RANKS_A_CALL],
                )
                reply = await calls.call(member.node_id, "Describe", request, timeout_s)
                found |= await asyncio.to_thread(_checked, plan, member, request, reply, memory)
    except (EverstepError, OSError, TimeoutError) as error:
        raise Undelivered(named(member.node_id, error)) from None
    return found


def _checked(
    plan: ParityPlan,
    member: PlannedMember,
    request: peer_pb2.DescribeRequest,
    reply: peer_pb2.DescribeReply,
    memory: MemoryLevel,
) -> dict[int, bytes]:
    described = {shard.rank: shard for shard in reply.shards}
    layouts: dict[str, bytes] = {}
    for shard in member.shards:
        if shard.rank not in request.ranks:
            continue
        where = f"the record of rank {shard.rank} of {plan.snapshot}"
        if shard.rank not in described:
            raise FormatInvalid(where, "it is not there any more")
        envelope = described[shard.rank].record
        record = open_record(envelope, where)
        if record_digest(envelope) != shard.record_digest:
            raise FormatInvalid(where, "it is another one than the plan names")
        check_record(record, plan.job, plan.snapshot, shard.rank, where)
        facts = (record.world, record.image_bytes, record.layout_id, record.unit_bytes)
        if facts != (plan.world, shard.image_bytes, shard.layout_id, UNIT_BYTES):
            raise FormatInvalid(where, "it contradicts the plan")
        layouts[shard.layout_id] = described[shard.rank].layout
    _keep(plan.job, layouts, memory)
    return {rank: described[rank].record for rank in request.ranks}


def _keep(job: str, layouts: Mapping[str, bytes], memory: MemoryLevel) -> None:
    for layout_id, envelope in layouts.items():
        if not envelope:
            raise FormatInvalid(f"layout {layout_id}", "it is not there any more")
        memory.put_layout(job, layout_id, envelope)


def named(node_id: str, error: Exception) -> str:
    """What went wrong at a member, in words that name it."""
    return f"{node_id}: {error or type(error).__name__}"
