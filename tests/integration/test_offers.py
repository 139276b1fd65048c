"""A slot is asked for at the agent's own socket, and by gRPC where that is not possible."""

from collections.abc import Callable
from typing import Any

import pytest

import everstep
from everstep.client.channel import Channel
from everstep.proto.places import offers_socket

from .conftest import AgentProcess, eventually
from .runs import make, one_step

Connect = Callable[..., everstep.Client]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The calls that were begun while a training thread waited."""
    found: list[str] = []
    start = Channel.start

    def noted(channel: Channel, method: str, *rest: Any) -> Any:
        found.append(method)
        return start(channel, method, *rest)

    monkeypatch.setattr(Channel, "start", noted)
    return found


def test_a_training_thread_does_not_wait_for_grpc(
    agent_process: AgentProcess, connect: Connect, calls: list[str]
) -> None:
    client = connect(agent=agent_process.address)
    objects = make()
    client.attach(**objects)
    for step in (1, 2, 3):
        one_step(objects)
        assert client.snapshot(step).wait()
    path = offers_socket(agent_process.socket)
    assert path.is_socket() and path.parent.stat().st_mode & 0o777 == 0o700
    agent_process.kill()
    agent_process.start()
    eventually(lambda: client._session.attached, "the client's return")
    one_step(objects)
    assert client.snapshot(4).wait()
    assert calls == []


def test_without_the_socket_it_asks_by_grpc(
    agent_process: AgentProcess, connect: Connect, calls: list[str]
) -> None:
    offers_socket(agent_process.socket).unlink()
    client = connect(agent=agent_process.address)
    objects = make()
    client.attach(**objects)
    for step in (1, 2):
        one_step(objects)
        assert client.snapshot(step).wait()
    assert calls == ["Offer", "Offer"]
