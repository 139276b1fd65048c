"""The question for a slot, asked without gRPC where the agent takes it so.

Owns the connection to the agent's socket for offers, see `everstep.agent.offers`. Promises that
an answer is that to the last question, that none is waited for beyond its deadline, and that where
the socket cannot be reached the call `Offer` is made instead. A question of which the answer did
not come in time is taken back: an agent that has not read it yet never acts on it. For one thread
at a time.
"""

import contextlib
import os
import socket as sockets
import time
from typing import Protocol

from google.protobuf.message import DecodeError

from everstep.client.channel import Channel
from everstep.proto import agent_pb2 as wire
from everstep.proto.errors import AgentFault, AgentUnavailable
from everstep.proto.places import offers_socket, parse_address
from everstep.proto.wire_errors import decode_bytes

_MESSAGE_BYTES = 64 << 10


class Asked(Protocol):
    """A question under way."""

    def result(self) -> wire.OfferReply:
        """Wait for the answer, within its deadline.

        Raises:
            EverstepError: As the agent raised it, or AgentUnavailable.
        """


class OfferLine:
    """Asks one agent for slots."""

    def __init__(self, channel: Channel) -> None:
        """Prepare; nothing is connected before the first question.

        Args:
            channel: To the same agent, for the call.
        """
        self._channel = channel
        self._path = str(offers_socket(parse_address(channel.address)))
        self._socket: sockets.socket | None = None
        self._pid = 0
        self._unanswered: object | None = None

    def ask(self, request: wire.OfferRequest, timeout_s: float) -> Asked:
        """Ask for a slot.

        Args:
            request: The question.
            timeout_s: For the answer.
        """
        if self._unanswered is not None or self._pid != os.getpid():
            self.hang_up()  # else the next answer could be that to an older question
        if self._sent(request.SerializeToString()):
            asked = _Question(self, self._channel.address, time.monotonic() + timeout_s)
            self._unanswered = asked
            return asked
        return self._channel.start("Offer", request, timeout_s)

    def _sent(self, data: bytes) -> bool:
        # The agent may be another one since the last question.
        for _ in range(1 if self._socket is None else 2):
            try:
                self._connected().send(data)
                return True
            except OSError:
                self.hang_up()
        return False

    def _connected(self) -> sockets.socket:
        if self._socket is None:
            self._socket = sockets.socket(sockets.AF_UNIX, sockets.SOCK_SEQPACKET)
            self._socket.setblocking(False)
            self._pid = os.getpid()
            self._socket.connect(self._path)
        return self._socket

    def receive(self, asked: object, timeout_s: float) -> bytes:
        """The answer to the question that is under way; empty if the agent has hung up.

        Raises:
            OSError: If it does not come.
        """
        if asked is not self._unanswered or self._socket is None:
            return b""
        self._socket.settimeout(max(timeout_s, 1e-6))
        data = self._socket.recv(_MESSAGE_BYTES)
        self._socket.setblocking(False)
        self._unanswered = None
        return data

    def hang_up(self) -> None:
        """Close the connection. A forked child leaves its parent's alone."""
        if self._socket is not None:
            if self._pid == os.getpid():
                with contextlib.suppress(OSError):
                    # A child that was forked meanwhile holds it open.
                    self._socket.shutdown(sockets.SHUT_RDWR)
            self._socket.close()
        self._socket, self._unanswered = None, None


class _Question:
    """Asked of the socket."""

    def __init__(self, line: OfferLine, address: str, deadline: float) -> None:
        self._line = line
        self._address = address
        self._deadline = deadline

    def result(self) -> wire.OfferReply:
        """See `Asked`."""
        try:
            data = self._line.receive(self, self._deadline - time.monotonic())
            answer = wire.OfferAnswer.FromString(data)
        except TimeoutError:
            self._line.hang_up()
            raise AgentUnavailable(self._address, "deadline exceeded: no slot was named") from None
        except OSError as error:
            self._line.hang_up()
            raise AgentUnavailable(self._address, f"unavailable: {error}") from error
        except DecodeError as error:
            self._line.hang_up()
            raise AgentFault(self._address, "its answer to an offer cannot be read") from error
        kind = answer.WhichOneof("answer")
        if kind is None:
            self._line.hang_up()
            raise AgentUnavailable(self._address, "unavailable: it has closed the connection")
        if kind == "error":
            raise decode_bytes(answer.error, self._address)
        return answer.reply
