"""What other agents ask of this one: the service `Peers`.

Owns the admission of callers and the way of each request to the room that answers it. Promises
that nothing is answered to an agent that does not hold its place in the membership, or that speaks
another version of the protocol, and that an error raised on purpose arrives as itself. Decides
nothing.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Container
from typing import Any

from everstep.agent import events, messages
from everstep.agent.agreeing import Agreeing, participants_of
from everstep.agent.assembly import Assembly, RankHeld
from everstep.agent.config import Config
from everstep.agent.events import Caller
from everstep.agent.node import Step
from everstep.agent.peers import PEER_PROTOCOL, Peers
from everstep.proto import peer_pb2 as wire
from everstep.proto.agent_pb2 import Session
from everstep.proto.errors import (
    CoordinatorUnknown,
    EverstepError,
    FormatInvalid,
    Refused,
    StaleEpoch,
)
from everstep.proto.ids import checked_name
from everstep.proto.peer_pb2_grpc import PeersServicer
from everstep.proto.wire_errors import METADATA_KEY, encode, status_of

log = logging.getLogger("everstep.agent")
_AGAIN_S = 0.1
_DIGEST_BYTES = 16
Handler = Callable[[Any], Awaitable[Any]]


def caller_of(session: Session) -> Caller:
    """A trainer process as the wire names it.

    Raises:
        InvalidName: If the job's name is not acceptable.
    """
    return events.Caller(
        job=checked_name("job", session.job),
        rank=session.rank,
        world=session.world,
        process_id=session.process_id[:128],
        incarnation=session.incarnation,
    )


def digests_of(candidates: tuple[str, ...], joined: bytes) -> tuple[bytes, ...]:
    """One digest for each candidate.

    Raises:
        FormatInvalid: If there are more, or fewer.
    """
    if len(joined) != _DIGEST_BYTES * len(candidates):
        raise FormatInvalid("Declare", "does not have one digest a candidate")
    return tuple(joined[at : at + _DIGEST_BYTES] for at in range(0, len(joined), _DIGEST_BYTES))


def among(candidates: tuple[str, ...], agreed: Container[str] | None) -> list[int]:
    """Indices of the candidates that are known to be agreed on."""
    return [at for at, name in enumerate(candidates) if agreed is not None and name in agreed]


class Answering:
    """Requests by the name of their method, from peers and from this agent itself."""

    def __init__(self, config: Config, peers: Peers, perform: Callable[[Step], None]) -> None:
        self._config = config
        self._peers = peers
        self._node = peers.node
        self._perform = perform
        self._assembly = Assembly(peers.node.coordination)
        self._agreeing = Agreeing()
        self.handlers: dict[str, Handler] = {"Join": self._join, "Agree": self._agree}
        """By method; other rooms add theirs."""
        self.refused: dict[str, int] = {}
        """How many calls of a peer were refused, by node."""

    async def handle(self, method: str, request: Any) -> Any:
        """Answer a request whose sender was admitted.

        Raises:
            EverstepError: What the handler raises.
        """
        handler = self.handlers.get(method)
        if handler is None:
            raise Refused(f"this agent does not answer {method}.")
        return await handler(request)

    def admit(self, sender: wire.Sender) -> None:
        """Let only members speak.

        Raises:
            StaleEpoch: If the sender does not hold its place.
            Refused: If it speaks another version.
        """
        try:
            self._check_version(sender)
            self._node.members.heard(sender.node_id, sender.boot_id, sender.epoch, time.monotonic())
        except EverstepError:
            self.count_refused(sender.node_id)
            raise

    def understand(self, sender: wire.Sender) -> None:
        """Return only if whoever seeks a place, or has news, speaks our version of the protocol.

        Raises:
            Refused: If it speaks another one.
        """
        try:
            self._check_version(sender)
        except EverstepError:
            self.count_refused(sender.node_id)
            raise

    def _check_version(self, sender: wire.Sender) -> None:
        checked_name("node", sender.node_id)
        if sender.protocol != PEER_PROTOCOL:
            raise Refused(
                f"{sender.node_id} speaks version {sender.protocol} of the agents' protocol, "
                f"this agent version {PEER_PROTOCOL}. Run the same release on all nodes."
            )

    def count_refused(self, node_id: str) -> None:
        """One more call of this peer was refused."""
        name = node_id[:128] if node_id in self._node.members.view else "strangers"
        self.refused[name] = self.refused.get(name, 0) + 1

    def claim(self, request: wire.ClaimRequest) -> wire.ClaimReply:
        """See `Node.claimed`."""
        self.understand(request.sender)
        answer, step = self._node.claimed(messages.parsed_claim(request), time.monotonic())
        self._perform(step)
        return messages.answer_message(answer)

    def report(self, request: wire.ReportRequest) -> wire.OrdersReply:
        """See `Node.reported`. Who does not hold its place is shown who does."""
        members = self._node.members
        sender = request.sender
        self.understand(sender)
        try:
            orders, step = self._node.reported(
                checked_name("node", sender.node_id),
                sender.boot_id,
                messages.parsed_view(request.view),
                messages.parsed_report(request),
                time.monotonic(),
                epoch=sender.epoch,
            )
        except StaleEpoch:
            self.count_refused(sender.node_id)
            shown = messages.view_message(members.view)
            return wire.OrdersReply(sender=self._peers.sender(), view=shown)
        self._perform(step)
        entry = members.view.get(sender.node_id)
        if entry is not None:
            self._peers.has_view(entry.address, sender.view_digest)
        view = self._peers.shown(sender.view_digest)
        return messages.orders_message(orders, self._peers.sender(), view)

    def orders(self, request: wire.OrdersRequest) -> wire.OrdersAck:
        """See `Node.answered`."""
        told = request.orders
        self.understand(told.sender)
        step = self._node.answered(
            checked_name("node", told.sender.node_id),
            told.sender.boot_id,
            messages.parsed_view(told.view),
            messages.parsed_orders(told),
            time.monotonic(),
        )
        self._perform(step)
        return wire.OrdersAck()

    def coordinates(self) -> None:
        """Return only if this agent may decide for all.

        Raises:
            CoordinatorUnknown: If it does not coordinate, or does not know yet what all hold.
        """
        members = self._node.members
        now_s = time.monotonic()
        if not self._node.ready(now_s):
            raise CoordinatorUnknown(members.waiting_for(now_s))

    async def _join(self, request: wire.JoinRequest) -> wire.JoinReply:
        """A rank that is held may be held by a process that is just dying: wait for its end."""
        caller = caller_of(request.session)
        deadline = time.monotonic() + 1.5 * self._config.cluster.suspect_after_s
        while True:
            self.coordinates()
            live = frozenset(self._peers.live())
            places = {entry.node_id for entry in self._node.members.view.members()}
            try:
                incarnation = self._assembly.join(
                    request.sender.node_id,
                    caller,
                    request.launch_id[:256],
                    live,
                    joins_live=request.live,
                    silent=frozenset(places - live),
                )
                break
            except RankHeld:
                if time.monotonic() > deadline:
                    raise
                await asyncio.sleep(_AGAIN_S)
        self._peers.wake()
        return wire.JoinReply(
            incarnation=incarnation,
            launch_id=self._assembly.launch_id(caller.job),
            joined=request.live and self._assembly.has_joined(caller),
        )

    async def _agree(self, request: wire.AgreeRequest) -> wire.AgreeReply:
        caller = caller_of(request.session)
        self.coordinates()
        candidates = tuple(request.candidates)
        digests = digests_of(candidates, request.candidate_digests)
        group = participants_of(request.participants, caller)
        if request.joining:
            names = self._assembly.agreed(caller, group)
            return wire.AgreeReply(agreed=among(candidates, names), unknown=names is None)
        event = events.Declare(caller, request.round, candidates, digests, group)
        agreed = await self._agreeing.agree(
            event,
            lambda: self._assembly.declare(event),
            self._config.limits.declare_timeout_s,
            lambda: self._assembly.undeclared(event),
        )
        return wire.AgreeReply(agreed=agreed)


class PeerService(PeersServicer):
    """The gRPC face of `Answering`."""

    def __init__(self, answering: Answering, stream: Callable[[Any], AsyncIterator[Any]]) -> None:
        """Answer with `answering`; `stream` answers `Mend`."""
        self._answering = answering
        self._stream = stream
        for method in (
            "Join",
            "Agree",
            "Decide",
            "Inventory",
            "Check",
            "Describe",
            "Open",
            "Rebuild",
            "Survey",
        ):
            setattr(self, method, self._relayed(method))

    async def Claim(self, request: wire.ClaimRequest, context: Any) -> Any:
        """See peer.proto."""
        return await _answered(context, _soon(lambda: self._answering.claim(request)))

    async def Report(self, request: wire.ReportRequest, context: Any) -> Any:
        """See peer.proto."""
        return await _answered(context, _soon(lambda: self._answering.report(request)))

    async def Orders(self, request: wire.OrdersRequest, context: Any) -> Any:
        """See peer.proto."""
        return await _answered(context, _soon(lambda: self._answering.orders(request)))

    async def Mend(
        self, request: wire.MendRequest, context: Any
    ) -> AsyncIterator[wire.MendProgress]:
        """See peer.proto."""
        try:
            self._answering.admit(request.sender)
            async for progress in self._stream(request):
                yield progress
        except EverstepError as error:
            await abort(context, error)

    def _relayed(self, method: str) -> Callable[[Any, Any], Awaitable[Any]]:
        async def relayed(request: Any, context: Any) -> Any:
            async def answer() -> Any:
                self._answering.admit(request.sender)
                return await self._answering.handle(method, request)

            return await _answered(context, answer())

        return relayed


async def _soon(answer: Callable[[], Any]) -> Any:
    return answer()


async def _answered(context: Any, answer: Awaitable[Any]) -> Any:
    try:
        return await answer
    except EverstepError as error:
        return await abort(context, error)


async def abort(context: Any, error: EverstepError) -> None:
    """End a call with an error of our own tree, in its gRPC form."""
    metadata = ((METADATA_KEY, encode(error)),)
    await context.abort(status_of(error), str(error)[:2000], trailing_metadata=metadata)
