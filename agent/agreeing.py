"""Calls that wait until the ranks of a group have agreed on their replicas.

Owns the waiting only; what is agreed is decided by `agent.agreements`. Promises that every wait
ends: with the agreement, when the group has gone on to a newer round, or at its deadline, with the
names of the ranks that are late; and that nothing is kept of a wait that has ended.
"""

import asyncio
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from everstep.agent.agreements import Participants
from everstep.agent.events import Caller, Declare
from everstep.proto.errors import DeadlineExceeded, FormatInvalid, Refused

_Future = asyncio.Future[tuple[int, ...] | None]


def participants_of(sent: Sequence[int], caller: Caller) -> Participants:
    """The ranks of the group that a caller declares for; none for all ranks of the world.

    Raises:
        FormatInvalid: If they are not ascending ranks of its world, and itself one of them.
    """
    group = tuple(sent)
    if not group:
        return ()
    if any(one >= other for one, other in itertools.pairwise(group)):
        raise FormatInvalid("Declare", "its participants do not ascend")
    if group[-1] >= caller.world:
        raise FormatInvalid("Declare", f"rank {group[-1]} is not in a world of {caller.world}")
    if caller.rank not in group:
        raise FormatInvalid("Declare", f"rank {caller.rank} is not one of its participants")
    return group if len(group) < caller.world else ()


@dataclass(slots=True)
class _Round:
    """The calls that wait for one round of one group; ordered by incarnation first."""

    number: tuple[int, int]
    waiting: set[_Future] = field(default_factory=set)

    def end(self, agreed: tuple[int, ...] | None) -> None:
        """Answer them all; None: there is a newer round."""
        for future in self.waiting:
            if not future.done():
                future.set_result(agreed)


class Agreeing:
    """All groups of all jobs for which a call waits."""

    def __init__(self) -> None:
        self._rounds: dict[tuple[str, Participants], _Round] = {}

    async def agree(
        self,
        event: Declare,
        declare: Callable[[], tuple[int, ...] | None],
        timeout_s: float,
        undeclared: Callable[[], Sequence[int]],
    ) -> tuple[int, ...]:
        """Which candidates are equal on all ranks of the group.

        Args:
            event: What one of them says.
            declare: Takes note of it, as `Agreements.declare` does.
            timeout_s: How long to wait for the other ranks.
            undeclared: Who is late.

        Raises:
            DeadlineExceeded: If not all ranks declare in time.
            Refused: If others of the group have gone on to a newer round.
        """
        job = event.caller.job
        with self._waiting(event) as (known, future):
            equal = declare()
            if equal is not None:
                known.end(equal)
            try:
                async with asyncio.timeout(timeout_s):
                    agreed = await future
            except TimeoutError:
                late = tuple(f"rank {rank}" for rank in undeclared())
                raise DeadlineExceeded(f"comparing replicas of {job}", timeout_s, late) from None
        if agreed is None:
            raise Refused(
                f"the replicas of {job} are not compared at step {event.round} any more: other "
                "ranks have gone on. Nothing was changed; the next snapshot compares them again."
            )
        return agreed

    @contextmanager
    def _waiting(self, event: Declare) -> Iterator[tuple[_Round, _Future]]:
        key = event.caller.job, event.participants
        number = event.caller.incarnation, event.round
        future: _Future = asyncio.get_running_loop().create_future()
        known = self._rounds.get(key)
        if known is None or known.number < number:
            if known is not None:
                known.end(None)
            known = self._rounds[key] = _Round(number)
        elif known.number > number:
            known = _Round(number)
            future.set_result(None)
        known.waiting.add(future)
        try:
            yield known, future
        finally:
            known.waiting.discard(future)
            if not known.waiting and self._rounds.get(key) is known:
                del self._rounds[key]
