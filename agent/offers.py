"""Offers without gRPC: one short message each way, while a training thread waits.

Owns a socket of its own (SOCK_SEQPACKET, so that a message is whole) in a private directory, and
the connections to it. Promises that a question is answered as the service answers the call `Offer`,
errors included; and that one whose asker has hung up changes nothing: it was waited for no longer.
Trainers of other users make the call. Decides nothing.

Why: the call takes 1.5 ms, this 0.3 (`python -m benchmarks.offer`): gRPC for Python passes it
through several threads at each end, and the door relays it.
"""

import asyncio
import logging
import os
import select
import socket as sockets
from collections.abc import Callable
from pathlib import Path

from google.protobuf.message import DecodeError

from everstep.proto import agent_pb2 as wire
from everstep.proto.errors import AgentFault, EverstepError, InvalidConfiguration
from everstep.proto.places import private_directory
from everstep.proto.wire_errors import encode

log = logging.getLogger("everstep.agent")
_BACKLOG = 128
_MESSAGE_BYTES = 16 << 10
_PAUSE_S = 1.0
_GONE = select.POLLHUP | select.POLLRDHUP | select.POLLERR
Answer = Callable[[wire.OfferRequest], wire.OfferReply]


class Offers:
    """Answers offers at a socket of its own. Lives on the agent's loop."""

    def __init__(
        self,
        path: Path,
        max_connections: int,
        answer: Answer,
    ) -> None:
        """Prepare; nothing is touched before `start`.

        Args:
            path: Where the socket is made, in a directory of mode 0700, which is made if it is
                missing; what is there is of the agent before this one.
            max_connections: How many may be connected at one time.
            answer: Answers one; may raise an `EverstepError`.
        """
        self._path = path
        self._max_connections = max_connections
        self._answer = answer
        self._listener: sockets.socket | None = None
        self._peers: set[sockets.socket] = set()

    def start(self) -> None:
        """Listen. Where that is not possible trainers use the call: it is logged, and no error."""
        listener = sockets.socket(sockets.AF_UNIX, sockets.SOCK_SEQPACKET)
        try:
            private_directory(self._path.parent, os.getuid())
            self._path.unlink(missing_ok=True)
            listener.bind(str(self._path))
            listener.listen(_BACKLOG)
            listener.setblocking(False)
        except (OSError, InvalidConfiguration) as error:
            listener.close()
            log.warning("offers go through gRPC: no socket at %s: %s", self._path, error)
            return
        self._listener = listener
        asyncio.get_running_loop().add_reader(listener, self._accept)

    def close(self) -> None:
        """Answer nothing more. Idempotent."""
        if self._listener is None:
            return
        self._path.unlink(missing_ok=True)
        listener, self._listener = self._listener, None
        asyncio.get_running_loop().remove_reader(listener)
        listener.close()
        for peer in list(self._peers):
            self._hang_up(peer)

    def _accept(self) -> None:
        assert self._listener is not None
        try:
            peer, _ = self._listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return  # who knocked is gone
        except OSError as error:
            # Descriptors have run out: the next look would find the same.
            log.warning("no connection for offers: %s", error)
            loop = asyncio.get_running_loop()
            loop.remove_reader(self._listener)
            loop.call_later(_PAUSE_S, self._listen_again)
            return
        if len(self._peers) >= self._max_connections:
            peer.close()
            return
        peer.setblocking(False)
        self._peers.add(peer)
        asyncio.get_running_loop().add_reader(peer, self._readable, peer)

    def _listen_again(self) -> None:
        if self._listener is not None:
            asyncio.get_running_loop().add_reader(self._listener, self._accept)

    def _hang_up(self, peer: sockets.socket) -> None:
        self._peers.discard(peer)
        asyncio.get_running_loop().remove_reader(peer)
        peer.close()

    def _readable(self, peer: sockets.socket) -> None:
        try:
            data = peer.recv(_MESSAGE_BYTES)
            if not data or _has_hung_up(peer):
                self._hang_up(peer)
                return
            peer.send(self._answered(data).SerializeToString())
        except (OSError, DecodeError) as error:
            log.debug("an offer was not answered: %s", error)
            self._hang_up(peer)

    def _answered(self, data: bytes) -> wire.OfferAnswer:
        request = wire.OfferRequest.FromString(data)
        try:
            return wire.OfferAnswer(reply=self._answer(request))
        except EverstepError as error:
            return wire.OfferAnswer(error=encode(error))
        except Exception as error:
            log.exception("an offer was not answered")
            return wire.OfferAnswer(error=encode(AgentFault(str(self._path), repr(error))))


def _has_hung_up(peer: sockets.socket) -> bool:
    """Whether the other side listens no more, though what it sent before can still be read."""
    poll = select.poll()
    poll.register(peer, select.POLLRDHUP)
    return any(found & _GONE for _, found in poll.poll(0))
