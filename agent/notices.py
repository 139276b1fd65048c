"""What trainers are told without asking: commits and drops.

Owns one bounded queue for each open session. Promises that a session hears of events in order;
a session that does not read loses its oldest notices, never the agent its memory: a trainer
learns the newest commit of each level again when it attaches anew.
"""

import asyncio

from everstep.proto.agent_pb2 import Committed, Dropped, Notice
from everstep.proto.ids import SnapshotId

QUEUE_LIMIT = 256


class Notices:
    """All open sessions of this agent."""

    def __init__(self) -> None:
        self._queues: dict[str, dict[int, asyncio.Queue[Notice]]] = {}

    def subscribe(self, job: str, rank: int) -> asyncio.Queue[Notice]:
        """Start a session's queue; an older one of the same rank hears nothing any more."""
        queue: asyncio.Queue[Notice] = asyncio.Queue(QUEUE_LIMIT)
        self._queues.setdefault(job, {})[rank] = queue
        return queue

    def unsubscribe(self, job: str, rank: int, queue: asyncio.Queue[Notice]) -> bool:
        """End a session's queue; say whether it was still the rank's present one."""
        queues = self._queues.get(job, {})
        present = queues.get(rank) is queue
        if present:
            del queues[rank]
        return present

    def committed(self, job: str, snapshot: SnapshotId, level: str) -> None:
        """A snapshot is committed at a level."""
        body = Committed(incarnation=snapshot.incarnation, step=snapshot.step, level=level)
        self._send(job, Notice(committed=body))

    def dropped(
        self, job: str, snapshot: SnapshotId, reason: str, drifted: tuple[int, ...]
    ) -> None:
        """A snapshot will never commit."""
        body = Dropped(
            incarnation=snapshot.incarnation, step=snapshot.step, reason=reason, drifted=drifted
        )
        self._send(job, Notice(dropped=body))

    def _send(self, job: str, notice: Notice) -> None:
        for queue in self._queues.get(job, {}).values():
            if queue.full():
                queue.get_nowait()
            queue.put_nowait(notice)
