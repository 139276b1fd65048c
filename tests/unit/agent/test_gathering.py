"""Who is asked what it holds, and for how long."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from everstep.agent.gathering import Gathering
from everstep.proto import peer_pb2
from everstep.proto.errors import PeerUnavailable, StaleEpoch


class Nodes:
    """Two members; n2 refuses so many calls, or all."""

    def __init__(self, refusal: Exception, refusals: int, live: tuple[str, ...]) -> None:
        rules = SimpleNamespace(suspect_after_s=0.2, heartbeat_s=0.01)
        entries = [SimpleNamespace(node_id=node_id) for node_id in ("n1", "n2")]
        view = SimpleNamespace(members=lambda: entries)
        self.node = SimpleNamespace(members=SimpleNamespace(rules=rules, view=view))
        self.refusal = refusal
        self.left = refusals
        self._live = live

    def live(self) -> tuple[str, ...]:
        return self._live

    async def call(self, node_id: str, method: str, request: Any, timeout_s: float) -> Any:
        if node_id == "n2" and self.left:
            self.left -= 1
            raise self.refusal
        return peer_pb2.InventoryReply(node_id=node_id)


def silent(nodes: Nodes) -> tuple[str, ...]:
    gathering = Gathering(nodes, timeout_s=1.0)  # type: ignore[arg-type]
    return asyncio.run(gathering.gather("job")).silent


@pytest.mark.parametrize("refusal", [StaleEpoch("n1", 1, 2), PeerUnavailable("n2", "refused")])
def test_a_live_node_that_does_not_know_us_yet_is_asked_again(refusal: Exception) -> None:
    assert silent(Nodes(refusal, 3, ("n1", "n2"))) == ()


def test_a_node_that_never_answers_is_named_in_the_end() -> None:
    nodes = Nodes(PeerUnavailable("n2", "refused"), 1 << 30, ("n1", "n2"))
    assert silent(nodes) == ("n2",)


def test_a_suspected_node_is_not_asked() -> None:
    nodes = Nodes(PeerUnavailable("n2", "refused"), 5, ("n1",))
    assert silent(nodes) == ("n2",)
    assert nodes.left == 5
