"""A larger arena that a trainer did not hear of: its slots are not those of the older one."""

from collections.abc import Callable

import torch

import everstep
from everstep.proto import agent_pb2 as wire
from everstep.snapshot.layout import LeafSpec, encode, pack

from .conftest import AgentProcess


def reserve_unheard(client: everstep.Client, elements: int) -> None:
    """What a Declare leaves behind whose answer came too late."""
    spec = LeafSpec("state/x", "float32", (elements,), 0, 4 * elements, False)
    layout = pack([], [spec], {}, {})
    request = wire.DeclareRequest(
        session=client._session.identity, layout=encode(layout), layout_id=layout.layout_id
    )
    assert client._channel.call("Declare", request, 30.0).generation == 2


def test_no_slot_of_the_older_arena_is_written(
    shared_agent: AgentProcess, connect: Callable[..., everstep.Client], job: str
) -> None:
    state = {"x": torch.zeros(1000)}
    client = connect()
    client.attach(state=state)
    assert client.restore() is None
    state["x"].fill_(1.0)
    assert client.snapshot(1).wait()
    reserve_unheard(client, 500_000)
    state["x"].fill_(2.0)
    second = client.snapshot(2)
    assert second.wait()
    assert [held.generation for held in shared_agent.memory.records(job)] == [2]

    state["x"].zero_()
    again = connect()
    again.attach(state=state)
    assert again.restore() == 2
    assert torch.equal(state["x"], torch.full((1000,), 2.0))


def test_the_commit_in_the_older_arena_stays_whole_until_then(
    shared_agent: AgentProcess, connect: Callable[..., everstep.Client], job: str
) -> None:
    state = {"x": torch.ones(1000)}
    client = connect()
    client.attach(state=state)
    client.restore()
    assert client.snapshot(1).wait()
    arena = shared_agent.memory.arenas(job)[0].path
    before = arena.read_bytes()
    # Kept open by this test: its bytes stay when the agent gives the file back.
    with arena.open("rb") as kept:
        reserve_unheard(client, 500_000)
        state["x"].fill_(2.0)
        assert client.snapshot(2).wait()
        kept.seek(0)
        assert kept.read() == before
