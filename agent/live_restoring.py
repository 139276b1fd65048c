"""A restore for a rank that joins while the others go on: what they have committed, at their cost
no faster than allowed.

Owns the repetition: the others go on committing, so what was decided may be overwritten, or lost
with a node, while it is brought here. Promises that a rank is given one snapshot of the running
incarnation, whole, or what all its ranks begin with if it has committed none; that nothing is
decided for anybody else; and that it ends: a bounded number of snapshots is tried.
"""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable

from everstep.agent import events
from everstep.agent.job import Job
from everstep.agent.recovery import Wanted
from everstep.agent.restoring import Restoring
from everstep.proto.agent_pb2 import RestoreReply
from everstep.proto.errors import Damaged, EverstepError, NothingRecoverable, PeerUnavailable
from everstep.proto.failpoint import failpoint

log = logging.getLogger("everstep.agent")
_ATTEMPTS = 4
_AGAIN_S = 0.2


class LiveRestoring(Restoring):
    """All restores of this node's trainers that have joined live."""

    async def _restore(self, job: Job, rank: int, wanted: Wanted) -> RestoreReply:
        incarnation = job.incarnation
        problem: EverstepError | None = None
        for _ in range(_ATTEMPTS):
            decided, plan = await self._decided(job, wanted, live=True)
            if plan is None:
                return await super()._restore(job, rank, wanted)
            pinned = events.JoinDecided(job.name, rank, incarnation, plan.snapshot)
            self._pipeline.submit(pinned)
            failpoint("agent.join.decided")
            self._remember(job, decided, plan)
            try:
                return await self._found(job, rank, decided, plan)
            except NothingRecoverable:
                raise
            except (Damaged, PeerUnavailable) as error:
                log.warning("job %s: %s, for rank %d: %s", job.name, plan.snapshot, rank, error)
                problem = error
            await asyncio.sleep(_AGAIN_S)
        assert problem is not None
        raise problem

    async def _once(self, job: Job, what: object, work: Callable[[], Awaitable[object]]) -> object:
        """Shared while it is under way only: a rank may join again, and nothing may be left."""
        try:
            return await super()._once(job, what, work)
        finally:
            key = (job.name, job.incarnation, what)
            task = self._under_way.get(key)
            if task is not None and task.done():
                with contextlib.suppress(KeyError):
                    del self._under_way[key]
