"""Ranks that wait until their group has agreed: each wait ends, and says who was late."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from everstep.agent.agreeing import Agreeing, participants_of
from everstep.agent.agreements import Agreements
from everstep.agent.events import Caller, Declare
from everstep.proto.errors import DeadlineExceeded, FormatInvalid, Refused

WORLD = 4
PATIENT_S, IMPATIENT_S = 20.0, 0.05
Answer = Coroutine[Any, Any, tuple[int, ...]]


class Service:
    """One agent's answers to `Declare`."""

    def __init__(self) -> None:
        self.agreeing = Agreeing()
        self.known = Agreements()

    def asks(
        self,
        rank: int,
        number: int,
        *participants: int,
        digests: str = "xy",
        timeout_s: float = PATIENT_S,
        incarnation: int = 1,
    ) -> Answer:
        caller = Caller("job", rank, WORLD, f"process-{rank}", incarnation)
        said = tuple(digest.encode() for digest in digests)
        event = Declare(caller, number, ("a", "b"), said, participants)
        return self.agreeing.agree(
            event,
            lambda: self.known.declare(event, WORLD),
            timeout_s,
            lambda: self.known.undeclared(participants, number, WORLD),
        )


def together(story: Callable[[Service], Coroutine[Any, Any, None]]) -> None:
    service = Service()

    async def bounded() -> None:
        async with asyncio.timeout(PATIENT_S / 2):
            await story(service)

    asyncio.run(bounded())
    assert not service.agreeing._rounds, "nothing is kept of waits that have ended"


async def begun(*answers: Answer) -> list[asyncio.Task[tuple[int, ...]]]:
    """Calls that have been taken note of, in this order."""
    tasks = [asyncio.ensure_future(answer) for answer in answers]
    await asyncio.sleep(0)
    return tasks


def test_all_ranks_of_a_group_hear_the_same() -> None:
    async def story(service: Service) -> None:
        tasks = await begun(service.asks(0, 5, 0, 2), service.asks(1, 5, 1, 3))
        assert await service.asks(2, 5, 0, 2, digests="xq") == (0,)
        assert await tasks[0] == (0,)
        assert not tasks[1].done()
        assert await service.asks(3, 5, 1, 3) == (0, 1)
        assert await tasks[1] == (0, 1)
        # One that did not get the answer asks again.
        assert await service.asks(0, 5, 0, 2) == (0,)

    together(story)


def test_the_ranks_of_the_group_that_are_late_are_named() -> None:
    async def story(service: Service) -> None:
        tasks = await begun(service.asks(0, 5, 0, 2, 3), service.asks(1, 5), service.asks(3, 5))
        with pytest.raises(DeadlineExceeded) as caught:
            await service.asks(3, 5, 0, 2, 3, timeout_s=IMPATIENT_S)
        assert caught.value.late == ("rank 2",)
        with pytest.raises(DeadlineExceeded) as caught:
            await service.asks(0, 5, timeout_s=IMPATIENT_S)
        assert caught.value.late == ("rank 2",)
        assert await service.asks(2, 5, 0, 2, 3) == (0, 1), "who is patient is not disturbed"
        assert await tasks[0] == (0, 1)
        assert await service.asks(2, 5) == (0, 1)
        assert [await task for task in tasks[1:]] == [(0, 1)] * 2

    together(story)


def test_nobody_waits_for_a_round_that_its_group_is_past() -> None:
    async def story(service: Service) -> None:
        old, other = await begun(service.asks(0, 5, 0, 1), service.asks(0, 5, 0, 2))
        (new,) = await begun(service.asks(1, 6, 0, 1))
        with pytest.raises(Refused, match="step 5 any more"):
            await old
        with pytest.raises(Refused, match="step 5 any more"):
            await service.asks(0, 5, 0, 1)
        assert not new.done()
        assert await service.asks(0, 6, 0, 1) == (0, 1)
        assert await new == (0, 1)
        assert await service.asks(2, 5, 0, 2) == (0, 1), "another group has its own rounds"
        assert await other == (0, 1)

    together(story)


def test_an_older_incarnation_is_past_whatever_its_step() -> None:
    async def story(service: Service) -> None:
        (old,) = await begun(service.asks(0, 9, 0, 1))
        service.known.clear()
        (new,) = await begun(service.asks(0, 3, 0, 1, incarnation=2))
        with pytest.raises(Refused):
            await old
        assert await service.asks(1, 3, 0, 1, incarnation=2) == (0, 1)
        assert await new == (0, 1)

    together(story)


def test_a_call_that_is_given_up_leaves_nothing() -> None:
    async def story(service: Service) -> None:
        (task,) = await begun(service.asks(0, 5, 0, 1))
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()

    together(story)


def test_a_declaration_that_is_refused_leaves_nothing() -> None:
    async def story(service: Service) -> None:
        def refuse() -> None:
            raise Refused("no")

        event = Declare(Caller("job", 0, WORLD, "p", 1), 5, (), ())
        with pytest.raises(Refused, match="no"):
            await service.agreeing.agree(event, refuse, PATIENT_S, tuple)

    together(story)


def test_the_participants_that_may_be() -> None:
    caller = Caller("job", 2, WORLD, "p", 1)
    assert participants_of([], caller) == ()
    assert participants_of([2], caller) == (2,)
    assert participants_of([0, 2], caller) == (0, 2)
    assert participants_of(range(WORLD), caller) == (), "all ranks are one group, however named"


@pytest.mark.parametrize(
    "sent",
    [(0, 1), (2, 0), (0, 2, 2), (2, 4), (0, 2, 1 << 31), (3, 2, 1, 0), (0, 0, 2, 3), (1,)],
)
def test_participants_that_cannot_be(sent: tuple[int, ...]) -> None:
    with pytest.raises(FormatInvalid):
        participants_of(sent, Caller("job", 2, WORLD, "p", 1))
