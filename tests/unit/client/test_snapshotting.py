"""Taking a snapshot of a state that cannot be stored, beside an agent that answers late."""

from types import SimpleNamespace
from typing import Any

import pytest

from everstep.client.attachment import Attachment
from everstep.client.limits import Limits
from everstep.client.snapshotting import Snapshotting
from everstep.proto import agent_pb2 as wire
from everstep.proto.errors import AgentUnavailable, NotCapturable
from everstep.snapshot.layout import Part


class Agent:
    """A channel to an agent that has not answered yet when the state is refused."""

    address = "unix:/nowhere/agent.sock"

    def __init__(self, problem: Exception | None) -> None:
        self.said: list[str] = []
        self._problem = problem

    def start(self, method: str, request: Any, timeout_s: float) -> "Agent":
        self.said.append(method)
        return self

    def result(self) -> wire.OfferReply:
        self.said.append("answer")
        if self._problem is not None:
            raise self._problem
        return wire.OfferReply(granted=True)

    def call(self, method: str, request: Any, timeout_s: float) -> None:
        self.said.append(method)


@pytest.mark.parametrize("problem", [None, AgentUnavailable("unix:/gone", "gone")])
def test_a_slot_is_given_back_after_it_was_granted(problem: Exception | None) -> None:
    """Given back before, it would be granted afterwards, and the step stay open."""
    agent = Agent(problem)
    parts: Any = {
        "session": SimpleNamespace(ended=None, attached=True, identity=wire.Session()),
        "arranger": SimpleNamespace(is_arranged=True),
        "capturing": SimpleNamespace(
            under_way=lambda: None, in_flight=list, captures_in_flight=1, begun=True
        ),
    }
    channel: Any = agent
    snapshotting = Snapshotting(
        channel,
        limits=Limits(),
        patient=False,
        captures_in_flight=1,
        incremental=False,
        **parts,
    )
    tree = Attachment(Part("tree", "tree", "builtins.dict"), {"bad": object()})
    with pytest.raises(NotCapturable):
        snapshotting.take(1, {"tree": tree}, frozenset())
    assert agent.said == ["Offer", "answer", "Abandon"]
