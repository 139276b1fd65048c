"""A simulated node: its files, and the agent on it, from start to death.

Owns the process that can die between any two actions, stand still for a while, and its longer tasks
(encode, flush, check), each a chain of small steps in the world's time.
"""

import random
from collections import Counter
from collections.abc import Callable
from typing import Any, Protocol

from everstep.agent import actions, events
from everstep.agent.holdings import Orders, Report
from everstep.agent.job import Job, RoundStage
from everstep.agent.members import Claim, ClaimAnswer, Contact, MemberRules, Members
from everstep.agent.node import Node, SendClaim, SendOrders, SendReport, Step
from everstep.agent.plans import ParityPlan
from everstep.agent.protection import ProtectionRules
from everstep.agent.state import Expired, Rules, State
from everstep.agent.view import View
from everstep.proto.errors import StaleEpoch

from .clock import Clock, Network
from .files import JOB, Disk, Memory, OnDisk, Record, adoption, token_of
from .ledger import Ledger, insist

TICK_S = 0.7


class AgentDied(Exception):
    """The agent was killed in the middle of what it was doing."""


class World(Protocol):
    """What a node sees of the world around it."""

    chance: random.Random
    clock: Clock
    network: Network
    ledger: Ledger
    hosts: dict[str, "Host"]
    rules: ProtectionRules
    member_rules: dict[str, float]
    state_rules: dict[str, Any]
    expired: Expired
    image_bytes: int
    seen: Counter[str]
    trace: Callable[[str], None] | None


class Host:
    """A node. What is in memory is lost with it, the agent may come and go."""

    def __init__(self, world: World, node_id: str, address: str) -> None:
        self.world = world
        self.node_id = node_id
        self.address = address
        self.memory = Memory()
        self.disk = Disk()
        self.offset_s = world.chance.uniform(0, 1000)
        self.agent: Agent | None = None
        self.stopped_until_s = 0.0
        self.lost = False
        self.replaces = ""

    @property
    def runs(self) -> bool:
        """Whether its agent is there and not stopped."""
        return self.agent is not None and self.world.clock.now_s >= self.stopped_until_s

    def start(self, seeds: tuple[tuple[str, str], ...]) -> "Agent":
        """A new agent process."""
        self.agent = agent = Agent(self, seeds, self.replaces)
        found = adoption(self.memory, self.disk, self.world.image_bytes)
        if found is not None:
            agent.feed(found)
        if self.agent is agent:
            self.world.clock.later(self.world.chance.uniform(0, TICK_S), agent.tick)
        return agent

    def die(self) -> None:
        """The agent process ends."""
        self.agent = None
        self.stopped_until_s = 0.0


class Agent:
    """One agent process."""

    def __init__(self, host: Host, seeds: tuple[tuple[str, str], ...], replaces: str) -> None:
        world = host.world
        self.host = host
        self.world = world
        self.boot_id = f"{world.chance.getrandbits(64):016x}"
        rules = MemberRules(
            node_id=host.node_id,
            boot_id=self.boot_id,
            address=host.address,
            replaces=replaces,
            **world.member_rules,
        )
        state_rules = Rules(clustered=True, node_id=host.node_id, **world.state_rules)
        state = State(state_rules, world.expired)
        others = tuple(seed for seed in seeds if seed[1] != host.address)
        self.node = Node(state, Members(rules, others), world.rules)
        self.dies_in_actions: int | None = None
        self.tasks: dict[str, object] = {}
        """What goes on, by name; each with a mark of its own, so that a later one is another."""
        self._soon = False
        self._epoch = 0
        self._led = False

    @property
    def now_s(self) -> float:
        """By this machine's clock."""
        return self.world.clock.now_s + self.host.offset_s

    @property
    def job(self) -> Job | None:
        """The only one."""
        return self.node.state.jobs.get(JOB)

    @property
    def here(self) -> bool:
        """Whether this process is alive."""
        return self.host.agent is self

    def feed(self, event: events.Event) -> Any:
        """Something happened; the answer to whom it happened.

        Raises:
            Refused: As `Node.handle`.
        """
        if self.world.trace:
            self.world.trace(f"  {self.host.node_id} event {event}")
        self.world.seen[type(event).__name__] += 1
        step = self.node.handle(event, self.now_s)
        self.perform(step)
        return step.reply

    def perform(self, step: Step) -> None:
        """Do what a step asks for; the agent may die meanwhile."""
        try:
            if step.actions:
                self._act(step)
            for send in step.sends:
                self._send(send)
        except AgentDied:
            if self.here:
                self.world.seen["died in action"] += 1
                self.host.die()
            return
        if self.node.undecided and not self._soon:
            self._soon = True
            self.world.clock.later(self.world.chance.uniform(0.01, 0.1), self._tick_soon)

    def _act(self, step: Step) -> None:
        recorded = []
        for action in step.actions:
            if self.dies_in_actions is not None:
                self.dies_in_actions -= 1
                if self.dies_in_actions < 0:
                    raise AgentDied
            if self.world.trace:
                self.world.trace(f"  {self.host.node_id} action {action}")
            self.world.seen[type(action).__name__] += 1
            _PERFORMERS[type(action)](self, action)
            if isinstance(action, actions.PublishRecord):
                recorded.append(events.Recorded(JOB, action.snapshot, action.rank))
        for event in recorded:
            if self.here:
                self.feed(event)

    def tick(self) -> None:
        """Time passes."""
        if not self.here:
            return
        world = self.world
        if world.clock.now_s < self.host.stopped_until_s:
            world.clock.later(self.host.stopped_until_s - world.clock.now_s, self.tick)
            return
        self._tick()
        if self.here:
            world.clock.later(TICK_S, self.tick)

    def _tick_soon(self) -> None:
        self._soon = False
        if self.here and self.host.runs and self.node.undecided:
            self._tick()

    def _tick(self) -> None:
        members = self.node.members
        insist(members.epoch >= self._epoch, "the epoch fell")
        self._epoch = members.epoch
        self.perform(self.node.tick(self.now_s))
        leads = members.joined and members.is_coordinator(self.now_s)
        if leads and not self._led:
            self.world.seen["takeover"] += 1
        self._led = leads

    # Messages.

    def _send(self, send: SendClaim | SendReport | SendOrders) -> None:
        network, view = self.world.network, self.node.members.view
        if isinstance(send, SendOrders):
            self.world.ledger.ordered(send.orders, send.node_id)
            network.send(
                self.host.address, send.address, self._deliver, send.address, "on_orders",
                self.host.node_id, self.boot_id, view, send.orders,
            )  # fmt: skip
        elif isinstance(send, SendReport):
            network.send(
                self.host.address, send.contact.address, self._deliver, send.contact.address,
                "on_report", self, view, send.report,
            )  # fmt: skip
        else:
            network.send(
                self.host.address, send.contact.address, self._deliver, send.contact.address,
                "on_claim", self, send.contact, send.claim,
            )  # fmt: skip

    def _deliver(self, address: str, what: str, *arguments: Any) -> None:
        """A message arrives at an address, whoever is there."""
        agent = self.world.agent_at(address)  # type: ignore[attr-defined]
        if agent is None:
            return
        if not agent.host.runs:  # it reads what came when it runs again
            self.world.clock.later(TICK_S, self._deliver, address, what, *arguments)
            return
        getattr(agent, what)(*arguments)

    def _answer(self, to: "Agent", what: Callable[..., None], *arguments: Any) -> None:
        self.world.network.send(self.host.address, to.host.address, to._answered, what, *arguments)

    def _answered(self, what: Callable[..., None], *arguments: Any) -> None:
        if not self.here:
            return
        if not self.host.runs:
            self.world.clock.later(TICK_S, self._answered, what, *arguments)
            return
        what(*arguments)

    def on_report(self, sender: "Agent", view: View, report: Report) -> None:
        """A member's report arrives."""
        node = self.node
        if not node.members.joined:
            node.members.learned(view, self.now_s)
            self._answer(sender, sender.on_refusal, node.members.view)
            return
        try:
            orders, step = node.reported(
                sender.host.node_id, sender.boot_id, view, report, self.now_s
            )
        except StaleEpoch:
            self.world.seen["stale report"] += 1
            self._answer(sender, sender.on_refusal, node.members.view)
            return
        self.world.ledger.ordered(orders, sender.host.node_id)
        self._answer(
            sender, sender.on_orders, self.host.node_id, self.boot_id, node.members.view, orders
        )
        self.perform(step)

    def on_refusal(self, view: View) -> None:
        """The answer to a report: no."""
        self.perform(self.node.refused(view, self.now_s))

    def on_orders(self, node_id: str, boot_id: str, view: View, orders: Orders) -> None:
        """Orders arrive, asked for or not."""
        if self.world.trace and orders.orders:
            self.world.trace(f"  {self.host.node_id} told by {node_id} {orders}")
        for order in orders.orders:
            self.world.seen[type(order).__name__] += 1
        self.perform(self.node.answered(node_id, boot_id, view, orders, self.now_s))

    def on_claim(self, sender: "Agent", contact: Contact, claim: Claim) -> None:
        """Another agent wants a place."""
        answer, step = self.node.claimed(claim, self.now_s)
        self._answer(sender, sender.on_claim_answer, contact, answer)
        self.perform(step)

    def on_claim_answer(self, contact: Contact, answer: ClaimAnswer) -> None:
        """This agent's claim was answered."""
        self.perform(self.node.claim_answered(contact, answer, self.now_s))

    # Actions.

    def _drop_record(self, action: actions.DropRecord) -> None:
        self.host.memory.records.pop((action.rank, action.place), None)
        self.world.ledger.dirty = True

    def _publish_record(self, action: actions.PublishRecord) -> None:
        memory, slot = self.host.memory, (action.rank, action.place)
        token = memory.slots.get(slot)
        insist(token is not None, f"a record is published for a slot that is written: {action}")
        assert token is not None
        insist(token.snapshot == action.snapshot, f"{action} over {token}")
        world = self.node.state.jobs[JOB].snapshots[action.snapshot].world
        memory.records[slot] = Record(token, world, self.world.image_bytes, action.envelope)

    def _write_membership(self, action: actions.WriteMembership) -> None:
        job = self.job
        if job is not None:
            self.host.memory.keep_membership(job)

    def _release_arena(self, action: actions.ReleaseArena) -> None:
        memory = self.host.memory
        memory.arenas.pop((action.rank, action.generation), None)
        for slot in [
            s for s in memory.slots if (s[0], s[1].generation) == (action.rank, action.generation)
        ]:
            memory.slots.pop(slot)
            memory.records.pop(slot, None)
        self.world.ledger.dirty = True

    def _notify_committed(self, action: actions.NotifyCommitted) -> None:
        self.world.ledger.told(self.host, action.snapshot, action.level)

    def _notify_dropped(self, action: actions.NotifyDropped) -> None:
        pass

    def _flush(self, action: actions.Flush) -> None:
        self._later("flush", 0.2, 1.5, self._flushed, action)

    def _flushed(self, action: actions.Flush) -> None:
        job, problem = self.job, ""
        assert job is not None
        snapshot = job.snapshots[action.snapshot]
        if self.world.chance.random() < self.world.ledger.disk_trouble:
            problem = "the disk is full"
        else:
            old = [s for s in self.host.disk.steps if s.step == action.snapshot.step]
            found = OnDisk(snapshot.world, committed=True)
            for rank, shard in snapshot.sealed.items():
                token = self.host.memory.slots.get((rank, shard.place))
                insist(
                    token is not None and token.digest == shard.record_digest,
                    f"{action.snapshot} is flushed from a slot of {token}",
                )
                found.records[rank] = self.host.memory.records[rank, shard.place]
            for gone in old:
                del self.host.disk.steps[gone]
            self.host.disk.steps[action.snapshot] = found
        self.world.ledger.dirty = True
        self.feed(events.FlushEnded(JOB, action.snapshot, problem))

    def _verify_adopted(self, action: actions.VerifyAdopted) -> None:
        self._later(f"verify {action.snapshot}", 0.1, 1.0, self._verified, action)

    def _verified(self, action: actions.VerifyAdopted) -> None:
        job = self.job
        snapshot = job.snapshots.get(action.snapshot) if job is not None else None
        damaged = ""
        for rank, shard in snapshot.sealed.items() if snapshot is not None else ():
            token = self.host.memory.slots.get((rank, shard.place))
            insist(
                token is not None and token.digest == shard.record_digest,
                f"rank {rank} of {action.snapshot} claims a slot of {token}",
            )
        self.feed(events.AdoptedVerified(JOB, action.snapshot, damaged))

    def _delete_durable(self, action: actions.DeleteDurable) -> None:
        self.host.disk.steps.pop(action.snapshot, None)
        self.world.ledger.dirty = True

    def _encode(self, action: actions.Encode) -> None:
        plan = action.plan
        self.world.ledger.planned(plan)
        others = [m.node_id for m in plan.members if m.node_id != self.host.node_id]
        self.world.chance.shuffle(others)
        self._later(f"encode {plan.plan_id}", 0.02, 0.3, self._encode_from, plan, others)

    def _encode_from(self, plan: ParityPlan, others: list[str]) -> None:
        problem = ""
        for _ in range(3):  # several streams at a time
            if others and not problem:
                problem = self._read_all(plan, others.pop())
        if problem:
            self.feed(events.Encoded(JOB, plan.plan_id, problem))
        elif others:
            slow = self.world.ledger.slow_encoding
            self._later(f"encode {plan.plan_id}", 0.02, slow, self._encode_from, plan, others)
        else:
            self.host.memory.parities[plan.plan_id] = plan
            self.world.ledger.prepared(plan, self.host.node_id)
            self.feed(events.Encoded(JOB, plan.plan_id))

    def _read_all(self, plan: ParityPlan, node_id: str) -> str:
        """Read what a contributor has; the problem, if there is one."""
        host = self.world.hosts[node_id]
        agent = host.agent
        if (
            agent is None
            or not host.runs
            or not self.world.network.call(self.host.address, host.address)
        ):
            return f"{node_id} cannot be reached"
        job = agent.job
        held = job.rounds.get(plan.plan_id) if job is not None else None
        pinned = held is not None and held.stage is not RoundStage.FAILED
        for shard in plan.members[plan.index_of(node_id)].shards:
            if not host.memory.sound(shard.rank, shard.record_digest):
                insist(
                    not pinned,
                    f"{node_id} has given up {token_of(shard.record_digest)} during {plan.plan_id}",
                )
                return f"{node_id} does not have it any more"
        return ""

    def _stop_encoding(self, action: actions.StopEncoding) -> None:
        self.tasks.pop(f"encode {action.plan_id}", None)

    def _delete_parity(self, action: actions.DeleteParity) -> None:
        self.host.memory.parities.pop(action.plan_id, None)
        self.world.ledger.dirty = True

    def _flush_parity(self, action: actions.FlushParity) -> None:
        self._later(f"parity {action.plan.plan_id}", 0.1, 1.0, self._parity_flushed, action.plan)

    def _parity_flushed(self, plan: ParityPlan) -> None:
        found = self.host.disk.steps.get(plan.snapshot)
        if found is not None and plan.plan_id in self.host.memory.parities:
            found.parities[plan.plan_id] = plan

    def _later(
        self, name: str, least_s: float, most_s: float, what: Callable[..., None], *arguments: Any
    ) -> None:
        mark = self.tasks[name] = object()
        delay_s = self.world.chance.uniform(least_s, most_s)
        self.world.clock.later(delay_s, self._resume, name, mark, what, arguments)

    def _resume(
        self, name: str, mark: object, what: Callable[..., None], arguments: tuple[Any, ...]
    ) -> None:
        if not self.here or self.tasks.get(name) is not mark:
            return
        if not self.host.runs:
            self.world.clock.later(TICK_S, self._resume, name, mark, what, arguments)
            return
        del self.tasks[name]
        what(*arguments)


_PERFORMERS: dict[type, Callable[[Agent, Any], None]] = {
    actions.DropRecord: Agent._drop_record,
    actions.PublishRecord: Agent._publish_record,
    actions.WriteMembership: Agent._write_membership,
    actions.ReleaseArena: Agent._release_arena,
    actions.NotifyCommitted: Agent._notify_committed,
    actions.NotifyDropped: Agent._notify_dropped,
    actions.Flush: Agent._flush,
    actions.VerifyAdopted: Agent._verify_adopted,
    actions.DeleteDurable: Agent._delete_durable,
    actions.Encode: Agent._encode,
    actions.StopEncoding: Agent._stop_encoding,
    actions.DeleteParity: Agent._delete_parity,
    actions.FlushParity: Agent._flush_parity,
}
