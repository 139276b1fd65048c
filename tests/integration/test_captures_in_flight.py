"""Several snapshots of one rank under way at once."""

import threading
from collections.abc import Callable
from typing import Any

import pytest

import everstep
from everstep.proto.errors import Refused

from .conftest import AgentProcess, Hold, eventually
from .runs import Connect, Objects, make, one_step, restored
from .states import states

HoldPoint = Callable[..., Hold]


@pytest.fixture
def trained() -> Objects:
    objects = make()
    one_step(objects)
    return objects


def in_thread(action: Callable[[], Any]) -> tuple[threading.Thread, threading.Event]:
    finished = threading.Event()

    def run() -> None:
        action()
        finished.set()

    thread = threading.Thread(target=run)
    thread.start()
    return thread, finished


def test_a_second_snapshot_begins_while_the_first_is_not_sealed(
    connect: Connect, hold: HoldPoint, trained: Objects
) -> None:
    client = connect(captures_in_flight=2)
    client.attach(**trained)
    point = hold("client.seal.before")
    first = client.snapshot(1)
    point.reached()
    one_step(trained)
    before = states(trained)
    second = client.snapshot(2)
    one_step(trained)
    third = client.snapshot(3)
    assert (first.state, second.state) == ("copying", "copying")
    assert third.skipped == "busy: step 1 is still being copied"
    point.open()
    assert first.wait() and second.wait()
    assert client.stats.committed == 2
    assert client.snapshot(4).wait()
    assert client.rewind(2) == 2
    assert states(trained) == before


def test_seals_are_in_order(connect: Connect, hold: HoldPoint, trained: Objects) -> None:
    """The agent drops what is older and open when it commits: the newer one waits."""
    client = connect(captures_in_flight=2)
    client.attach(**trained)
    point = hold()
    first = client.snapshot(1)
    point.reached()
    second = client.snapshot(2)
    newer = client._capturing._works.under_way()[1]
    eventually(newer.capture.done.is_set, "the copy of step 2")
    assert not newer.ended.wait(0.3)
    point.open()
    assert first.wait(), first
    assert second.wait(), second
    assert client.stats.dropped == 0


def test_the_fence_completes_all_of_them(
    connect: Connect, hold: HoldPoint, trained: Objects
) -> None:
    client = connect(captures_in_flight=2)
    client.attach(**trained)
    before = states(trained)
    point = hold()
    first = client.snapshot(1)
    point.reached()
    second = client.snapshot(2)
    thread, finished = in_thread(lambda: one_step(trained))
    assert not finished.wait(0.3)
    assert states(trained) == before
    point.open()
    thread.join(60)
    assert first.wait() and second.wait()
    assert client.stats.dropped == 0
    assert restored(connect, make(2), 2) == before


def test_who_waits_waits_for_the_oldest_alone(
    connect: Connect, hold: HoldPoint, trained: Objects
) -> None:
    client = connect(captures_in_flight=2, on_busy="wait")
    client.attach(**trained)
    older = hold("client.seal.before")
    first = client.snapshot(1)
    older.reached()
    second = client.snapshot(2)
    seen: list[everstep.Snapshot] = []
    thread, finished = in_thread(lambda: seen.append(client.snapshot(3)))
    assert not finished.wait(0.3)
    newer = hold("client.seal.before")
    older.open()
    newer.reached()  # step 2 is not sealed yet, and step 3 is taken all the same
    thread.join(60)
    assert first.wait()
    assert second.state == "copying"
    newer.open()
    assert second.wait() and seen[0].wait(), seen
    assert client.stats.skipped == {}


def test_the_agent_comes_back_to_two_captures(
    agent_process: AgentProcess, connect: Connect, hold: HoldPoint, trained: Objects
) -> None:
    client = connect(captures_in_flight=2, agent=agent_process.address)
    client.attach(**trained)
    assert client.snapshot(1).wait()
    point = hold("client.seal.before")
    first = client.snapshot(2)
    point.reached()
    second = client.snapshot(3)
    agent_process.restart()
    eventually(lambda: client._session.attached, "the session")
    point.open()
    assert first.wait() and second.wait()
    assert agent_process.steps_in_memory(client.job)[-2:] == [2, 3]
    assert client.snapshot(4).wait()


def test_one_that_is_dropped_does_not_cost_the_next(
    connect: Connect, hold: HoldPoint, trained: Objects
) -> None:
    client = connect(captures_in_flight=2)
    client.attach(**trained)
    assert client.snapshot(1).wait()
    one_step(trained)
    point = hold()
    torn = client.snapshot(2)
    point.reached()
    trained["model"][0].weight.data.add_(1)
    before = states(trained)
    sound = client.snapshot(3)
    point.open()
    assert not torn.wait()
    assert "changed" in torn.dropped
    assert sound.wait(), sound
    assert restored(connect, make(2), 3) == before


def test_a_new_layout_waits_for_the_captures_under_way(
    connect: Connect, hold: HoldPoint, trained: Objects
) -> None:
    """The arena goes with it, and they write to it."""
    more: dict[str, Any] = {"count": 1}
    client = connect(captures_in_flight=2)
    client.attach(**trained, more=more)
    point = hold()
    first = client.snapshot(1)
    point.reached()
    more["moments"] = trained["model"][0].weight.detach().clone()
    seen: list[everstep.Snapshot] = []
    thread, finished = in_thread(lambda: seen.append(client.snapshot(2)))
    assert not finished.wait(0.3)
    point.open()
    thread.join(60)
    assert first.wait(), first
    assert seen[0].wait(), seen


@pytest.mark.parametrize(
    ("options", "captures", "slots"),
    [("", 1, 2), ("", 2, 4), ("", 6, 8), ("[memory]\nslots = 3\n", 2, 3)],
    ids=["one", "two", "six", "as the file says"],
)
def test_slots_for_captures(
    start_agent: Callable[..., AgentProcess],
    connect: Connect,
    trained: Objects,
    options: str,
    captures: int,
    slots: int,
) -> None:
    agent = start_agent(options)
    client = connect(captures_in_flight=captures, agent=agent.address)
    client.attach(**trained)
    assert client.snapshot(1).wait()
    (arena,) = agent.memory.arenas(client.job)
    assert arena.slot_count == slots


def test_fewer_slots_where_there_is_no_room(
    start_agent: Callable[..., AgentProcess], connect: Connect, trained: Objects
) -> None:
    """Two at least: with those, one snapshot is copied at a time."""
    agent = start_agent('[memory]\nquota_bytes = "1 MiB"\n')
    client = connect(captures_in_flight=4, agent=agent.address)
    client.attach(**trained)
    assert client.snapshot(1).wait()
    (arena,) = agent.memory.arenas(client.job)
    assert arena.slot_count * arena.slot_bytes <= 1 << 20
    assert arena.slot_count == min(6, (1 << 20) // arena.slot_bytes)
    assert 2 <= arena.slot_count < 6
    client.close(timeout=0)
    client = connect(captures_in_flight=4, agent=agent.address)
    client.attach(**trained)
    assert client.restore() == 1
    assert client.snapshot(2).wait()
    assert agent.memory.arenas(client.job) == [arena], "it is taken as it is"


def test_a_client_that_comes_with_more_captures_gets_more_slots(
    start_agent: Callable[..., AgentProcess], connect: Connect, trained: Objects
) -> None:
    agent = start_agent()
    for captures, step in ((1, 1), (2, 2), (1, 3)):
        client = connect(captures_in_flight=captures, agent=agent.address)
        client.attach(**trained)
        assert client.restore() == (step - 1 or None)
        assert client.snapshot(step).wait()
        assert agent.memory.arenas(client.job)[-1].slot_count == (2 if captures == 1 else 4)
        client.close(timeout=0)


@pytest.mark.parametrize(
    "wrong",
    [
        {"captures_in_flight": 0},
        {"captures_in_flight": 7},
        {"scratch_bytes": -1},
        {"digests": "none"},
    ],
    ids=str,
)
def test_options_are_checked(connect: Connect, wrong: dict[str, Any]) -> None:
    with pytest.raises(Refused, match=next(iter(wrong))):
        connect(**wrong)
