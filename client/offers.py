"""The question for a slot, asked without gRPC where the agent takes it so.

Owns the connection to the agent's socket for offers, see `everstep.agent.offers`. Promises that
an answer is that to the last question, that none is waited for beyond its deadline, and that where
the socket cannot be reached, or the agent hangs up, the call `Offer` is made instead. A question of
which the answer did not come in time is taken back: an agent that has not read it yet never acts on
it. Believes nobody but the user who owns the agent's public socket. For one thread at a time.
"""

import contextlib
import os
import socket as sockets
import struct
import time
from typing import Protocol

from google.protobuf.message import DecodeError

from everstep.client.channel import Channel
from everstep.proto import agent_pb2 as wire
from everstep.proto.errors import AgentFault, AgentUnavailable
from everstep.proto.places import offers_socket, parse_address
from everstep.proto.wire_errors import decode_bytes

_MESSAGE_BYTES = 64 << 10
_PEER = (sockets.SOL_SOCKET, sockets.SO_PEERCRED)


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
        self._public = parse_address(channel.address)
        self._path = str(offers_socket(self._public))
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
            self._unanswered = asked = _Question(self, request, time.monotonic() + timeout_s)
            return asked
        return self.call(request, timeout_s)

    @property
    def address(self) -> str:
        """The agent's."""
        return self._channel.address

    def call(self, request: wire.OfferRequest, timeout_s: float) -> Asked:
        """Ask by gRPC."""
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
            # A slot that anybody else names may hold the newest commit.
            _, uid, _ = struct.unpack(
                "iII", self._socket.getsockopt(*_PEER, struct.calcsize("iII"))
            )
            if uid != self._public.lstat().st_uid:
                raise PermissionError(f"{self._path} is not the agent's")
        return self._socket

    def receive(self, asked: object, timeout_s: float) -> bytes:
        """The answer to a question; empty if the agent has hung up, or another was asked since.

        Raises:
            TimeoutError: If it does not come in time; the question is taken back.
        """
        if asked is not self._unanswered or self._socket is None:
            return b""
        data = b""
        try:
            self._socket.settimeout(max(timeout_s, 1e-6))
            data = self._socket.recv(_MESSAGE_BYTES)
            self._socket.setblocking(False)
            self._unanswered = None
        except TimeoutError:
            self.hang_up()
            raise
        except OSError:
            pass
        if not data:
            self.hang_up()
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
    """Asked at the socket."""

    def __init__(self, line: OfferLine, request: wire.OfferRequest, deadline: float) -> None:
        self._line = line
        self._request = request
        self._deadline = deadline

    def result(self) -> wire.OfferReply:
        """See `Asked`."""
        address = self._line.address
        try:
            data = self._line.receive(self, self._remaining_s)
        except TimeoutError:
            raise AgentUnavailable(address, "deadline exceeded: it named no slot") from None
        if not data:
            # It has no room for another connection, is ending, or was started anew.
            return self._line.call(self._request, self._remaining_s).result()
        try:
            answer = wire.OfferAnswer.FromString(data)
        except DecodeError as error:
            self._line.hang_up()
            raise AgentFault(address, "its answer to an offer cannot be read") from error
        if answer.WhichOneof("answer") == "reply":
            return answer.reply
        raise decode_bytes(answer.error, address)

    @property
    def _remaining_s(self) -> float:
        return max(1e-3, self._deadline - time.monotonic())
