"""Calls of other agents that are refused before they are made."""

import asyncio
from typing import Any

import pytest

from everstep.agent.config import load
from everstep.agent.peers import Peers
from everstep.proto import peer_pb2 as wire
from everstep.proto.errors import PeerUnavailable

from .test_node import node


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
