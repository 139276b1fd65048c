"""This agent among its peers: sends what the node decides, and asks others for what it needs.

Owns the channels to other agents, the loop that lets time pass for the node, and the calls by name
that the data rooms use. Promises that every call has a deadline, that no more than one report and
one push to a peer are under way at a time (the newest follows), and that a peer's failure is an
error which names it. Decides nothing: see `agent.node`. What others ask is in `agent.answering`.
"""

import asyncio
import concurrent.futures
import logging
import time
from collections.abc import Callable
from typing import Any, Protocol

import grpc

from everstep.agent import messages
from everstep.agent.config import Config
from everstep.agent.discovery import Discovery
from everstep.agent.members import Contact
from everstep.agent.node import Node, Send, SendClaim, SendOrders, SendReport, Step
from everstep.agent.tls import channel_credentials
from everstep.agent.view import Entry, View
from everstep.proto import peer_pb2 as wire
from everstep.proto.errors import (
    EverstepError,
    InvalidConfiguration,
    PeerUnavailable,
    Refused,
    StaleEpoch,
)
from everstep.proto.peer_pb2_grpc import PeersStub
from everstep.proto.wire_errors import METADATA_KEY, decode

log = logging.getLogger("everstep.agent")
PEER_PROTOCOL = 1
_TICKS_A_HEARTBEAT = 4
_GATHER_S = 0.02
"""Reports that come within this time are decided on together."""
_DISCOVERY_S = 10.0


class Local(Protocol):
    """The handlers of this agent's own service, for calls to itself."""

    async def handle(self, method: str, request: Any) -> Any:
        """As a peer's call would be."""


class Peers:
    """All other agents, seen from this one. Lives on the agent's loop."""

    def __init__(
        self, config: Config, node: Node, perform: Callable[[Step], None], discovery: Discovery
    ) -> None:
        self.node = node
        self.local: Local | None = None
        self._config = config
        self._perform = perform
        self._discovery = discovery
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._digest: tuple[View, bytes] | None = None
        self._digest_at: dict[str, bytes] = {}
        self._busy: dict[tuple[str, str], Send | None] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._wake = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._discovered_s = time.monotonic()
        self._told_refusal = ""
        self._closed = False
        self._told_refused: dict[str, str] = {}
        self._told_lost: frozenset[str] = frozenset()

    @property
    def node_id(self) -> str:
        """This node's."""
        return self.node.node_id

    def live(self) -> tuple[str, ...]:
        """The nodes that are not suspected, this one included."""
        return self.node.members.live(time.monotonic())

    def sender(self) -> wire.Sender:
        """Who speaks."""
        members = self.node.members
        return wire.Sender(
            node_id=members.rules.node_id,
            boot_id=members.rules.boot_id,
            epoch=members.epoch,
            protocol=PEER_PROTOCOL,
            view_digest=self._view_digest(),
        )

    def _view_digest(self) -> bytes:
        view = self.node.members.view
        if self._digest is None or self._digest[0] is not view:
            self._digest = (view, messages.view_digest(view))
        return self._digest[1]

    def shown(self, known_digest: bytes) -> View | None:
        """The view, for whoever has another one; in a large cluster it is most of a message."""
        return None if known_digest == self._view_digest() else self.node.members.view

    def has_view(self, address: str, digest: bytes) -> None:
        """Take note of which view the agent at an address has."""
        self._digest_at[address] = digest

    async def run(self) -> None:
        """Let time pass for the node until cancelled."""
        pause_s = self._config.cluster.heartbeat_s / _TICKS_A_HEARTBEAT
        while True:
            try:
                async with asyncio.timeout(pause_s):
                    await self._wake.wait()
                await asyncio.sleep(min(_GATHER_S, pause_s))
            except TimeoutError:
                pass
            self._wake.clear()
            await self._discover()
            self._perform(self.node.tick(time.monotonic()))
            self._log_refusal()
            self._log_lost()

    def wake(self) -> None:
        """There is something to decide."""
        self._wake.set()

    def _log_refusal(self) -> None:
        members = self.node.members
        problem = members.refusal or (
            f"this agent's place is held by {members.fenced_by}" if members.fenced_by else ""
        )
        if problem and problem != self._told_refusal:
            log.error("no place in the cluster: %s", problem)
        self._told_refusal = problem

    def _log_lost(self) -> None:
        lost = frozenset(self.node.members.suspected(time.monotonic()))
        if lost - self._told_lost:
            log.warning(
                "nothing was heard for %g s of %s: no snapshot is committed without them",
                self._config.cluster.suspect_after_s,
                ", ".join(sorted(lost - self._told_lost)),
            )
        if self._told_lost - lost:
            log.info("heard of again, or replaced: %s", ", ".join(sorted(self._told_lost - lost)))
        self._told_lost = lost

    async def _discover(self) -> None:
        now_s = time.monotonic()
        if not self._discovery.changes or now_s - self._discovered_s < _DISCOVERY_S:
            return
        self._discovered_s = now_s
        try:
            self.node.members.seek(await asyncio.to_thread(self._discovery.seeds))
        except InvalidConfiguration as error:
            log.warning("the other agents are those known before: %s", error)

    def send(self, sends: list[Send]) -> None:
        """Send messages that the node asked for; the answers go back to it."""
        for message in () if self._closed else sends:
            target = message.address if isinstance(message, SendOrders) else message.contact.address
            key = (target, type(message).__name__)
            if key in self._busy:
                self._busy[key] = message  # the newest follows
                continue
            self._busy[key] = None
            task = self._loop.create_task(self._deliver(key, message))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        if self.node.undecided:
            self.wake()

    async def _deliver(self, key: tuple[str, str], message: Send | None) -> None:
        try:
            while message is not None:
                self._busy[key] = None
                try:
                    await self._send_one(message)
                except (grpc.aio.AioRpcError, EverstepError) as error:
                    self._log_failure(key, error)
                    return
                message = self._busy[key]
        finally:
            del self._busy[key]

    def _log_failure(self, key: tuple[str, str], error: Exception) -> None:
        """A peer that does not answer is suspected; one that refuses says why."""
        if isinstance(error, grpc.aio.AioRpcError):
            error = _typed(error, key[0], key[0])
        refused = str(error) if isinstance(error, Refused) else ""
        if refused and self._told_refused.get(key[0]) != refused:
            log.error("the agent at %s refuses this one: %s", key[0], refused)
            self._told_refused[key[0]] = refused
        else:
            log.debug("%s to %s: %s", key[1], key[0], error)

    async def _send_one(self, message: Send) -> None:
        timeout_s = self._config.cluster.suspect_after_s
        if isinstance(message, SendClaim):
            await self._claim(message.contact, message, timeout_s)
        elif isinstance(message, SendReport):
            contact = message.contact
            view = self.shown(self._digest_at.get(contact.address, b""))
            request = messages.report_message(message.report, self.sender(), view)
            reply = await self._stub(contact.address).Report(request, timeout=timeout_s)
            self.has_view(contact.address, reply.sender.view_digest)
            self._answered(reply)
        else:
            view = self.shown(self._digest_at.get(message.address, b""))
            orders = messages.orders_message(message.orders, self.sender(), view)
            pushed = wire.OrdersRequest(orders=orders)
            await self._stub(message.address).Orders(pushed, timeout=timeout_s)

    async def _claim(self, contact: Contact, message: SendClaim, timeout_s: float) -> None:
        request = messages.claim_message(message.claim, self.sender())
        reply = await self._stub(contact.address).Claim(request, timeout=timeout_s)
        answer = messages.parsed_answer(reply)
        self._perform(self.node.claim_answered(contact, answer, time.monotonic()))

    def _answered(self, reply: wire.OrdersReply) -> None:
        self._perform(
            self.node.answered(
                reply.sender.node_id,
                reply.sender.boot_id,
                messages.parsed_view(reply.view),
                messages.parsed_orders(reply),
                time.monotonic(),
            )
        )

    def _stub(self, address: str) -> Any:
        channel = self._channels.get(address)
        if channel is None:
            limit = self._config.limits.max_message_bytes
            options = [
                ("grpc.max_receive_message_length", limit),
                ("grpc.max_send_message_length", limit),
                # A peer that comes back is to be heard soon, not after gRPC's long pauses.
                ("grpc.initial_reconnect_backoff_ms", 100),
                ("grpc.min_reconnect_backoff_ms", 100),
                ("grpc.max_reconnect_backoff_ms", 1000),
                ("grpc.keepalive_time_ms", 10_000),
                ("grpc.keepalive_timeout_ms", 5_000),
                ("grpc.enable_http_proxy", 0),
            ]
            credentials = channel_credentials(self._config.tls)
            if credentials is None:
                channel = grpc.aio.insecure_channel(address, options=options)
            else:
                channel = grpc.aio.secure_channel(address, credentials, options=options)
            self._channels[address] = channel
        return PeersStub(channel)

    def _member(self, node_id: str) -> Entry:
        # gRPC has an error of its own for a channel that is closed, which nobody here expects.
        if self._closed:
            raise PeerUnavailable(node_id, "this agent is ending")
        entry = self.node.members.view.get(node_id)
        if entry is None or entry.replaced_by:
            raise PeerUnavailable(node_id, "it is no member of the cluster")
        return entry

    async def call(self, node_id: str, method: str, request: Any, timeout_s: float) -> Any:
        """Ask a peer, or this agent itself; within the deadline again while the peer has not heard
        yet that this agent has its place.

        Args:
            node_id: Whom.
            method: Of the service `Peers`.
            request: The message; its sender is filled in.
            timeout_s: For the answer.

        Raises:
            PeerUnavailable: If it is no member or does not answer, or this agent is ending.
            EverstepError: What the peer raised.
        """
        request.sender.CopyFrom(self.sender())
        if node_id == self.node_id and self.local is not None:
            return await self.local.handle(method, request)
        deadline = time.monotonic() + timeout_s
        while True:
            entry = self._member(node_id)
            left_s = max(0.0, deadline - time.monotonic())
            try:
                return await getattr(self._stub(entry.address), method)(request, timeout=left_s)
            except grpc.aio.AioRpcError as error:
                problem = _typed(error, node_id, entry.address)
            # Whoever has not heard yet that this agent has its place hears of it soon.
            unheard = isinstance(problem, StaleEpoch) and problem.current < problem.epoch
            if not unheard or time.monotonic() + self._config.cluster.heartbeat_s > deadline:
                raise problem
            await asyncio.sleep(self._config.cluster.heartbeat_s)

    def stream(self, node_id: str, method: str, request: Any, timeout_s: float) -> Any:
        """As `call`, for a method that answers with several messages: an async iterator.

        Raises:
            PeerUnavailable: If it is no member.
        """
        request.sender.CopyFrom(self.sender())
        entry = self._member(node_id)
        return getattr(self._stub(entry.address), method)(request, timeout=timeout_s)

    def call_blocking(self, node_id: str, method: str, request: Any, timeout_s: float) -> Any:
        """`call` for threads; never on the loop's own.

        Raises:
            PeerUnavailable: If it is no member or does not answer.
            EverstepError: What the peer raised.
        """
        future = asyncio.run_coroutine_threadsafe(
            self.call(node_id, method, request, timeout_s), self._loop
        )
        try:
            return future.result(timeout_s + 1)
        except concurrent.futures.CancelledError:
            raise PeerUnavailable(node_id, "this agent is ending") from None
        except concurrent.futures.TimeoutError:
            future.cancel()
            raise PeerUnavailable(node_id, f"no answer within {timeout_s:g} s") from None

    async def close(self) -> None:
        """Close all channels; what is under way fails."""
        self._closed = True
        for task in self._tasks:
            task.cancel()
        for channel in self._channels.values():
            await channel.close(None)


def _typed(error: grpc.aio.AioRpcError, node_id: str, address: str) -> EverstepError:
    metadata: Any = error.trailing_metadata()
    if any(key == METADATA_KEY for key, _ in metadata or ()):
        return decode(error, address)
    return PeerUnavailable(node_id, f"{error.code().name.lower()}: {error.details()}"[:300])
