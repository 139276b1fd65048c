"""Calls of other agents that are refused before they are made."""

import asyncio
from typing import Any

import grpc
import pytest

from everstep.agent.config import load
from everstep.agent.peers import Peers
from everstep.proto import peer_pb2 as wire
from everstep.proto.errors import EverstepError, PeerUnavailable, StaleEpoch
from everstep.proto.wire_errors import METADATA_KEY, encode, status_of

from .test_node import node


def refusal(error: EverstepError) -> grpc.aio.AioRpcError:
    """An error as it comes over the wire."""
    said = grpc.aio.Metadata((METADATA_KEY, encode(error)))
    return grpc.aio.AioRpcError(status_of(error), grpc.aio.Metadata(), said, str(error))


async def called(node_id: str, *, closed: bool, method: str = "call") -> Any:
    """Ask a peer, or say why it cannot be."""
    unused: Any = None
    config = load(None, {}, {"EVERSTEP_HOME": "/data/run"})
    peers = Peers(config, node(1), unused, unused)
    asked = getattr(peers, method)
    if closed:
        # With a channel that is closed, too: gRPC's own error for it is not one of ours.
        peers._stub("n2:1")
        await peers.close()
    made = asked(node_id, "Describe", wire.DescribeRequest(), 1.0)
    return await made if method == "call" else made


@pytest.mark.parametrize("method", ["call", "stream"])
def test_an_agent_that_ends_asks_nobody(method: str) -> None:
    with pytest.raises(PeerUnavailable, match="n2 did not deliver: this agent is ending"):
        asyncio.run(called("n2", closed=True, method=method))


@pytest.mark.parametrize("method", ["call", "stream"])
def test_who_is_no_member_is_not_asked(method: str) -> None:
    with pytest.raises(PeerUnavailable, match="n9 did not deliver: it is no member"):
        asyncio.run(called("n9", closed=False, method=method))


@pytest.mark.parametrize(("theirs", "times"), [(1, 2), (9, 1)])
def test_who_has_not_heard_of_this_agents_place_yet_is_asked_again(theirs: int, times: int) -> None:
    asked: list[wire.DescribeRequest] = []

    class Stub:
        async def Describe(self, request: wire.DescribeRequest, **options: float) -> str:
            asked.append(request)
            if len(asked) == 2:
                return "described"
            raise refusal(StaleEpoch("n1", 5, theirs))

    async def ask() -> Any:
        unused: Any = None
        config = load(None, {"cluster.heartbeat_s": 0.1}, {"EVERSTEP_HOME": "/data/run"})
        peers = Peers(config, node(1), unused, unused)
        peers._stub = lambda address: Stub()  # type: ignore[method-assign, return-value]
        return await peers.call("n2", "Describe", wire.DescribeRequest(), 1.0)

    if times == 2:
        assert asyncio.run(ask()) == "described"
    else:
        with pytest.raises(StaleEpoch):
            asyncio.run(ask())
    assert len(asked) == times
