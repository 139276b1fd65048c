"""What all reachable nodes hold of a job, and what can be recovered from it.

Owns the questions to all live nodes and the check of the copies that a plan wants to use. Promises
that a node that does not answer in time counts as lost and is named, that a copy whose digests do
not match is an erasure and the plan is made anew without it, and that this ends: each round of
checks finds new damage or is the last. The plan itself is a pure function: `agent.planning`.
"""

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from everstep.agent import inventory
from everstep.agent.inventory import NodeInventory
from everstep.agent.peers import Peers
from everstep.agent.planning import Erasure, Held, SnapshotPlan, plan_snapshots
from everstep.proto import agent_pb2, peer_pb2
from everstep.proto.errors import EverstepError, PeerUnavailable, StaleEpoch
from everstep.proto.ids import SnapshotId

log = logging.getLogger("everstep.agent")


@dataclass(frozen=True, slots=True)
class Wishes:
    """What a plan may use, and what it prefers."""

    levels: frozenset[str] = frozenset()
    to_step: int | None = None
    prefer_node: Mapping[int, str] = field(default_factory=dict)
    preference: Callable[[SnapshotId], Any] | None = None
    excluded: frozenset[SnapshotId] = frozenset()
    """Whole, but never committed: their replicas had drifted apart."""
    revocable: frozenset[str] = frozenset()
    """Plans whose parity may be freed at any time; see `Coordination.revocable`."""


@dataclass(slots=True)
class Findings:
    """What came of the questions."""

    inventories: tuple[NodeInventory, ...]
    silent: tuple[str, ...]
    """Members that did not answer."""
    erasures: list[Erasure] = field(default_factory=list)
    rejected: list[agent_pb2.RejectedCopy] = field(default_factory=list)

    @property
    def anything(self) -> bool:
        """Whether any node holds, or held, anything of the job."""
        return any(node.snapshots or node.problems for node in self.inventories)

    def plans(self, wishes: Wishes) -> list[SnapshotPlan]:
        """What can be recovered, the most wanted first."""
        usable = self.inventories
        if wishes.revocable:
            usable = tuple(node.without(wishes.revocable) for node in usable)
        planned = plan_snapshots(
            usable,
            levels=wishes.levels,
            to_step=wishes.to_step,
            erasures=self.erasures,
            prefer_node=wishes.prefer_node,
            preference=wishes.preference,
        )
        return [plan for plan in planned if plan.snapshot not in wishes.excluded]


class Gathering:
    """Asks all nodes, on behalf of one."""

    def __init__(self, peers: Peers, timeout_s: float) -> None:
        self._peers = peers
        self._timeout_s = timeout_s

    async def gather(self, job: str) -> Findings:
        """What every live node holds of a job."""
        request = peer_pb2.InventoryRequest(job=job)
        live = self._peers.live()
        replies = await asyncio.gather(
            *(self._asked(node_id, "Inventory", request) for node_id in live)
        )
        members = [entry.node_id for entry in self._peers.node.members.view.members()]
        answered = {node_id: reply for node_id, reply in zip(live, replies, strict=True) if reply}
        return Findings(
            tuple(inventory.parsed(reply) for reply in answered.values()),
            tuple(node_id for node_id in members if node_id not in answered),
        )

    async def _asked(self, node_id: str, method: str, request: Any) -> Any:
        """The answer of a node; None if it does not come.

        Who was started a moment ago is not known to all yet, and not reached by all: a node that
        counts as live is asked again for as long as that lasts.
        """
        rules = self._peers.node.members.rules
        deadline_s = time.monotonic() + rules.suspect_after_s
        while True:
            try:
                # Each call fills in the sender: not in a message that others are sending, too.
                own = type(request)()
                own.CopyFrom(request)
                return await self._peers.call(node_id, method, own, self._timeout_s)
            except (PeerUnavailable, StaleEpoch) as error:
                if node_id in self._peers.live() and time.monotonic() < deadline_s:
                    await asyncio.sleep(rules.heartbeat_s)
                    continue
                log.warning("%s of %s: %s", method, node_id, error)
                return None
            except EverstepError as error:
                log.warning("%s of %s: %s", method, node_id, error)
                return None

    async def checked(
        self, job: str, findings: Findings, wishes: Wishes, usable: Callable[[SnapshotPlan], bool]
    ) -> SnapshotPlan | None:
        """The most wanted plan whose copies have all passed their digests; None if there is none.

        What is decoded is checked as it is decoded.
        """
        while True:
            # In a thread: with many ranks it takes longer than a heartbeat.
            plans = await asyncio.to_thread(findings.plans, wishes)
            plan = next((p for p in plans if p.recoverable and usable(p)), None)
            if plan is None:
                return None
            damaged = await self._check(job, plan, findings)
            if not damaged:
                return plan
            findings.erasures += damaged

    async def _check(self, job: str, plan: SnapshotPlan, findings: Findings) -> list[Erasure]:
        ranks: dict[tuple[str, str], list[int]] = defaultdict(list)
        for source in plan.sources:
            if isinstance(source, Held):
                ranks[source.node_id, source.level].append(source.rank)
        checks = [
            self._checked_copies(job, plan.snapshot, place, held, findings)
            for place, held in ranks.items()
        ]
        return [erasure for found in await asyncio.gather(*checks) for erasure in found]

    async def _checked_copies(
        self,
        job: str,
        snapshot: SnapshotId,
        place: tuple[str, str],
        ranks: Collection[int],
        findings: Findings,
    ) -> list[Erasure]:
        node_id, level = place
        request = peer_pb2.CheckRequest(
            job=job,
            incarnation=snapshot.incarnation,
            step=snapshot.step,
            ranks=sorted(ranks),
            level=level,
        )
        reply = await self._asked(node_id, "Check", request)
        if reply is None:
            # It went away meanwhile: nothing of it can be counted on.
            return [Erasure(node_id, snapshot, rank, level) for rank in ranks]
        for copy in reply.damaged:
            log.warning("%s of %s, rank %d, %s: %s", snapshot, job, copy.rank, level, copy.reason)
            findings.rejected.append(copy)
        return [Erasure(node_id, snapshot, copy.rank, level) for copy in reply.damaged]
