"""The captures that are under way in this process, oldest first.

Owns the list and the waits for those on it. Promises that each wait is bounded as a whole, however
many captures there are, and that a capture is on the list until the agent's answer to its seal (or
its failure) is known: by then its slot's memory is let go of. Says nothing of how one is carried
out: see `client.capturing`.
"""

import threading
import time
from dataclasses import dataclass, field
from typing import Any

from everstep.client.arrangement import Arrangement
from everstep.client.handle import Snapshot
from everstep.proto import agent_pb2 as wire
from everstep.proto.state_pb2 import Record
from everstep.snapshot.capture import Capture


@dataclass(slots=True)
class Work:
    """A capture under way."""

    handle: Snapshot
    capture: Capture
    arrangement: Arrangement
    record: Record
    generators: dict[str, Any]
    slot: int
    older: tuple[threading.Event, ...] = ()
    """The ends of those that were begun before it and had not ended."""
    ended: threading.Event = field(default_factory=threading.Event)

    def in_flight(self) -> wire.InFlight:
        """As the agent is told of it."""
        generation = self.arrangement.arena.generation
        return wire.InFlight(step=self.handle.step, slot=self.slot, generation=generation)


class Works:
    """Captures under way. One thread adds to them; any may look."""

    def __init__(self) -> None:
        self._listed: tuple[Work, ...] = ()

    def under_way(self) -> tuple[Work, ...]:
        """Those that have not ended, oldest first."""
        return tuple(work for work in self._listed if not work.ended.is_set())

    def add(self, work: Work) -> None:
        """One more, newer than the others."""
        before = self.under_way()
        work.older = tuple(older.ended for older in before)
        self._listed = (*before, work)

    def clear(self) -> None:
        """Ask after none of them any more."""
        self._listed = ()


def finish(works: tuple[Work, ...], timeout_s: float) -> None:
    """Copy what is left of each, oldest first, on the calling thread."""
    deadline = time.monotonic() + timeout_s
    for work in works:
        if not work.ended.is_set():
            work.capture.finish(max(0.0, deadline - time.monotonic()))


def await_ends(ends: tuple[threading.Event, ...], timeout_s: float) -> bool:
    """Wait, bounded, until all have ended; return whether they have."""
    deadline = time.monotonic() + timeout_s
    return all(end.wait(max(0.0, deadline - time.monotonic())) for end in ends)
