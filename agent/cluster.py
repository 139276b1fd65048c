"""This agent's part in a cluster: puts together the rooms that talk to other agents.

Owns their start and end, the gRPC port for other agents, and what the trainers' service asks of
the cluster: to join an incarnation, to agree on replicas, to restore. Promises that a fenced agent
takes no snapshot, and that everything asked here ends within its deadline.
"""

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import Sequence
from typing import Any

import grpc

from everstep.agent.answering import Answering, PeerService
from everstep.agent.bringing import Bringing
from everstep.agent.config import Config
from everstep.agent.deciding import Deciding
from everstep.agent.discovery import Discovery
from everstep.agent.encoding import Encoding
from everstep.agent.executing import Executing
from everstep.agent.fetching import Fetching
from everstep.agent.gathering import Gathering
from everstep.agent.inventory import NodeInventory
from everstep.agent.job import Job
from everstep.agent.live_restoring import LiveRestoring
from everstep.agent.members import MemberRules, Members
from everstep.agent.mending import Mending
from everstep.agent.needs import Needs
from everstep.agent.node import Node
from everstep.agent.options import format_endpoint, is_wildcard, split_endpoint
from everstep.agent.peers import Peers
from everstep.agent.pipeline import Pipeline
from everstep.agent.protection import ProtectionRules
from everstep.agent.rates import join_rate
from everstep.agent.recovery import Wanted
from everstep.agent.repairing import Repairing
from everstep.agent.restoring import Restoring
from everstep.agent.scrubbing import Scrubbing
from everstep.agent.sending import BulkServer
from everstep.agent.serving import Serving
from everstep.agent.tls import client_context, server_context, server_credentials
from everstep.proto import agent_pb2, peer_pb2
from everstep.proto.errors import (
    CoordinatorUnknown,
    Fenced,
    InvalidConfiguration,
    PeerUnavailable,
    StaleEpoch,
)
from everstep.proto.ids import SnapshotId
from everstep.proto.peer_pb2_grpc import add_PeersServicer_to_server
from everstep.storage.parity_memory import ParityMemory
from everstep.storage.staging import Staging

log = logging.getLogger("everstep.agent")
_AGAIN_S = 0.1
_ANSWER_S = 5.0
"""For an answer to travel, beside what it waits for."""


class Cluster:
    """Everything of one agent that concerns others."""

    def __init__(
        self, config: Config, pipeline: Pipeline, node: Node, peers: Peers, bulk: BulkServer
    ) -> None:
        self.config = config
        self.pipeline = pipeline
        self.node = node
        self.peers = peers
        self.bulk = bulk
        self.answering = Answering(config, peers, pipeline.perform)
        peers.local = self.answering
        tls = client_context(config.tls)
        self.join_rate = join_rate(config.bulk.join_rate_bytes_s)
        self.serving = Serving(
            pipeline=pipeline, bulk=bulk, parity=pipeline.parity, join_rate=self.join_rate
        )
        assert pipeline.parity is not None
        self.encoding = Encoding(pipeline=pipeline, parity=pipeline.parity, calls=peers, tls=tls)
        self.executing = Executing(
            peers, pipeline, bulk, config.bulk, tls=tls, join_rate=self.join_rate
        )
        self.fetching = Fetching(peers, config.bulk, tls=tls)
        self.gathering = Gathering(peers, config.limits.declare_timeout_s)
        timeout_s = config.limits.restore_timeout_s
        self.deciding = Deciding(self.answering, node, self.gathering, timeout_s)
        self.answering.handlers |= {
            "Inventory": self.serving.inventory,
            "Describe": self.serving.describe,
            "Check": self.serving.check,
            "Open": self.serving.open,
            "Rebuild": self.executing.rebuild,
        }
        self.mending = Mending(pipeline, self.fetching)
        self.bringing = Bringing(pipeline)
        self.restoring = Restoring(
            pipeline,
            node.node_id,
            self.ask_coordinator,
            self.fetching,
            self.mending,
            self.bringing,
        )
        # What it takes from other nodes counts against what those allow.
        joining = Fetching(peers, config.bulk, tls=tls, joining=True)
        self.live_mending = Mending(pipeline, joining)
        self.live_restoring = LiveRestoring(
            pipeline,
            node.node_id,
            self.ask_coordinator,
            joining,
            self.live_mending,
            self.bringing,
        )
        self.repairing = Repairing(node.node_id, self._inventories, self.fetching, timeout_s)
        self.scrubbing = Scrubbing(pipeline, self.repairing)
        self._running: list[asyncio.Task[None]] = []

    async def _inventories(self, job: str) -> Sequence[NodeInventory]:
        return (await self.gathering.gather(job)).inventories

    @property
    def protects(self) -> bool:
        """Whether commits are protected by parity in peers' memory."""
        return self.config.parity.parities != 0

    def check_place(self) -> None:
        """Return only if this agent holds its place.

        Raises:
            Fenced: If another agent does.
        """
        if self.node.members.fenced_by:
            raise Fenced(self.node.node_id, self.node.members.fenced_by)

    async def join(self, attached: agent_pb2.AttachRequest) -> peer_pb2.JoinReply:
        """The incarnation that a trainer of this node belongs to, and its launch.

        Raises:
            EverstepError: If the coordinator refuses, or there is none in time.
        """
        request = peer_pb2.JoinRequest(
            session=attached.session, launch_id=attached.launch_id[:256], live=attached.live
        )
        reply: peer_pb2.JoinReply = await self.ask_coordinator(
            "Join", request, self.config.limits.declare_timeout_s
        )
        return reply

    async def agree(self, declared: agent_pb2.DeclareRequest) -> peer_pb2.AgreeReply:
        """Which replicated leaves are equal on all ranks of a group, on whatever nodes.

        Raises:
            EverstepError: If not all of them declare in time, or there is no coordinator.
        """
        request = peer_pb2.AgreeRequest(
            session=declared.session,
            round=declared.round,
            candidates=declared.candidates,
            candidate_digests=declared.candidate_digests,
            joining=declared.joining,
            participants=declared.participants,
        )
        # The coordinator waits as long for the ranks, and then it names those that are late.
        reply: peer_pb2.AgreeReply = await self.ask_coordinator(
            "Agree", request, self.config.limits.declare_timeout_s + _ANSWER_S
        )
        return reply

    async def restore(
        self, job: Job, rank: int, wanted: Wanted, *, live: bool = False
    ) -> agent_pb2.RestoreReply:
        """What a rank of this node loads, and where on this node it lies.

        Raises:
            EverstepError: See `everstep.agent.restoring`.
        """
        self.check_place()
        restoring = self.live_restoring if live else self.restoring
        return await restoring.restore(job, rank, wanted)

    async def gather(
        self, job: Job, rank: int, snapshot: SnapshotId, needs: Needs
    ) -> list[agent_pb2.ShardLocation]:
        """Bring units of shards to this node, for a rank that restores this snapshot.

        Raises:
            EverstepError: See `everstep.agent.restoring`.
        """
        self.check_place()
        restoring = self.live_restoring if rank in job.joining else self.restoring
        return await restoring.gather(job, snapshot, needs)

    def offered(self, job: Job) -> None:
        """A rank of this node has offered a step."""
        self.bringing.offered(job)

    async def ask_coordinator(self, method: str, request: Any, timeout_s: float) -> Any:
        """Ask whoever coordinates, and wait, bounded, until somebody does.

        Raises:
            EverstepError: What it raises; `Retryable` if nobody answered in time.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            self.check_place()
            now_s = time.monotonic()
            coordinator = self.node.members.coordinator(now_s)
            try:
                if not coordinator:
                    raise CoordinatorUnknown(())
                return await self.peers.call(coordinator, method, request, deadline - now_s)
            except (CoordinatorUnknown, PeerUnavailable, StaleEpoch):
                if time.monotonic() + _AGAIN_S > deadline:
                    raise
                await asyncio.sleep(_AGAIN_S)

    async def start(self) -> None:
        """Take part from now on."""
        loop = asyncio.get_running_loop()
        self._running = [loop.create_task(self.peers.run()), loop.create_task(self.scrubbing.run())]

    async def close(self) -> None:
        """Take part no more."""
        for task in self._running:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        self.scrubbing.close()
        self.repairing.close()
        await self.peers.close()
        self.executing.close()
        self.mending.close()
        self.live_mending.close()
        await self.encoding.close()
        await asyncio.to_thread(self.bulk.close)


async def opened(config: Config, pipeline: Pipeline) -> tuple[Cluster, grpc.aio.Server]:
    """Open the ports for other agents; nothing is answered before the server is started.

    Raises:
        InvalidConfiguration: If a port cannot be had, or the configuration names no peers.
    """
    discovery = Discovery(config.cluster)
    seeds = await asyncio.to_thread(discovery.seeds)
    server = grpc.aio.server(
        maximum_concurrent_rpcs=config.limits.max_concurrent_calls,
        options=[
            ("grpc.max_receive_message_length", config.limits.max_message_bytes),
            ("grpc.max_send_message_length", config.limits.max_message_bytes),
            ("grpc.so_reuseport", 0),
        ],
    )
    members = Members(_member_rules(config, _listen(config, server)), seeds, expects_others=True)
    node = Node(pipeline.state, members, _protection_rules(config))
    peers = Peers(config, node, pipeline.perform, discovery)
    keep_free_bytes = config.memory.keep_free_bytes
    pipeline.parity = ParityMemory(config.agent.memory_dir, keep_free_bytes=keep_free_bytes)
    pipeline.staging = Staging(config.agent.memory_dir, keep_free_bytes=keep_free_bytes)
    cluster = Cluster(config, pipeline, node, peers, _bulk_server(config))
    pipeline.join_cluster(node, peers.send, cluster.encoding.performers())
    add_PeersServicer_to_server(PeerService(cluster.answering, cluster.mending.mend), server)
    return cluster, server


def _bulk_server(config: Config) -> BulkServer:
    host, port = split_endpoint(config.bulk_listen)
    options = config.bulk
    bulk = BulkServer(
        host,
        port,
        max_streams=options.max_streams,
        max_tickets=options.max_tickets,
        ticket_timeout_s=options.ticket_timeout_s,
        stall_timeout_s=options.stall_timeout_s,
        advertised_host=split_endpoint(config.address)[0] if is_wildcard(host) else "",
        tls=server_context(config.tls),
    )
    try:
        bulk.start()
    except OSError as error:
        problem = f"{config.bulk_listen} cannot be had: {error.strerror}"
        raise InvalidConfiguration("bulk.listen", problem) from error
    return bulk


def _listen(config: Config, server: grpc.aio.Server) -> str:
    """Open the port; return the address at which others reach it."""
    credentials = server_credentials(config.tls)
    listen = config.agent.listen
    try:
        if credentials is None:
            port = server.add_insecure_port(listen)
        else:
            port = server.add_secure_port(listen, credentials)
    except RuntimeError as error:
        raise InvalidConfiguration("agent.listen", f"{listen} cannot be had: {error}") from error
    host, wanted = split_endpoint(config.address)
    return format_endpoint(host, wanted or port)


def _member_rules(config: Config, address: str) -> MemberRules:
    options = config.cluster
    return MemberRules(
        node_id=config.agent.node_id,
        boot_id=uuid.uuid4().hex,
        address=address,
        labels=options.labels,
        replaces=options.replaces,
        heartbeat_s=options.heartbeat_s,
        suspect_after_s=options.suspect_after_s,
        join_timeout_s=options.join_timeout_s,
    )


def _protection_rules(config: Config) -> ProtectionRules:
    options = config.parity
    return ProtectionRules(
        enabled=options.parities != 0,
        parities=options.parities or 0,
        group_size=options.group_size,
        interval_steps=options.interval.every_steps or None,
        interval_s=options.interval.every_s or None,
        timeout_s=options.timeout_s,
    )
