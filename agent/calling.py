"""How one agent asks another, as the rooms that move data see it.

Owns the contract only: `agent.peers` fulfils it over gRPC, and a test may within one process.
"""

from typing import Any, Protocol


class Calls(Protocol):
    """Calls to other agents, and to this one itself, by node id."""

    @property
    def node_id(self) -> str:
        """This node."""

    async def call(self, node_id: str, method: str, request: Any, timeout_s: float) -> Any:
        """Call a method of the service `Peers` of proto/peer.proto; the sender is filled in.

        Raises:
            PeerUnavailable: If the node is not there, or does not answer in time.
            EverstepError: What it raised.
        """

    def call_blocking(self, node_id: str, method: str, request: Any, timeout_s: float) -> Any:
        """As `call`, from a thread that is not the loop's."""
