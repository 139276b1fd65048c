"""The wire to the agent: one gRPC channel over the unix socket.

Owns the stub, deadlines and the translation of errors. Promises that every call ends within its
deadline and raises only errors of our own tree. Keeps no state about the job.
"""

import os
from collections.abc import Iterator
from typing import Any

import grpc

from everstep.proto import agent_pb2 as wire
from everstep.proto.agent_pb2_grpc import AgentStub
from everstep.proto.places import format_address, parse_address
from everstep.proto.wire_errors import decode

MESSAGE_LIMIT_BYTES = 256 << 20
_OPTIONS = [
    ("grpc.max_receive_message_length", MESSAGE_LIMIT_BYTES),
    ("grpc.max_send_message_length", MESSAGE_LIMIT_BYTES),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    # Each client has its own connection: its end is how the agent learns of the trainer's death.
    ("grpc.use_local_subchannel_pool", 1),
]


class Pending:
    """A call under way; it ends by its deadline."""

    def __init__(self, future: Any, address: str) -> None:
        self._future = future
        self._address = address

    def result(self) -> Any:
        """Wait for the reply.

        Raises:
            EverstepError: As the agent raised it, or AgentUnavailable.
        """
        try:
            return self._future.result()
        except grpc.RpcError as error:
            raise decode(error, self._address) from error


class Channel:
    """Calls to one agent.

    Args:
        address: ``unix:/path``.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        self._channel = grpc.insecure_channel(
            format_address(parse_address(address)), options=_OPTIONS
        )
        self._stub = AgentStub(self._channel)
        self._pid = os.getpid()

    def call(self, method: str, request: Any, timeout_s: float) -> Any:
        """Make one call.

        Raises:
            EverstepError: As the agent raised it, or AgentUnavailable.
        """
        try:
            return getattr(self._stub, method)(request, timeout=timeout_s)
        except grpc.RpcError as error:
            raise decode(error, self.address) from error

    def start(self, method: str, request: Any, timeout_s: float) -> "Pending":
        """Begin a call, to be ended by the result of what this returns."""
        stub = getattr(self._stub, method)
        return Pending(stub.future(request, timeout=timeout_s), self.address)

    def open_session(self, request: wire.AttachRequest) -> Any:
        """Start the Attach stream; read it with `notices`, end it with its ``cancel()``."""
        return self._stub.Attach(request, wait_for_ready=False)

    def notices(self, stream: Any) -> Iterator[wire.Notice]:
        """What the stream brings, until it ends.

        Raises:
            EverstepError: Why it ended.
        """
        try:
            yield from stream
        except grpc.RpcError as error:
            raise decode(error, self.address) from error

    def close(self) -> None:
        """Close the connection; a forked child leaves its parent's alone."""
        if os.getpid() == self._pid:
            self._channel.close()
